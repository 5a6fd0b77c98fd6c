"""The five phases from end to end: their files, what is the same every time, and what each flag changes."""
import itertools
import json
import math
import shutil
import statistics
import tracemalloc
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torchvision.datasets import ImageFolder

import collect_stats
import recover
import relabel
import squeeze
import train_eval
import utils.dm
import utils.labels
import utils.selection
from models import build_model
from tests.helpers import assert_near, checkpoint, faked_graphs
from utils import recorder
from utils import train
from utils.augment import apply_epoch, apply_view, draw_epoch, draw_view, normalize, to_uint8
from utils.closed_form import ClosedFormMatching
from utils.data import Split, load_split
from utils.labels import LabelWriter, draw_labels
from utils.run import generator
from utils.stats import Matching
from utils.train import channels_last

PHASES = {module.__name__: module for module in (squeeze, collect_stats, recover, relabel, train_eval)}
RUN = "gvbsm-ipc2"
FP16 = 1e-3                                                    # relative rounding of float16


@pytest.fixture
def record(monkeypatch):
    """record(module, name): the list of arguments, and value after them, of the calls of module.name from now
    on."""
    def watch(module, name):
        function, calls = getattr(module, name), []

        def recording(*args, **kwargs):
            calls.append((*args, *kwargs.values(), value := function(*args, **kwargs)))
            return value

        monkeypatch.setattr(module, name, recording)
        return calls
    return watch


def teachers(project, *names, folder=None):
    """Frozen backbones of a project, {name: model}."""
    models = {}
    for name in names:
        record = checkpoint((folder or project.teachers) / f"{name}.pt")
        models[name] = build_model(name, len(record["data"]["classes"]),
                                   record["data"]["image_size"]).eval().requires_grad_(False)
        models[name].load_state_dict(record["weights"])
    return models


def network_input(project, pixels):
    """Integers [N, S, S, 3] as the networks see them."""
    data = checkpoint(project.teachers / "convnet_w8.pt")["data"]
    return normalize(torch.from_numpy(pixels).permute(0, 3, 1, 2), data["mean"], data["std"])


def labels(project, run=RUN):
    """{array: values} of a run's labels."""
    return {path.stem: np.load(path) for path in (project.run(run) / "labels").glob("*.npy")}


def made(project, phase, run=RUN):
    """What a phase has made, comparable."""
    if phase in ("squeeze", "collect_stats"):
        kind, key = (".pt", "weights") if phase == "squeeze" else (".stats.pt", "statistics")
        return {name: {layer: [row.tolist() for row in values] if isinstance(values, list)
                       else values.tolist()
                       for layer, values in checkpoint(project.teachers / f"{name}{kind}")[key].items()}
                for name in ("convnet_w8", "wrn10_1")}
    if phase == "recover":
        return {path.relative_to(project.run(run)): path.read_bytes()
                for path in project.run(run).rglob("*.png")}
    if phase == "relabel":
        return {path.name: path.read_bytes() for path in (project.run(run) / "labels").glob("*.npy")}
    return {path.name: json.loads(path.read_text())["top1_by_epoch"]
            for path in (project.run(run) / "eval").iterdir()}


# The chain

@pytest.fixture(scope="module", params=["beasts", pytest.param("shapes", marks=pytest.mark.slow)])
def chain(request, beasts, new_project):
    """A project after all five phases, their RESULTs, and what they printed."""
    shapes = request.param == "shapes"
    project, results, printed = new_project("shapes" if shapes else beasts), {}, {}
    for phase in PHASES:
        flags = ("--backbones convnet_w8 --ipc 1", "--batch-size 64" * (phase == "squeeze")) if shapes else ()
        results[phase], printed[phase] = project.call(phase, *flags), project.printed
    if shapes:
        project.classes = results["recover"]["classes"]
    return project, results, printed


def test_the_chain_writes_the_documented_files_and_no_others(chain):
    project, results, _ = chain
    ipc, backbones = results["squeeze"]["ipc"], results["squeeze"]["args"]["backbones"]
    expected = {f"teachers/supervised/{backbone}{kind}" for backbone in backbones
                for kind in (".pt", ".stats.pt")}
    expected |= {f"teachers/supervised/{phase}.json" for phase in ("squeeze", "collect_stats")}
    run = {f"images/{name}/{i:05d}.png" for name in project.classes for i in range(ipc)}
    run |= {"grid.png", "log.jsonl", "result.json", "labels/result.json", "eval/convnet_w8.json"}
    run |= {f"labels/{name}.npy" for name in ("logits", "crop", "flip", "partner", "box", "ratio")}
    expected |= {f"gvbsm-ipc{ipc}/{name}" for name in run}
    found = {path.relative_to(project.results).as_posix() for path in project.results.rglob("*")
             if path.is_file()}
    assert found == expected


def test_each_phase_ends_with_three_lines_and_one_short_result_that_names_its_file(chain):
    project, results, printed = chain
    run = project.run(f"gvbsm-ipc{results['recover']['ipc']}")
    files = [project.teachers / "squeeze.json", project.teachers / "collect_stats.json", run / "result.json",
             run / "labels/result.json", run / "eval/convnet_w8.json"]
    for (phase, result), file in zip(results.items(), files, strict=True):
        lines = printed[phase].splitlines()
        assert [line for line in lines if line.startswith("RESULT")] == lines[-1:] and len(lines[-1]) < 400
        short = json.loads(lines[-1].removeprefix("RESULT "))
        assert short["file"] == str(file) and json.loads(file.read_text()) == result
        assert all(short[key] == result[key] for key in ("phase", "dataset", "ipc", "method", "tag",
                                                         "seconds"))
        assert "top1" not in result or short["top1"] == pytest.approx(result["top1"], abs=0.01)
        told, files, following = lines[-4:-1]
        assert told.startswith(f"{phase}: ") and files.startswith(f"files: {file.parent}")
        assert following.startswith("next:  python ")
        identity = [result[key] for key in ("phase", "dataset", "method", "tag")]
        assert identity == [phase, project.results.name, "gvbsm", None]
        assert {"seconds", "peak_memory", "versions", "args", "upstream"} <= result.keys()


def test_the_arguments_of_all_phases_travel_to_the_evaluation(chain):
    _, results, _ = chain
    upstream = results["train_eval"]["upstream"]
    assert upstream.keys() == results.keys() - {"train_eval"}
    for phase, backbones in ("squeeze", upstream["squeeze"]), ("collect_stats", upstream["collect_stats"]):
        assert list(backbones) == results["squeeze"]["args"]["backbones"]
        assert all(args == results[phase]["args"] for args in backbones.values())
    assert upstream["recover"] == results["recover"]["args"]
    assert upstream["relabel"] == results["relabel"]["args"]


def test_any_image_folder_loader_reads_the_images_in_the_teachers_class_order(chain):
    project, results, _ = chain
    ipc, backbone = results["recover"]["ipc"], results["squeeze"]["args"]["backbones"][0]
    data = checkpoint(project.teachers / f"{backbone}.pt")["data"]
    found = ImageFolder(project.run(f"gvbsm-ipc{ipc}") / "images")
    assert found.classes == data["classes"] == results["relabel"]["classes"] == list(project.classes)
    assert found.targets == [label for label in range(len(found.classes)) for _ in range(ipc)]
    assert {(image.size, image.mode) for image, _ in found} == {((data["image_size"],) * 2, "RGB")}


def test_the_grid_shows_the_images_class_by_class(chain):
    project, results, _ = chain
    run, ipc = f"gvbsm-ipc{results['recover']['ipc']}", results["recover"]["ipc"]
    images, grid = project.images(run), np.asarray(Image.open(project.run(run) / "grid.png")).astype(int)
    size = images.shape[1]
    assert grid.shape == (len(project.classes) * (size + 2) + 2, ipc * (size + 2) + 2, 3)
    for number, image in enumerate(images):
        row, column = (2 + (size + 2) * place for place in divmod(number, ipc))
        assert (grid[row:row + size, column:column + size] == image).all()


def test_the_log_holds_the_arguments_and_then_every_term_of_the_loss(chain):
    project, results, _ = chain
    first, *entries = project.log(f"gvbsm-ipc{results['recover']['ipc']}")
    assert first == {"args": results["recover"]["args"]}
    batches = -(-len(project.classes) * results["recover"]["ipc"] // 4)
    steps = [(*entry["batches"], entry["iteration"]) for entry in entries]
    assert steps == [(n, t) for n in range(batches) for t in range(6)]
    assert all(list(entry) == ["iteration", "batches", "backbone", "ce", "bn", "conv", "dd", "gradient"]
               for entry in entries)


def test_the_log_has_every_hundredth_of_all_iterations_and_the_last(project):
    project.call("recover", "--iterations 202 --batch-size 8 --backbones convnet_w8")
    assert [entry["iteration"] for entry in project.log()[1:]] == [*range(0, 202, 2), 201]


# The same every time

def test_the_same_seeds_give_the_same_bytes(relabelled, new_project):
    again = new_project(relabelled.dataset)
    again.chain()
    relabelled.call("train_eval")
    for phase in PHASES:
        assert made(again, phase) == made(relabelled, phase)


@pytest.mark.parametrize("phase", PHASES)
def test_another_seed_gives_other_results_from_the_same_inputs(phase, relabelled):
    relabelled.call("train_eval")
    before = made(relabelled, phase)
    relabelled.call(phase, "--overwrite", "--student-seeds 1" if phase == "train_eval" else "--seed 1")
    after = made(relabelled, phase)
    assert after.keys() == before.keys() and all(after[key] != before[key] for key in after)


@pytest.mark.parametrize("phase", PHASES)
def test_a_finished_phase_repeats_its_result_and_touches_nothing(phase, relabelled):
    relabelled.call("train_eval")
    first = relabelled.call(phase)
    before = relabelled.files()
    assert relabelled.call(phase, "--workers 1") == first and relabelled.files() == before
    assert "already done" in relabelled.printed


def test_a_phase_does_only_the_backbones_or_students_that_are_missing(bare, squeezed):
    bare.call("squeeze", "--backbones wrn10_1")
    bare.call("collect_stats", "--backbones wrn10_1")
    before = bare.files()
    assert bare.call("squeeze")["top1"].keys() == {"convnet_w8", "wrn10_1"}
    assert bare.call("collect_stats")["convolutions"] == {"convnet_w8": 3, "wrn10_1": 9}
    after = bare.files()
    assert all(after[file] == before[file] for file in before if file.endswith(".pt"))
    for phase in "squeeze", "collect_stats":
        assert made(bare, phase) == made(squeezed, phase)


def test_a_finished_phase_repeats_the_result_of_the_backbones_it_was_asked_for(project):
    for phase, metric in ("squeeze", "top1"), ("collect_stats", "convolutions"):
        project.call(phase, "--backbones wrn10_1")
        assert list(project.call(phase, "--backbones convnet_w8")[metric]) == ["convnet_w8"]


# the second batch
@pytest.mark.parametrize("module, name, call", [(recover, "matching_gradient", 9), (recorder, "save_png", 6)])
def test_an_interrupted_recovery_goes_on_as_if_nothing_had_happened(module, name, call, project, interrupt,
                                                                    monkeypatch):
    project.call("recover", "--tag whole")
    with monkeypatch.context(), pytest.raises(InterruptedError):
        interrupt(module, name, call)
        project.call("recover")
    monkeypatch.undo()
    first = {file: content for file, content in project.files().items() if "/10/" in file or "/9/" in file}
    assert len(first) == 8 and not (project.run() / "result.json").exists()
    project.call("recover")
    assert first.items() <= project.files().items()
    assert made(project, "recover") == made(project, "recover", f"{RUN}-whole")
    assert not [file for file in project.files() if file.endswith(".tmp")]


def test_with_ema_carry_the_averages_of_a_batch_start_from_those_of_the_batch_before(project, monkeypatch):
    started, ended, whole = [], [], recover.recover_batch

    def recording(*args, averages, **more):
        started.append(averages)
        for t, losses, state in whole(*args, averages=averages, **more):
            yield t, losses, state
        ended.append(state()["averages"])

    monkeypatch.setattr(recover, "recover_batch", recording)
    project.call("recover", "--tag anew")
    assert started == [None, None]
    project.call("recover", "--ema-carry --groups-per-step 2")                # still one after another
    assert len(started) == 4 and started[2] is None
    for mine, before in zip(started[3], ended[2], strict=True):               # of each backbone
        assert all(map(torch.equal, mine, before)) and mine[0].abs().sum() > 0 and mine[1].any()
    anew, carried = project.images(f"{RUN}-anew"), project.images()
    assert np.array_equal(anew[:4], carried[:4]) and not np.array_equal(anew[4:], carried[4:])


@pytest.mark.slow
@pytest.mark.parametrize("minutes", [0, 5])
@pytest.mark.parametrize("module, name, call", [
    (recover, "matching_gradient", 9),                                        # in the second batch
    (recorder, "save_png", 1), (recorder, "save_png", 5)])                    # between averages and images
def test_an_interrupted_recovery_with_ema_carry_ends_with_the_same_bytes(module, name, call, minutes, project,
                                                                        interrupt, monkeypatch):
    flags = f"--ema-carry --checkpoint-minutes {minutes}"
    project.call("recover", "--tag whole", flags)
    with monkeypatch.context(), pytest.raises(InterruptedError):
        interrupt(module, name, call)
        project.call("recover", flags)
    monkeypatch.undo()
    project.call("recover", flags)
    assert made(project, "recover") == made(project, "recover", f"{RUN}-whole")


@pytest.mark.slow
@pytest.mark.parametrize("phase, name, call, kept", [
    ("squeeze", "save_torch", 2, "convnet_w8.pt"), ("collect_stats", "save_torch", 2, "convnet_w8.stats.pt"),
    ("relabel", "label_epoch", 2, None), ("train_eval", "train_student", 2, "convnet_w8.json")])
def test_an_interrupted_phase_goes_on_as_if_nothing_had_happened(phase, name, call, kept, bare, interrupt,
                                                                 monkeypatch):
    flags = "--students convnet_w8 wrn10_1" * (phase == "train_eval")
    for earlier in list(PHASES)[:list(PHASES).index(phase)]:
        bare.call(earlier)
    before = bare.files()
    with pytest.raises(InterruptedError):
        interrupt(PHASES[phase], name, call)
        bare.call(phase, flags)
    monkeypatch.undo()
    halfway = {file: content for file, content in bare.files().items()
               if content and file not in before and ".unfinished/" not in file}
    assert [file.rpartition("/")[2] for file in halfway] == [kept] * bool(kept)
    bare.call(phase, flags)
    assert halfway.items() <= bare.files().items()
    finished = made(bare, phase)
    bare.call(phase, flags, "--overwrite")
    assert made(bare, phase) == finished


def test_overwrite_starts_again(project):
    project.call("recover", "--tag fresh --iterations 3")
    project.call("recover")
    Image.new("RGB", (16, 16)).save(project.run() / "images" / "ant" / "00000.png")
    project.call("recover", "--iterations 3 --overwrite")
    assert made(project, "recover") == made(project, "recover", f"{RUN}-fresh")
    first, *entries = project.log()
    assert first["args"]["iterations"] == 3 and len(entries) == 2 * 3


# recover: the terms of the loss, and what moves the pixels

@pytest.fixture
def passes(monkeypatch):
    """What recover.py does: for each pass its labels [G, B], and for each iteration the draw, the pixels and
    the images under it [G, B, 3, S, S], and the dropped layers."""
    passes, loop, view = [], recover.recover_batch, recover.apply_view

    def recover_batch(pixels, labels, *rest, **settings):
        passes.append((labels.clone(), []))
        yield from loop(pixels, labels, *rest, **settings)

    def apply_view(images, draw):
        after = view(images, draw)
        pixels, seen = (x.detach().clone().unflatten(1, (-1, 3)) for x in (images, after))
        passes[-1][1].append(SimpleNamespace(draw=draw, pixels=pixels, images=seen))
        return after

    def watch(matching):
        hooks = matching.hooks

        def watched(self, dropped=()):
            passes[-1][1][-1].dropped = set(dropped)
            return hooks(self, dropped)
        monkeypatch.setattr(matching, "hooks", watched)

    monkeypatch.setattr(recover, "recover_batch", recover_batch)
    monkeypatch.setattr(recover, "apply_view", apply_view)
    watch(ClosedFormMatching)
    watch(Matching)
    return passes


def inputs_and_logits(model, images):
    inputs = {}
    handles = [layer.register_forward_pre_hook(lambda _, args,
                                               name=name: inputs.update({name: args[0].clone()}))
               for name, layer in model.named_modules() if isinstance(layer, (nn.Conv2d, nn.BatchNorm2d))]
    logits = model(images)
    for handle in handles:
        handle.remove()
    return inputs, logits


def moments(x, patch):
    """Channel mean, channel variance, patch mean, patch variance, cell by cell; sides are multiples of
    patch."""
    cells = [cell for row in x.split(patch, dim=2) for cell in row.split(patch, dim=3)]
    return [x.mean((0, 2, 3)), x.var((0, 2, 3), correction=0), torch.stack([cell.mean() for cell in cells]),
            torch.stack([cell.var(correction=0) for cell in cells])]


def densification(pixels, labels, tau, scale):
    loss = 0
    for label in labels.unique():
        rows = pixels[labels == label].flatten(1).double()
        values = torch.linalg.eigvalsh(rows @ rows.T / (rows.shape[1] if scale == "mean" else 1))
        soft, sharp = (values / tau).log_softmax(0), values.log_softmax(0)
        loss += (soft.exp() * (soft - sharp)).sum().item()
    return loss


def loss_terms(project, args, passes, entries):
    """The terms of the loss in each logged iteration, by slow loops over layers and patches; one batch a
    pass."""
    folder = project.results / "teachers" / args["teachers"]
    models, entries = teachers(project, *args["backbones"], folder=folder), iter(entries)
    stored = {name: checkpoint(folder / f"{name}.stats.pt") for name in models}
    for (labels,), steps in passes:
        averages = {}
        for step in steps:
            name = next(entries)["backbone"]
            inputs, logits = inputs_and_logits(models[name], step.images[0])
            terms = {"ce": nn.functional.cross_entropy(logits, labels).item(), "bn": 0,
                     "conv": 0,
                     "dd": args["dd_weight"] * densification(step.pixels[0], labels, 4.0, args["dd_scale"])}
            matched = [layer for layer in inputs if args["conv_weight"] or not isinstance(
                models[name].get_submodule(layer), nn.Conv2d)]
            for layer, x in inputs.items():
                module, values = models[name].get_submodule(layer), moments(x, stored[name]["patch"])
                if isinstance(module, nn.BatchNorm2d):
                    kind, targets, values = "bn", (module.running_mean, module.running_var), values[:2]
                else:
                    kind, targets = "conv", stored[name]["statistics"][layer]
                if layer in step.dropped:
                    continue
                weight = args[f"{kind}_weight"] * (args["first_multiplier"] if [layer] == matched[:1] else 1)
                for i, (value, target) in enumerate(zip(values, targets, strict=True)):
                    past = averages.get((name, layer, i), value)
                    average = averages[name, layer, i] = args["alpha"] * past + (1 - args["alpha"]) * value
                    terms[kind] += weight * (average - target).norm().item()
            yield terms


RECOVER = [
    "", "--alpha 0", "--alpha 0.4", "--alpha 1", "--drop-rate 0", "--drop-rate 1", "--bn-weight 0",
    "--bn-weight 1", "--conv-weight 0", "--conv-weight 1", "--bn-weight 0 --conv-weight 0",
    "--dd-weight 0", "--dd-weight 3", "--dd-scale sum --crop none", "--first-multiplier 1", "--loop original",
    "--loop original --batch-size 3", "--choice cycle", "--unit-gradients", "--ipc 1", "--ipc 3", "--ipc 5",
    "--crop none", "--crop pad2",
    "--flip --roll 4", "--backbones wrn10_1", "--backbones convnet_w8",
    "--backbones convnet_w8 --drop-rate 1"]


@pytest.mark.parametrize("flags", [pytest.param(flags, marks=[pytest.mark.slow] * (i % 6 > 0)) for i,
                                   flags in enumerate(RECOVER)])
def test_the_logged_terms_are_the_equations_and_both_gradients_give_the_same_images(flags, project, passes,
                                                                                    double):
    # the sum's gradient outside the crop is mere rounding, of which Adam makes steps
    scale = "--dd-scale mean"
    result = project.call("recover", "--tag closed", scale, flags)
    run = f"gvbsm-ipc{result['ipc']}"
    closed = project.log(f"{run}-closed")[1:]
    expected = list(loss_terms(project, result["args"], passes, closed))
    assert len(closed) == len(expected) > 0
    for entry, terms in zip(closed, expected, strict=True):
        assert {term: entry[term] for term in terms} == pytest.approx(terms, rel=1e-6, abs=1e-9)
    project.call("recover", "--tag plain --statistics plain", scale, flags)
    assert (project.images(f"{run}-plain") == project.images(f"{run}-closed")).all()


@pytest.mark.parametrize("flags, term", [
    ("--bn-weight 0", "bn"), ("--conv-weight 0", "conv"), ("--dd-weight 0", "dd"),
    ("--ipc 1", "dd"), ("--drop-rate 1", "conv"), ("--backbones convnet_w8", "bn"),
    ("--loop original", "dd")])
def test_a_term_that_is_off_is_exactly_zero_and_the_others_are_not(flags, term, project):
    result = project.call("recover", "--dd-scale mean --drop-rate 0", flags)
    with_bn = [entry for entry in project.log(f"gvbsm-ipc{result['ipc']}")[1:]
               if entry["backbone"] == "wrn10_1" or term == "bn"]
    assert with_bn
    assert all([name for name in ("ce", "bn", "conv", "dd") if entry[name] == 0] == [term]
               for entry in with_bn)


@pytest.mark.slow
@pytest.mark.parametrize("flags", [
    "--alpha 0", "--drop-rate 0", "--drop-rate 1", "--bn-weight 0", "--conv-weight 0",
    "--dd-scale mean", "--first-multiplier 1", "--loop original", "--choice cycle", "--unit-gradients",
    "--backbones wrn10_1",
    "--crop none", "--crop pad2", "--flip", "--roll 4", "--batch-size 8", "--lr 0.01", "--iterations 5",
    "--seed 1", "--precision bf16"])
def test_each_flag_changes_the_images(flags, relabelled):
    relabelled.call("recover", "--tag other", flags)
    assert (relabelled.images() != relabelled.images(f"{RUN}-other")).any()


def test_images_start_as_noise_of_their_own_and_do_not_move_at_learning_rate_0(project):
    project.call("recover", "--lr 0")
    project.call("recover", "--lr 0 --loop original --batch-size 3 --ipc 3")
    still = project.images("gvbsm-ipc3").reshape(4, 3, 16, 16, 3)[:, :2].reshape(8, 16, 16, 3)
    assert (project.images() == still).all() and len({image.tobytes() for image in still}) == 8
    data = checkpoint(project.teachers / "convnet_w8.pt")["data"]
    start = torch.stack([recover.noise(label, index, 16, seed=0) for label in range(4) for index in range(2)])
    assert (to_uint8(start, data["mean"], data["std"]).permute(0, 2, 3, 1).numpy() == still).all()
    project.call("recover", "--lr 0 --tag other --seed 1")
    assert (project.images(f"{RUN}-other") != still).any((1, 2, 3)).all()
    assert start.mean() == pytest.approx(0, abs=0.05) and start.std() == pytest.approx(1, abs=0.05)


@pytest.mark.slow
def test_backbones_take_turns_or_are_drawn_alike_for_every_batch(project):
    for choice in "cycle", "uniform":
        project.call("recover", f"--tag {choice} --choice {choice} --iterations 40")
        names = [entry["backbone"] for entry in project.log(f"{RUN}-{choice}")[1:]]
        assert names[:40] == names[40:]
        assert (names[:40] == ["convnet_w8", "wrn10_1"] * 20) == (choice == "cycle")
        assert 10 <= names[:40].count("wrn10_1") <= 30


@pytest.mark.slow
@pytest.mark.parametrize("rate", [0, 0.4, 1])
def test_convolutions_alone_are_dropped_at_their_rate_alike_for_every_batch(rate, project, passes):
    project.call("recover", f"--backbones wrn10_1 --iterations 40 --drop-rate {rate}")
    convolutions = set(checkpoint(project.teachers / "wrn10_1.stats.pt")["statistics"])
    first, second = ([step.dropped for step in steps] for _, steps in passes)
    assert first == second and set().union(*first) == (convolutions if rate else set())
    share = sum(map(len, first)) / (40 * len(convolutions))
    assert abs(share - rate) <= (0.1 if 0 < rate < 1 else 0)


@pytest.mark.slow
@pytest.mark.parametrize("flags, keys", [
    ("--crop none", set()), ("--crop pad2", {"shift"}), ("--crop resized", {"crop"}),
    ("--crop none --flip", {"flip"}),
    ("--crop none --roll 3", {"roll"}), ("--crop pad2 --flip --roll 3", {"shift", "flip", "roll"})])
def test_a_batch_is_seen_under_one_view_of_its_own(flags, keys, project, passes):
    project.call("recover", "--iterations 30", flags)
    first, second = ([step.draw for step in steps] for _, steps in passes)
    assert all(draw.keys() == keys and all(len(value) == 1 for value in draw.values()) for draw in first
               + second)
    draws = {key: torch.cat([draw[key] for draw in first]) for key in keys}
    assert all(not torch.equal(draws[key], torch.cat([draw[key] for draw in second])) for key in keys)
    for key, bounds in ("shift", (-2, 2)), ("roll", (0, 3)), ("flip", (0, 1)):
        assert key not in keys or (draws[key].min(), draws[key].max()) == bounds
    changed = [not torch.equal(step.images, step.pixels) for _, steps in passes for step in steps]
    assert any(changed) == bool(keys)


@pytest.mark.slow
@pytest.mark.parametrize("flags, shapes", [
    ("--ipc 3", [(3, 3), (1, 3)]), ("--ipc 5", [(1, 4), (1, 1)] * 4),
    ("--ipc 2 --batch-size 3", [(3, 2), (1, 2)]),
    ("--ipc 3 --loop original", [(3, 4)]), ("--ipc 3 --loop original --batch-size 3", [(1, 3), (1, 1)] * 3)])
def test_batches_that_share_a_pass_end_as_they_do_alone(flags, shapes, project, passes):
    ipc = project.call("recover", "--tag together --groups-per-step 3", flags)["ipc"]
    assert [tuple(labels.shape) for labels, _ in passes] == shapes
    project.call("recover", "--tag alone", flags)
    together, alone = (project.images(f"gvbsm-ipc{ipc}-{tag}") for tag in ("together", "alone"))
    assert len(together) == 4 * ipc and abs(together - alone).max() <= 1


@pytest.mark.parametrize("loop, batches", [("reorder", [[0, 0, 1, 1], [2, 2, 3, 3]]),
                                           ("original", [[0, 1, 2, 3]] * 2)])
def test_a_batch_holds_whole_classes_or_one_image_of_each(loop, batches, project, passes):
    project.call("recover", f"--loop {loop}")
    assert [labels[0].tolist() for labels, _ in passes] == batches


def test_other_teachers_and_other_patches_are_what_the_images_match(project, passes):
    other = project.results / "teachers" / "other"
    project.call("squeeze", "--teachers other --epochs 1")
    project.call("collect_stats", "--teachers other --patch 2")
    result = project.call("recover", "--teachers other")
    terms = list(loss_terms(project, result["args"], passes, project.log()[1:]))
    assert [entry["conv"] for entry in project.log()[1:]] == [pytest.approx(term["conv"], 1e-3)
                                                              for term in terms]
    assert len(checkpoint(other / "convnet_w8.stats.pt")["statistics"]["0"][2]) == 64
    upstream = result["upstream"]
    assert upstream["squeeze"]["wrn10_1"]["epochs"] == 1
    assert upstream["collect_stats"]["wrn10_1"]["patch"] == 2


def test_recover_hands_every_flag_to_its_loop(project, monkeypatch):
    told, batches = {}, []

    def noting(name):
        function = getattr(recover, name)

        def noted(*args, **how):
            batches.extend([how["batches"]] if "batches" in how else [])
            told.update(how)
            return function(*args, **how)
        monkeypatch.setattr(recover, name, noted)

    for name in "make_matchers", "draw_iterations", "recover_batch":
        noting(name)
    flags = {"alpha": 0.3, "bn_weight": 0.2, "conv_weight": 0.3, "first_multiplier": 2.0, "drop_rate": 0.7,
             "choice": "cycle", "subset": 1, "crop": "pad2", "roll": 3, "lr": 0.02, "weight_decay": 0.1,
             "dd_weight": 3.0, "dd_scale": "mean", "dd_on": "view", "seed": 4}
    words = " ".join(f"--{flag.replace('_', '-')} {value}" for flag, value in flags.items())
    project.call("recover", words, "--flip --unit-gradients --iterations 2")
    assert {flag: told[flag] for flag in flags} == flags and told["flip"] is told["unit_gradients"] is True
    assert [list(numbers) for numbers in batches] == [[0], [1]]


# recover --method random

def test_random_takes_distinct_training_images_of_the_class_and_needs_no_teachers(bare):
    bare.call("recover", "--method random --ipc 5")
    for name in bare.classes:
        originals, chosen = ([np.asarray(Image.open(file)).tobytes() for file in (folder / name).iterdir()]
                             for folder in (bare.dataset / "train", bare.run("random-ipc5") / "images"))
        assert len(chosen) == len(set(chosen)) == 5 and set(chosen) <= set(originals)
    bare.call("recover", "--method random --ipc 5 --tag other --seed 1")
    assert (bare.images("random-ipc5") != bare.images("random-ipc5-other")).any((1, 2, 3)).sum() > 5


def test_random_images_go_through_the_same_phases(project):
    result = project.chain("--method random", first="recover")["train_eval"]
    assert result["method"] == result["upstream"]["recover"]["method"] == "random"
    assert (project.run("random-ipc2") / "eval/convnet_w8.json").exists()


# squeeze and collect_stats

def test_the_accuracy_of_a_backbone_is_that_of_its_weights_on_the_test_images(project):
    result = project.call("squeeze", "--teachers trained --epochs 8")
    test = ImageFolder(project.dataset / "test")
    images = network_input(project, np.stack([np.asarray(image) for image, _ in test]))
    for name, model in teachers(project, "convnet_w8", "wrn10_1",
                                folder=project.results / "teachers/trained").items():
        right = (model(images).argmax(1) == torch.tensor(test.targets)).float().mean().item()
        assert result["top1"][name] == pytest.approx(100 * right)
    assert result["top1"]["convnet_w8"] > 60                                            # of four classes


@pytest.mark.slow
@pytest.mark.parametrize("flags", [
    "--crop none", "--crop resized", "--epochs 3", "--batch-size 8", "--lr 0.1", "--momentum 0",
    "--weight-decay 0.1", "--schedule cosine", "--precision bf16"])
def test_each_flag_of_squeeze_changes_the_weights(flags, project):
    project.call("squeeze", "--teachers other", flags)
    for name, model in teachers(project, "convnet_w8", "wrn10_1",
                                folder=project.results / "teachers/other").items():
        assert any(not torch.equal(mine, before) for mine, before in zip(
            model.state_dict().values(), checkpoint(project.teachers / f"{name}.pt")["weights"].values(),
            strict=True))


def test_weights_start_from_the_seed(project):
    for seed in 0, 1:
        project.call("squeeze", f"--teachers start{seed} --lr 0 --seed {seed} --backbones convnet_w8")
    first, second = (checkpoint(project.results / f"teachers/start{seed}/convnet_w8.pt")["weights"]
                     for seed in (0, 1))
    assert not torch.equal(first["0.weight"], second["0.weight"])


def test_a_backbone_does_not_depend_on_which_others_are_trained_beside_it(project):
    project.call("squeeze", "--teachers alone --backbones wrn10_1")
    alone, beside = (checkpoint(project.results / "teachers" / name / "wrn10_1.pt")["weights"]
                     for name in ("alone", "supervised"))
    assert all(torch.equal(alone[key], beside[key]) for key in beside)


def test_pretrained_weights_come_from_torchs_hub_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", None)  # nothing may be fetched
    saved, model = (build_model("shufflenetv2_05", 1000, 224) for _ in range(2))
    (tmp_path / "checkpoints").mkdir()
    torch.save(saved.state_dict(), tmp_path / "checkpoints" / "shufflenetv2_x0.5-f707e7126e.pth")
    squeeze.load_pretrained("shufflenetv2_05", model, download=False)
    assert all(torch.equal(mine, theirs) for mine,
               theirs in zip(model.parameters(), saved.parameters(), strict=True))


def last_sums(model, batches):
    """The sums of Eq. 9 after all batches of images."""
    state = collect_stats.EMPTY
    for state in collect_stats.sum_statistics(model, ((x, None) for x in batches), 4):
        pass
    return state


@pytest.mark.parametrize("name, sizes", [("convnet_w8", (20, 20, 8)), ("wrn10_1", (7, 7, 7, 1))])
def test_dataset_statistics_are_the_average_of_batches_by_their_size(name, sizes, project):
    model = teachers(project, name)[name]
    batches = [torch.randn(size, 3, 16, 16) * (i + 1) for i, size in enumerate(sizes)]
    before = {key: value.clone() for key, value in model.state_dict().items()}
    parts = [last_sums(model, part) for part in (batches[::2], [], batches[1::2])]
    found, total = collect_stats.dataset_statistics(parts), sum(sizes)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    inputs = [inputs_and_logits(model, batch)[0] for batch in batches]
    convolutions = [layer for layer, module in model.named_modules() if isinstance(module, nn.Conv2d)]
    assert list(found) == convolutions
    for layer in convolutions:
        slow = [sum(size * values for size, values in zip(sizes, kind)) / total
                for kind in zip(*(moments(batch[layer], 4) for batch in inputs))]
        for mine, theirs in zip(found[layer], slow, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
        mean, var, patch_mean, patch_var = moments(torch.cat([batch[layer] for batch in inputs]), 4)
        torch.testing.assert_close(found[layer][0], mean, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found[layer][2], patch_mean, rtol=1e-4, atol=1e-5)
        assert (found[layer][1] < var).all() and (found[layer][3] < patch_var).all()  # as the script says


def test_the_stored_statistics_are_of_the_augmented_training_images_in_eval_mode(project, record):
    views = record(collect_stats, "normalize")
    result = project.call("collect_stats", "--overwrite --backbones wrn10_1 --crop none")
    images = [view[-1] for view in views]
    assert [len(batch) for batch in images] == [20, 20, 8] and result["convolutions"] == {"wrn10_1": 9}
    train = ImageFolder(project.dataset / "train")
    plain = network_input(project, np.stack([np.asarray(image) for image, _ in train]))
    seen, once, mirrored = ({image.numpy().tobytes() for image in batch}
                            for batch in (torch.cat(images), plain, plain.flip(-1)))
    assert len(seen) == 48 and seen <= once | mirrored and seen & once and seen & mirrored
    stored = checkpoint(project.teachers / "wrn10_1.stats.pt")["statistics"]
    model = channels_last(teachers(project, "wrn10_1")["wrn10_1"])
    again = collect_stats.dataset_statistics([last_sums(model, images)])
    for layer in again:
        assert all(torch.equal(mine, theirs) for mine,
                   theirs in zip(stored[layer], again[layer], strict=True))


def test_statistics_are_measured_in_float32_whatever_the_networks_precision(project, record):
    measured, first = record(collect_stats, "conv_stats"), made(project, "collect_stats")
    for crop in "pad2", "resized":
        project.call("collect_stats", f"--overwrite --precision bf16 --crop {crop}")
        assert made(project, "collect_stats") != first
    assert {call[0].dtype for call in measured} == {torch.float32}
    project.call("collect_stats", "--overwrite --crop none")
    assert made(project, "collect_stats") != first
    project.call("collect_stats", "--overwrite")
    assert made(project, "collect_stats") == first


# squeeze

def test_a_backbone_is_what_sgd_on_crops_and_flips_gives(project):
    """Written down again: step by step, from the same draws."""
    project.call("squeeze", "--backbones convnet_w8 --epochs 3 --batch-size 20 --lr 0.02 --momentum 0.8",
                 "--weight-decay 0.05 --schedule cosine --warmup-epochs 1 --crop pad2 --teachers slow --seed 3")
    stored = checkpoint(project.results / "teachers/slow/convnet_w8.pt")
    split = load_split(str(project.dataset), None, "train")
    torch.manual_seed(generator("weights", 3, "convnet_w8").initial_seed())
    model = build_model("convnet_w8", 4, 16)
    moving = [torch.zeros_like(parameter) for parameter in model.parameters()]
    for epoch, rate in enumerate((0.0002, 0.02, 0.01)):
        rng = generator("squeeze", 3, epoch)
        for batch in torch.randperm(48, generator=rng).split(20):
            view = draw_view(len(batch), 16, "pad2", True, 0, rng)
            images = apply_view(split.images[batch].float(), view)
            logits = model(normalize(images, stored["data"]["mean"], stored["data"]["std"]))
            loss = nn.functional.cross_entropy(logits, split.labels[batch])
            slopes = torch.autograd.grad(loss, list(model.parameters()))
            with torch.no_grad():
                for weight, slope, past in zip(model.parameters(), slopes, moving):
                    past.mul_(0.8).add_(slope + 0.05 * weight)
                    weight -= rate * past
    for name, weight in model.state_dict().items():
        torch.testing.assert_close(stored["weights"][name], weight, rtol=1e-4, atol=1e-5)


# relabel

def test_the_labels_are_float16_logits_and_a_row_of_draws_for_every_mixed_sample(relabelled):
    found = {name: (array.dtype.name, array.shape) for name, array in labels(relabelled).items()}
    assert found == {"logits": ("float16", (3, 8, 4)), "crop": ("int16", (3, 8, 4)), "flip": ("bool", (3, 8)),
                     "partner": ("int32", (3, 8)), "box": ("int16", (3, 8, 4)), "ratio": ("float32", (3, 8))}


@pytest.mark.parametrize("mix", ["cutmix", "mixup", "none"])
def test_replaying_the_stored_draws_shows_the_teachers_what_they_labelled(mix, recovered):
    recovered.call("relabel", f"--no-logit-norm --mix {mix} --whole-up-to 0 --batch-size 3")
    stored, images = labels(recovered), network_input(recovered, recovered.images())
    models = teachers(recovered, "convnet_w8", "wrn10_1").values()
    for epoch, size in itertools.product(range(3), (1, 3, 8)):
        kinds = {"crop": int, "flip": bool, "partner": int, "box": int, "ratio": np.float32}
        draw = {name: torch.from_numpy(stored[name][epoch].astype(kind)) for name, kind in kinds.items()}
        mixed = torch.cat([apply_epoch(images, draw, index, mix) for index in torch.arange(8).split(size)])
        logits = torch.stack([model(mixed) for model in models]).mean(0)
        np.testing.assert_allclose(stored["logits"][epoch], logits, rtol=FP16, atol=FP16)
    ratio, area = stored["ratio"], stored["box"][..., 2] * stored["box"][..., 3] / 256
    assert (stored["partner"] == np.arange(8)).all() == (mix == "none") and (ratio == 1).all() == (mix
                                                                                                   == "none")
    assert (area > 0).any() == (mix == "cutmix") and (mix == "mixup" or np.allclose(ratio, 1 - area))
    assert len(set(map(bytes, stored["crop"]))) == len(set(map(bytes, stored["flip"]))) == 3  # epochs differ


@pytest.mark.parametrize("norm", [False, True])
def test_the_ensembles_labels_are_eq_8_of_the_single_backbones_labels(norm, recovered):
    single = []
    for backbones in "convnet_w8 wrn10_1", "convnet_w8", "wrn10_1":
        recovered.call("relabel", f"--overwrite --backbones {backbones}",
                     "--logit-norm" if norm else "--no-logit-norm", "--images", recovered.run() / "images")
        single.append(labels(recovered)["logits"].astype(np.float64))
    ensemble, *single = single
    for epoch in range(3):  # the whole set is one batch
        norms = [np.linalg.norm(logits[epoch]) if norm else 1 for logits in single]
        expected = np.mean([logits[epoch] * np.mean(norms) / own for logits, own in zip(single, norms)], 0)
        np.testing.assert_allclose(ensemble[epoch], expected, rtol=3 * FP16, atol=3 * FP16)
    assert not 1 / 1.2 < np.linalg.norm(single[0]) / np.linalg.norm(single[1]) < 1.2    # else LN does nothing


def test_the_norms_of_eq_8_are_those_of_a_label_batch_or_of_a_whole_small_set(recovered):
    images, models = network_input(recovered, recovered.images()), teachers(recovered, "convnet_w8",
                                                                        "wrn10_1").values()
    for whole, size in (0, 3), (7, 3), (8, 8):
        assert recovered.call("relabel",
                            f"--overwrite --batch-size 3 --whole-up-to {whole}")["label_batch"] == size
        draw = draw_epoch(8, 16, size, "cutmix", generator("relabel", 0, 2))
        for batch in draw["order"].split(size):
            each = torch.stack([model(apply_epoch(images, draw, batch, "cutmix")) for model in models])
            norms = each.flatten(1).norm(dim=1)
            expected = (each * (norms.mean() / norms)[:, None, None]).mean(0)
            np.testing.assert_allclose(labels(recovered)["logits"][2, batch], expected, rtol=FP16, atol=FP16)


def test_no_crop_of_labels_is_smaller_than_the_floor(recovered):
    for floor, low, high in (0.08, 0, 0.2), (0.5, 0.45, 0.6):
        recovered.call("relabel", f"--epochs 20 --crop-floor {floor} --overwrite")
        assert low < labels(recovered)["crop"][..., 2:].prod(-1).min() / 16 ** 2 < high
    args = SimpleNamespace(mix="none", seed=0, crop_floor=1.0, batch_size=8, whole_up_to=0, flip=False)
    draw = draw_labels(args, 16, 8, 0)
    assert draw["crop"].tolist() == 8 * [[0, 0, 16, 16]] and not draw["flip"].any()


def test_the_memory_that_labelling_takes_does_not_grow_with_the_epochs(tmp_path):
    images, mean_std = torch.zeros(50, 3, 8, 8, dtype=torch.uint8), torch.ones(2, 3)
    model = build_model("convnet_w8", 40, 8).eval()
    peaks = []
    for epochs in 25, 125:                                           # the first ones fill caches
        writer = LabelWriter(tmp_path / str(epochs), epochs, 50, 40)
        writer.create()
        tracemalloc.start()  # numpy's arrays, not torch's tensors
        for epoch in range(epochs):
            draw = draw_epoch(50, 8, 50, "cutmix", generator("relabel", 0, epoch))
            writer.write(epoch, relabel.label_epoch(images, mean_std, draw, 50, [model], "cutmix", True),
                         draw)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert np.load(tmp_path / str(epochs) / "logits.npy").shape == (epochs, 50, 40)
    assert peaks[1] - peaks[0] < 0.2 * 100 * 50 * (8 + 1 + 4 + 8 + 4)  # of what is drawn in 100 epochs


@pytest.mark.parametrize("together", [2, 9])
def test_labels_are_the_same_up_to_rounding_whatever_goes_through_the_models_at_once(together):
    images = torch.randint(256, (20, 3, 16, 16), dtype=torch.uint8, generator=generator("images"))
    units, draw = torch.tensor([[0.5] * 3, [0.25] * 3]), draw_epoch(20, 16, 6, "cutmix", generator("relabel"))
    models = [build_model(name, 4, 16).eval() for name in ("convnet_w8", "wrn10_1")]
    one, many = (relabel.label_epoch(images, units, draw, 6, models, "cutmix", True, n)
                 for n in (1, together))
    assert_near(many, one, 1e-5)


def test_labelling_an_epoch_waits_for_no_value_of_the_device():
    """On the device `meta` there are none, and whatever asked for one would fail."""
    images, units = torch.empty(20, 3, 16, 16, dtype=torch.uint8, device="meta"), torch.empty(2, 3,
                                                                                              device="meta")
    models = [build_model(name, 4, 16).eval().to("meta") for name in ("convnet_w8", "wrn10_1")]
    draw = draw_epoch(20, 16, 8, "cutmix", generator("relabel"))
    logits = relabel.label_epoch(images, units, draw, 8, models, "cutmix", True)
    assert logits.is_meta and logits.shape == (20, 4)


def test_labels_and_evaluation_of_images_of_any_origin(relabelled):
    foreign = relabelled.root / "foreign"
    for file in (relabelled.run() / "images").glob("*/*.png"):
        (foreign / file.parent.name).mkdir(parents=True, exist_ok=True)
        Image.open(file).save(foreign / file.parent.name / f"{file.stem}.bmp")
    result = relabelled.call("relabel", "--tag foreign --images", foreign)
    assert result["args"]["images"] == str(foreign)
    assert made(relabelled, "relabel", f"{RUN}-foreign") == made(relabelled, "relabel")
    expected = relabelled.call("train_eval")["top1_by_epoch"]
    assert relabelled.call("train_eval", "--tag foreign --images", foreign)["top1_by_epoch"] == expected
    hard = relabelled.call("train_eval", "--labels hard")["top1_by_epoch"]
    assert relabelled.call("train_eval", "--labels hard --tag nothing --images",
                           foreign)["top1_by_epoch"] == hard


# graphs

def test_a_backbone_is_the_same_when_its_steps_are_graphs(bare, new_project, monkeypatch):
    flags = "--backbones convnet_w8 --epochs 3 --batch-size 9"      # the last batch of an epoch is short
    bare.call("squeeze", flags)
    other = new_project(bare.dataset)
    graphed = faked_graphs(monkeypatch, train)
    monkeypatch.setattr(squeeze, "fail", print)                     # here is no GPU
    other.call("squeeze", flags, "--cuda-graphs")
    expected, found = (torch.load(one.teachers / "convnet_w8.pt", weights_only=True) for one in (bare, other))
    assert all(torch.equal(value, found["weights"][key]) for key, value in expected["weights"].items())
    assert torch.equal(expected["forgetting"]["events"], found["forgetting"]["events"])
    assert [one.graph.replays > 0 for one in graphed] == [True, True]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("backbone", ["convnet_w8", "wrn10_1"])
def test_a_backbone_is_the_same_up_to_rounding_when_a_gpu_replays_its_steps(backbone, bare, new_project):
    flags = f"--backbones {backbone} --epochs 2 --batch-size 10 --device cuda --precision fp32"
    other = new_project(bare.dataset)
    bare.call("squeeze", flags)
    other.call("squeeze", flags, "--cuda-graphs")
    expected, found = (torch.load(one.teachers / f"{backbone}.pt", weights_only=True)["weights"]
                       for one in (bare, other))
    for key, value in expected.items():
        assert_near(found[key].double(), value.double(), 1e-2)


@pytest.mark.parametrize("flags", ["", "--labels hard", "--loss kl", "--optimizer sgd"])
def test_a_student_is_the_same_when_its_steps_are_graphs_one_for_each_size_of_batch(flags, relabelled,
                                                                                    monkeypatch):
    flags += " --students convnet_w8 --epochs 3 --evaluations 3 --batch-size 3 --whole-up-to 0 --overwrite"
    expected = relabelled.call("train_eval", flags)["top1_by_epoch"]
    graphed = faked_graphs(monkeypatch, train, train_eval)
    monkeypatch.setattr(train_eval, "fail", print)                  # here is no GPU
    assert relabelled.call("train_eval", flags, "--cuda-graphs")["top1_by_epoch"] == expected
    # six batches of three, three of two; all but two each
    assert [one.graph.replays for one in graphed] == [4, 4, 1, 1]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("student", ["convnet_w8", "wrn10_1"])
def test_a_student_is_the_same_up_to_rounding_when_a_gpu_replays_its_steps(student, relabelled):
    flags = (f"--students {student} --epochs 3 --batch-size 3 --whole-up-to 0 --overwrite --device cuda "
             "--precision fp32")
    plain, graphed = (relabelled.call("train_eval", flags, graphs)["top1"]
                      for graphs in ("", "--cuda-graphs"))
    assert abs(plain - graphed) <= 10


# train_eval

def test_students_are_judged_by_the_last_epoch_over_seeds(relabelled):
    result = relabelled.call("train_eval", "--student-seeds 0 1 2 --epochs 3 --evaluations 3")
    runs = result["top1_by_epoch"]
    assert [list(run) for run in runs] == [["1", "2", "3"]] * 3 and result["seeds"] == [0, 1, 2]
    last = [run["3"] for run in runs]
    assert result["top1_per_seed"] == last and result["top1"] == pytest.approx(sum(last) / 3)
    assert result["top1_std"] == pytest.approx(statistics.stdev(last)) and len(set(last)) > 1
    assert result["top1_best"] == pytest.approx(sum(max(run.values()) for run in runs) / 3) != result["top1"]
    alone = relabelled.call("train_eval", "--student-seeds 2 --evaluations 3 --overwrite")
    assert alone["top1_by_epoch"] == runs[2:] and alone["top1_std"] == 0


@pytest.mark.parametrize("epochs, evaluations, expected", [(7, 3, [3, 5, 7]), (3, 5, [1, 2, 3]), (5, 1, [5])])
def test_the_evaluated_epochs_are_evenly_spaced_and_end_with_the_last(epochs, evaluations, expected,
                                                                      relabelled):
    result = relabelled.call("train_eval", f"--labels hard --epochs {epochs} --evaluations {evaluations}")
    assert [int(epoch) for epoch in result["top1_by_epoch"][0]] == expected


def test_the_accuracy_of_each_class_is_that_of_the_last_epoch_and_goes_on_with_more_seeds(relabelled):
    result = relabelled.call("train_eval", "--student-seeds 1")
    (one,), classes = result["top1_by_class"], result["classes"]
    assert len(one) == len(classes) == 4 and statistics.fmean(one) == pytest.approx(result["top1"], abs=0.01)
    more = relabelled.call("train_eval", "--student-seeds 0 1")
    assert len(more["top1_by_class"]) == 2 and one in more["top1_by_class"]


def test_class_accuracies_are_those_of_a_slow_loop():
    logits, labels = torch.randn(50, 4, generator=torch.Generator().manual_seed(0)), torch.arange(50) % 3
    split = SimpleNamespace(classes="abcd", batches=lambda _: zip(logits[..., None, None].split(7),
                                                                  labels.split(7)))
    _, found = train.split_accuracy(torch.nn.Flatten(), split, torch.tensor([4 * [0.0], 4 * [1.0]]))
    for label in range(3):
        guesses = [int(row.argmax()) for row, truth in zip(logits, labels) if truth == label]
        assert found[label] == round(100 * guesses.count(label) / len(guesses), 2)
    assert found[3] is None


def test_a_last_batch_of_one_image_joins_the_one_before():
    def sizes(count, batch_size, **how):
        _, batches = train.shuffled(torch.arange(count), batch_size, partial(generator, "order"), **how)(0)
        assert len(torch.cat(batches).unique()) == count - how.get("drop_last", False)
        return [len(batch) for batch in batches]

    assert sizes(65, 64) == [65] and sizes(66, 64) == [64, 2] and sizes(1, 64) == [1]
    assert sizes(3, 1) == [1, 1, 1] and sizes(65, 32, drop_last=True) == [32, 32]


def test_a_network_of_one_pixel_maps_trains_though_one_image_is_left_over(bare):
    bare.call("squeeze", "--backbones mobilenetv2_05 --batch-size 47 --epochs 1")


@pytest.mark.parametrize("phase, flags", [
    ("squeeze", "--backbones mobilenetv2_05 --batch-size 1 --epochs 1 --overwrite"),
    ("train_eval", "--students mobilenetv2_05 --whole-up-to 0 --batch-size 1"),
    ("train_eval", "--students mobilenetv2_05 --labels hard --protocol continual --steps 4 --orders 1")])
def test_batches_of_one_image_that_batchnorm_cannot_normalise_are_told(phase, flags, bare, capsys):
    for earlier in ("squeeze", "collect_stats", "recover", "relabel") * (phase == "train_eval"):
        bare.call(earlier, "--ipc 1 --backbones convnet_w8")
    with pytest.raises(SystemExit) as end:
        bare.call(phase, "--ipc 1 --backbones convnet_w8", flags)
    told = capsys.readouterr().err.splitlines()[-1]
    assert end.value.code == 2 and "mobilenetv2_05" in told and "one image" in told and "--batch-size" in told


def test_each_student_has_a_result_of_its_own(relabelled):
    relabelled.call("train_eval", "--students convnet_w8 wrn10_1 convnet_w16")
    lines = [json.loads(line[7:]) for line in relabelled.printed.splitlines() if line.startswith("RESULT ")]
    files = {path.stem: json.loads(path.read_text()) for path in (relabelled.run() / "eval").iterdir()}
    assert {name: file["top1"] for name, file in files.items()} == pytest.approx(
        {line["student"]: line["top1"] for line in lines}, abs=0.01) and len(lines) == 3
    relabelled.call("train_eval", "--students convnet_w16")                            # a subset is done, too
    assert relabelled.printed.count("RESULT") == 1


def test_labels_are_stored_or_asked_online_or_hard_and_kept_apart(relabelled):
    relabelled.call("train_eval")
    for kind in "online", "hard":
        assert relabelled.call("train_eval", f"--labels {kind}")["labels"] == kind
    assert {path.name for path in (relabelled.run() / "eval").iterdir()} == {
        "convnet_w8.json", "convnet_w8-online.json", "convnet_w8-hard.json"}


@pytest.mark.parametrize("mix", ["cutmix", "mixup", "none"])
def test_the_student_sees_the_same_samples_and_soft_labels_stored_or_online(mix, recovered, record):
    recovered.call("relabel", f"--mix {mix} --no-logit-norm --seed 3")
    loss, seen = record(train_eval, "mse_gt_loss"), record(train_eval, "apply_epoch")
    recovered.call("train_eval")
    recovered.call("train_eval", f"--labels online --no-logit-norm --mix {mix} --seed 3")
    recovered.call("train_eval", f"--labels hard --mix {mix} --seed 3")
    stored, online, hard = ([call[-1] for call in seen[i:i + 3]] for i in (0, 3, 6))
    assert len(seen) == 9 and len(loss) == 6
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(stored, online, hard, strict=True))
    for (_, a, y, gamma, _), (_, b, z, _, _) in zip(loss[:3], loss[3:], strict=True):
        torch.testing.assert_close(a, b, rtol=FP16, atol=FP16)
        assert torch.equal(y, z) and gamma == 0.15


def test_a_student_is_trained_on_the_stored_logits_of_its_batch(relabelled, record):
    seen = {name: record(train_eval, name) for name in ("mse_gt_loss", "kl_loss", "hard_loss", "apply_epoch")}
    relabelled.call("train_eval", "--batch-size 3 --whole-up-to 0 --gamma 0.7")
    batches, stored = [call[2] for call in seen["apply_epoch"]], labels(relabelled)["logits"]
    assert [len(batch) for batch in batches] == [3, 3, 2] * 3
    assert all(sorted(torch.cat(batches[i:i + 3]).tolist()) == list(range(8)) for i in (0, 3, 6))
    for i, (batch, (_, soft, hard, gamma, _)) in enumerate(zip(batches, seen["mse_gt_loss"], strict=True)):
        assert (soft.numpy()
                == stored[i // 3, batch]).all() and hard.tolist() == (batch // 2).tolist() and gamma == 0.7
    relabelled.call("train_eval", "--loss kl --temperature 9 --overwrite")
    assert [call[2] for call in seen["kl_loss"]] == [9.0] * 3 and len(seen["mse_gt_loss"]) == 9
    relabelled.call("train_eval", "--labels hard")
    assert len(seen["hard_loss"]) == 3 and len(seen["mse_gt_loss"]) == 9 and len(seen["kl_loss"]) == 3


def test_hard_labels_count_both_images_by_their_shares():
    logits = torch.tensor([[1.0, 2.0, 0.5], [0.0, -1.0, 3.0]])
    log_p = logits.log_softmax(1)
    loss = train_eval.hard_loss(logits, torch.tensor([0, 2]), torch.tensor([1, 2]), torch.tensor([0.25, 0.6]))
    assert loss.item() == pytest.approx(-(0.25 * log_p[0, 0] + 0.75 * log_p[0, 1] + log_p[1, 2]).item() / 2)


def test_students_train_at_the_precision_asked_for(relabelled, record):
    losses = record(train_eval, "mse_gt_loss")
    for precision in "fp32", "tf32", "bf16":
        relabelled.call("train_eval", f"--precision {precision} --overwrite")
    fp32, tf32, bf16 = (call[0] for call in losses[::3])                     # the first logits of each
    assert bf16.dtype == torch.float32 and torch.equal(fp32, tf32) and not torch.equal(fp32, bf16)
    assert_near(bf16, fp32.detach(), 0.05)


def test_weight_decay_is_for_tensors_of_two_or_more_dimensions_alone():
    model = build_model("wrn10_1", 4, 16)
    decayed, plain = train_eval.parameter_groups(model, 0.3)
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.3, 0.0)
    weights = {id(m.weight) for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))}
    assert {id(p) for p in decayed["params"]} == weights
    assert {id(p) for p in decayed["params"] + plain["params"]} == {id(p) for p in model.parameters()}
    assert len(decayed["params"] + plain["params"]) == len(list(model.parameters()))


@pytest.mark.parametrize("flags, name, options", [
    ("--optimizer sgd --momentum 0.5", "SGD", {"momentum": 0.5}),
    ("--optimizer adamw", "AdamW", {"betas": (0.9, 0.999)})])
def test_each_student_has_its_learning_rate_and_the_cosine_ends_at_zero(flags, name, options, relabelled,
                                                                        monkeypatch):
    made, kind = [], getattr(torch.optim, name)
    monkeypatch.setattr(torch.optim, name, lambda *args,
                        **kwargs: made.append(kind(*args, **kwargs)) or made[-1])
    students = ("--students convnet_w8 convnet_w16 wrn10_1 --lr 0.1 convnet_w8=0.2 wrn10_1=0.3 "
                "--weight-decay 0.01")
    for schedule, last in ("cosine", 0.0), ("constant", 1.0):
        relabelled.call("train_eval", flags, students, f"--schedule {schedule} --overwrite")
        for optimizer, lr in zip(made[-3:], (0.2, 0.1, 0.3), strict=True):
            assert optimizer.defaults["lr"] == lr
            assert options.items() <= optimizer.defaults.items()
            assert [group["weight_decay"] for group in optimizer.param_groups] == [0.01, 0.0]
            assert [group["lr"] for group in optimizer.param_groups] == [pytest.approx(last * lr,
                                                                                       abs=1e-9)] * 2
    assert len(made) == 6


def test_a_student_may_have_another_optimizer_and_weight_decay_and_its_result_tells_its_own(relabelled,
                                                                                            monkeypatch):
    made = []
    for name in "SGD", "AdamW":
        kind = getattr(torch.optim, name)
        monkeypatch.setattr(torch.optim, name, lambda *args, kind=kind,
                            **kwargs: made.append(kind(*args, **kwargs)) or made[-1])
    relabelled.call("train_eval", "--students convnet_w8 wrn10_1 --optimizer sgd wrn10_1=adamw --lr 0.1 "
                    "wrn10_1=0.001", "--weight-decay 0.01 wrn10_1=0")
    assert [type(optimizer).__name__ for optimizer in made] == ["SGD", "AdamW"]
    assert [optimizer.param_groups[0]["weight_decay"] for optimizer in made] == [0.01, 0.0]
    own = [json.loads((relabelled.run() / f"eval/{name}.json").read_text())["args"]
           for name in ("convnet_w8", "wrn10_1")]
    own = [(args["optimizer"], args["lr"], args["weight_decay"]) for args in own]
    assert own == [("sgd", ["0.1"], 0.01), ("adamw", ["0.001"], 0.0)]
    # is the same, and done
    relabelled.call("train_eval", "--students wrn10_1 --optimizer adamw --lr 0.001 --weight-decay 0")
    assert "already done" in relabelled.printed


def test_a_stretched_cosine_is_the_start_of_a_longer_one(relabelled, monkeypatch):
    made, kind = [], torch.optim.AdamW
    monkeypatch.setattr(torch.optim, "AdamW", lambda *args,
                        **kwargs: made.append(kind(*args, **kwargs)) or made[-1])
    for stretch in 1.5, 2, 4:
        relabelled.call("train_eval", f"--optimizer adamw --lr 0.1 --lr-stretch {stretch} --overwrite")
        assert made[-1].param_groups[0]["lr"] == pytest.approx(0.05 * (1 + math.cos(math.pi / stretch)))


def test_the_labels_of_the_first_epochs_come_again_and_are_all_that_is_needed(relabelled, record):
    seen, loss = record(train_eval, "apply_epoch"), record(train_eval, "mse_gt_loss")
    relabelled.call("relabel", "--epochs 2 --overwrite")
    assert "--label-epochs 2" in relabelled.mistake("train_eval", "--epochs 5")
    assert "--label-epochs 3" in relabelled.mistake("train_eval", "--epochs 5 --label-epochs 3")
    relabelled.call("train_eval", "--epochs 5 --label-epochs 2")
    stored, views = labels(relabelled), [call[1] for call in seen]
    for epoch, (view, batch, (_, soft, *_)) in enumerate(zip(views, [call[2] for call in seen], loss,
                                                             strict=True)):
        assert (soft.numpy() == stored["logits"][epoch % 2, batch]).all()
        assert (view["crop"].numpy() == stored["crop"][epoch % 2]).all()


def test_the_averaged_weights_are_those_of_a_slow_loop_and_they_are_tested(relabelled, monkeypatch):
    students, steps, tested = [], [], []

    def weights():
        return {key: value.clone() for key, value in students[-1].state_dict().items()}

    def before(module, name, note):
        function = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *args: note() or function(*args))

    build = train_eval.build_model
    monkeypatch.setattr(train_eval, "build_model",
                        lambda *args: students.append(build(*args)) or students[-1])
    before(train_eval, "apply_epoch", lambda: steps.append(weights()))
    before(train_eval, "split_accuracy", lambda: tested.append(weights()))
    relabelled.call("train_eval", "--students wrn10_1 --epochs 3 --ema-decay 0.7 --batch-size 3 "
                    "--whole-up-to 0 --evaluations 1")
    steps.append(weights())
    average = steps[0]
    for now in steps[1:]:
        average = {key: 0.7 * value + 0.3 * now[key] if value.is_floating_point() else now[key] for key,
                   value in average.items()}
    assert len(steps) == 10 and len(tested) == 1
    for key, value in average.items():
        torch.testing.assert_close(tested[0][key], value)
    assert not torch.equal(tested[0]["fc.weight"], steps[-1]["fc.weight"])


@pytest.mark.slow
def test_held_out_training_images_take_the_place_of_the_test_set(bare):
    for path in bare.dataset.glob("test/*/*.png"):
        Image.new("RGB", (16, 16)).save(path)                            # all alike: of no use as a test set
    results = bare.chain("--holdout")
    teacher = torch.load(bare.root / "runs/beasts-holdout/teachers/supervised/wrn10_1.pt", weights_only=True)
    assert teacher["trained"] == 44 and teacher["tested"] == 4 and not bare.run().exists()
    assert results["train_eval"]["args"]["holdout"] is True
    random = bare.call("recover", "--holdout --method random --ipc 11")
    assert random["images"] == 44
    assert "--ipc 12" in bare.mistake("recover", "--holdout --method random --ipc 12")
    bare.call("recover", "--method random --ipc 12")                     # without it, all may be taken


@pytest.mark.slow
def test_students_learn_from_soft_labels_and_from_hard_ones_without_any_teacher(bare):
    run = "--method random --ipc 12 --backbones convnet_w8 --batch-size 8"
    bare.call("squeeze", "--epochs 10 --backbones convnet_w8")
    bare.call("recover", run)
    bare.call("relabel", run, "--epochs 20 --whole-up-to 0")
    training = "--epochs 20 --whole-up-to 0 --optimizer adamw --lr 0.01"
    assert bare.call("train_eval", run, training)["top1"] > 60                           # of four classes
    shutil.rmtree(bare.teachers)
    assert bare.call("train_eval", run, training, "--labels hard")["top1"] > 60


def test_a_student_at_chance_and_one_beside_random_images_are_told(relabelled, capsys):
    flags = "--labels hard --epochs 1 --lr 1e-9"
    relabelled.call("recover", "--method random")
    relabelled.call("train_eval", flags, "--method random")
    assert "(chance 25.0 %), in" in relabelled.printed
    capsys.readouterr()
    result = relabelled.call("train_eval", flags)
    told = f"convnet_w8 {result['top1']:.1f} % of the test images (chance 25.0 %, random real images "
    assert told in relabelled.printed
    warned = capsys.readouterr().err
    for words in "warning: convnet_w8 is right on", "which a guess (25.0 %) may reach", "--epochs":
        assert words in warned
    relabelled.call("train_eval", flags, "--epochs 2 --overwrite")                 # another recipe
    assert "(chance 25.0 %), in" in relabelled.printed


def test_the_crops_of_streamed_images_are_of_seed_and_epoch(bare, monkeypatch):
    seeds, batches = [], Split.batches

    def watched(split, index, crop_seed=None):
        seeds.append(crop_seed)
        return batches(split, index, crop_seed)

    monkeypatch.setattr(Split, "batches", watched)
    flags = "--backbones convnet_w8 --crop resized --overwrite --seed"
    for seed in 0, 1:
        bare.call("squeeze", "--epochs 2 --image-size 72", flags, seed)
        bare.call("collect_stats", flags, seed)
    assert [seed for seed in seeds if seed is not None] == [0, 1, 0, 10 ** 6, 10 ** 6 + 1, 1]


@pytest.mark.parametrize("phase, flags", [
    ("squeeze", ""), ("collect_stats", ""), ("recover", "--subset 1 --init real"),
    ("recover", "--method random"), ("recover", "--method dm --iterations 1"), ("relabel", ""),
    ("train_eval", "--labels hard")])
def test_every_generator_of_a_phase_has_its_seed_in_its_key(phase, flags, relabelled, monkeypatch):
    drawn = {}
    for seed in 5, 6:
        keys = drawn[seed] = set()
        for module in squeeze, collect_stats, recover, train_eval, utils.labels, utils.dm, utils.selection:
            monkeypatch.setattr(module, "generator", lambda *key: keys.add(key) or generator(*key))
        both = f"--seed {seed}" + f" --student-seeds {seed}" * (phase == "train_eval")
        relabelled.call(phase, flags, both, "--overwrite")
    assert drawn[5] and not drawn[5] & drawn[6]


def test_label_epochs_are_of_stored_labels_alone(recovered):
    results = [recovered.call("train_eval", "--labels hard --epochs 3 --overwrite", flags)["top1_by_epoch"]
               for flags in ("", "--label-epochs 1")]
    assert results[0] == results[1]


def test_a_hard_label_is_of_the_image_and_its_partner_by_their_shares(relabelled, record):
    seen, losses = record(train_eval, "apply_epoch"), record(train_eval, "hard_loss")
    relabelled.call("train_eval", "--labels hard --batch-size 3 --whole-up-to 0")
    for (_, drawn, batch, *_), (_, y, partner_y, ratio, _) in zip(seen, losses, strict=True):
        assert y.tolist() == (batch // 2).tolist() and torch.equal(ratio, drawn["ratio"][batch])
        assert partner_y.tolist() == (drawn["partner"][batch] // 2).tolist()
    assert any((y != partner_y).any() for _, y, partner_y, *_ in losses)


@pytest.mark.parametrize("norm", ["--logit-norm", "--no-logit-norm"])
def test_online_labels_are_the_stored_ones(norm, recovered, record):
    recovered.call("relabel", norm)
    loss = record(train_eval, "mse_gt_loss")
    recovered.call("train_eval", "--epochs 1")
    recovered.call("train_eval", "--labels online --epochs 1", norm)
    torch.testing.assert_close(loss[0][1], loss[1][1], rtol=1e-3, atol=1e-3)
