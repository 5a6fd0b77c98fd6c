"""The methods beside G-VBSM: what each of them changes, and all of them from end to end."""
import io
import itertools
import json
import math
import shutil
from argparse import Namespace
from contextlib import redirect_stderr
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torchvision.datasets import ImageFolder

import collect_stats
import recover
import relabel
import squeeze
import train_eval
from models import build_model
from tests.hashes import few_shapes
from tests.helpers import assert_near, checkpoint
from utils import PHASES, data, scores
from utils.augment import apply_resized_crop, crop_floor, draw_resized_crop, normalize
from utils.data import Split, load_split
from utils.presets import METHODS, SELECTIONS, preset_values
from utils.pool import fine_tuning, teachers_of
from utils.run import generator
from utils.selection import drop_largest, herding, k_center, last_epoch_weights, most_forgotten
from utils.closed_form import ClosedFormMatching, freeze
from utils.stats import layer_inputs, layer_weights, matched_layers, mixed_moments
from utils.teachers import make_matchers
from utils.train import learning_rates

SMALL = {"squeeze": "--epochs 2 --batch-size 64", "relabel": "--epochs 2",
         "train_eval": "--epochs 2 --students convnet_w8", "recover": "--iterations 3", "collect_stats": ""}
POOL = "wrn10_1@1 wrn10_1@2"
OWN = {  # what a method has beside, in small: flags of a phase, or of all
    "scdd": {"squeeze": "--batch-size 64 --queue 128 --epochs 2 --probe-epochs 1"},
    "dm": {"recover": "--iterations 2 --batch-size 16"},
    "bilp": {"squeeze": "--score-trials 1 --score-epochs 1 --score-batch-size 256",
             "recover": "--iterations 2 --batch-size 16"},
    "teddy": {"squeeze": "--save-epochs 1:2:1", "recover": f"--subset 1 --backbones {POOL}",
              **{phase: f"--backbones {POOL}" for phase in ("collect_stats", "relabel", "train_eval")}}}


def training_images(project):
    """Integers [N, S, S, 3] in the order of the data set, and their labels."""
    train = ImageFolder(project.dataset / "train")
    return np.stack([np.asarray(image) for image, _ in train]).astype(int), np.array(train.targets)


# All of them

@pytest.fixture(scope="module")
def shapes(new_project):
    return new_project("shapes")


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_every_method_runs_all_five_phases_on_shapes_by_the_same_loop(method, shapes, monkeypatch):
    monkeypatch.setattr(data, "draw_shapes", few_shapes)
    for phase in PHASES:
        own = OWN.get(method, {}).get(phase, "")
        words = ["--dataset", "shapes", "--method", method, "--ipc", "2", "--device", "cpu", "--run-dir",
                 str(shapes.root / "runs"), "--backbones", "wrn10_1", *SMALL[phase].split(), *own.split()]
        __import__(phase).main(words)
    run = shapes.run(f"{method}-ipc2")
    result = json.loads((run / "eval/convnet_w8.json").read_text())
    assert result["method"] == method and result["images"] == 20
    assert len(list(run.glob("images/*/*.png"))) == 20
    real = {image.permute(1, 2, 0).numpy().tobytes()
            for image in load_split("shapes", "", "train", 32).images}
    mine = {np.asarray(Image.open(path)).tobytes() for path in run.glob("images/*/*.png")}
    assert len(mine) == 20 and (mine <= real if method in SELECTIONS else not mine & real
                                or method in ("dm", "bilp"))


# what the papers and releases print; a row: cifar10, cifar100, tiny, imagenet, "-" where there is nothing
SETTINGS = {
    "sre2l squeeze lr":            ("-", 0.1, 0.2, "-"),
    "sre2l squeeze weight_decay":  ("-", 5e-4, 1e-4, "-"),
    "sre2l squeeze batch_size":    ("-", 128, 256, "-"),
    "sre2l squeeze epochs":        ("-", 200, 50, "-"),
    "sre2l squeeze warmup_epochs": ("-", 0, 5, "-"),
    "sre2l recover lr":            ("-", 0.25, 0.1, 0.25),
    "sre2l recover bn_weight":     ("-", 0.01, 1.0, 0.01),
    "sre2l recover iterations":    ("-", 1000, 4000, 4000),
    "sre2l recover batch_size":    ("-", 100, 100, 100),
    "sre2l recover first_multiplier": ("-", 10, 10, 10),
    "sre2l recover crop":          ("-", "none", "resized", "resized"),
    "sre2l recover roll":          ("-", 4, 4, 32),
    "sre2l train_eval temperature": ("-", 30, 20, 20),
    "sre2l train_eval loss":       ("-", "kl", "kl_t2", "kl"),
    "sre2l train_eval epochs":     ("-", 400, 100, 300),
    "sre2l train_eval optimizer":  ("-", "adamw", "sgd", "adamw"),
    "cda recover lr":              ("-", "-", 0.4, 0.25),
    "cda recover bn_weight":       ("-", "-", 0.05, 0.01),
    "cda recover crop":            ("-", "-", "cosine", "cosine"),
    "scdd squeeze lr":             ("-", 0.06, 0.06, "-"),
    "scdd squeeze batch_size":     ("-", 512, 512, "-"),
    "scdd squeeze epochs":         ("-", 200, 200, "-"),
    "scdd squeeze objective":      ("moco", "moco", "moco", "probe"),
    "scdd squeeze probe_lr":       ("-", "-", "-", 0.03),
    "scdd squeeze probe_weight_decay": ("-", "-", "-", 1e-4),
    "scdd squeeze probe_epochs":   ("-", "-", "-", 200),
    "scdd recover bn_weight":      ("-", 0.005, 0.1, 0.0005),
    "scdd recover weight_decay":   (1e-4, 1e-4, 1e-4, 1e-4),
    "teddy recover weight_decay":  ("-", "-", 1e-4, 1e-4),
    "scdd recover lr":             ("-", 0.4, 0.6, 0.25),
    "scdd recover iterations":     ("-", 1000, 1000, 1000),
    "scdd train_eval lr":          ("-", ["0.005"], ["0.2"], ["0.001"]),
    "scdd train_eval batch_size":  ("-", 64, 64, 64),
    "scdd train_eval epochs":      ("-", 200, 500, 300),
    "teddy squeeze save_epochs":   ("-", "-", "11:46:5", "21:61:5"),
    "teddy recover bn_weight":     ("-", "-", 1.0, 0.01),
    "teddy recover lr":            ("-", "-", 0.1, 0.25),
    "teddy recover iterations":    ("-", "-", 4000, 6000),
    "teddy recover subset":        ("-", "-", 3, 3),
    "teddy train_eval batch_size": ("-", "-", 256, 1024),
    "teddy train_eval epochs":     ("-", "-", 100, 300),
    "teddy squeeze batch_size":    ("-", "-", 256, 32),
    "dm recover lr":               (1.0, 1.0, 1.0, 5.0),
    "dm recover iterations":       (20000, 20000, 10000, 5000),
    "dm recover batch_size":       (256, 256, 256, "-"),
    "bilp squeeze score_trials":   (50, 50, 50, 30),
    "bilp squeeze score_epochs":   (100, 250, 100, 20),
    "bilp squeeze score_lr":       (3e-3, 5e-3, 5e-3, 3e-3),
    "bilp squeeze score_batch_size": (512, 512, 512, 256),
    "bilp recover adaptive_ratio": (0.3, 0.3, "-", "-"),
}


@pytest.mark.parametrize("row", SETTINGS)
def test_the_settings_are_those_that_were_published(row):
    method, phase, flag = row.split()
    for dataset, value in zip(("cifar10", "cifar100", "tiny", "imagenet"), SETTINGS[row], strict=True):
        settings = preset_values("paper", dataset, phase, 10, method)
        if phase == "train_eval":
            settings |= vars(train_eval.for_student(Namespace(**settings), "resnet18"))
        assert value == "-" or settings[flag] == value


def test_the_pool_of_a_method_is_what_its_squeeze_saves():
    for column in "cifar10", "cifar100", "tiny", "imagenet", "shapes":
        squeezed = preset_values("paper", column, "squeeze", 10, "teddy")
        names = [one for name in squeezed["backbones"]
                 for one in teachers_of(name, squeezed["save_epochs"], 0)]
        for phase in PHASES[1:]:
            assert preset_values("paper", column, phase, 10, "teddy")["backbones"] == names[1:]


# SRe2L and CDA

@pytest.mark.parametrize("method", ["sre2l", "cda", "scdd", "teddy"])
def test_batch_norm_alone_acts_in_the_original_loop_and_its_first_layer_counts_ten_times(method):
    model = build_model("resnet18", 10, 32)
    for column in "cifar10", "cifar100", "tiny", "imagenet", "shapes":
        values = preset_values("paper", column, "recover", 10, method)
        assert (values["alpha"], values["conv_weight"], values["dd_weight"], values["loop"]) == (0, 0, 0,
                                                                                                 "original")
        weights = layer_weights(model, values["bn_weight"], values["conv_weight"],
                                values["first_multiplier"])
        acting = {name: weight for name, weight in weights.items() if weight}
        assert next(iter(acting)) == "bn1" and len(acting) == 20
        assert acting.pop("bn1") == 10 * values["bn_weight"] and set(acting.values()) == {values["bn_weight"]}


def test_recover_needs_no_statistics_of_convolutions_where_none_acts(bare):
    bare.call("squeeze")
    bare.call("recover", "--conv-weight 0")
    assert "collect_stats.py" in bare.mistake("recover", "--tag conv")


@pytest.mark.parametrize("crop, expected", [
    ("resized", lambda t: 0.08), ("linear", lambda t: 0.08 + 0.92 * (1 - t / 8)),
    ("cosine", lambda t: 0.08 + 0.92 * 0.5 * (1 + math.cos(math.pi * t / 8)))])
def test_the_lower_bound_of_the_crop_falls_from_1_to_008(crop, expected):
    floor = torch.as_tensor(crop_floor(crop, 8)).expand(8, 1).flatten()
    assert floor.tolist() == pytest.approx([expected(t) for t in range(8)])
    higher = torch.as_tensor(crop_floor(crop, 8, 0.5)).expand(8, 1).flatten()
    assert higher.tolist() == pytest.approx([0.5 + (expected(t) - 0.08) / 0.92 * 0.5 for t in range(8)])


def test_crops_are_drawn_from_the_floor_of_their_iteration_up():
    floor = torch.tensor([[1.0], [0.5], [0.08]]).repeat_interleave(400, 0)
    boxes = draw_resized_crop(1200, 32, torch.Generator().manual_seed(0), (floor, 1.0))
    area = (boxes[:, 2] * boxes[:, 3]).view(3, 400) / 32 ** 2
    assert (area[0] > 0.9).all() and area[1].min() > 0.45 and area[2].min() < 0.15 and area[2].max() > 0.9
    assert area[2].double().mean() < 0.6 < area[1].double().mean() < 0.78  # of those that fit


def crops(*args, **settings):
    return torch.stack([draw["view"]["crop"] for draw in recover.draw_iterations(*args, **settings)])


def test_the_crops_of_recover_follow_the_curriculum():
    areas = {}
    for crop in "resized", "cosine":
        matching = type("matching", (), dict(targets={"a": (0, 0)}))
        boxes = crops(400, [matching], 32, seed=0, crop=crop)
        areas[crop] = (boxes[:, 0, 2] * boxes[:, 0, 3] / 32 ** 2).split(100)
    assert all(0.4 < part.mean() < 0.6 for part in areas["resized"])
    assert areas["cosine"][0].min() > 0.8
    assert areas["cosine"][0].mean() > areas["cosine"][1].mean() > areas["cosine"][2].mean()
    assert areas["cosine"][3].min() < 0.3


def test_the_kl_loss_of_tiny_imagenet_has_the_squared_temperature():
    logits, soft, y = torch.randn(5, 3), torch.randn(5, 3), torch.zeros(5, dtype=torch.long)
    plain, squared = (train_eval.student_loss(logits, y, soft, y, torch.ones(5), kind=kind, gamma=0.1,
                                              temperature=20.0)
                      for kind in ("kl", "kl_t2"))
    assert_near(squared, 400 * plain, 1e-6)


@pytest.mark.parametrize("flags, expected", [
    (dict(schedule="cosine", warmup_epochs=2, epochs=6), [0.01, 0.505, 1, 0.8536, 0.5, 0.1464]),
    (dict(schedule="step", warmup_epochs=0, epochs=5, step_epochs=2), [1, 1, 0.1, 0.1, 0.01]),
    (dict(schedule="constant", warmup_epochs=1, epochs=3), [0.01, 1, 1])])
def test_learning_rates_warm_up_and_then_follow_their_schedule(flags, expected):
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    schedule, rates = learning_rates(optimizer, **flags), []
    for _ in expected:
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert rates == pytest.approx(expected, abs=1e-4)


# Teddy

def test_the_weak_teacher_of_an_epoch_is_what_a_shorter_training_gives(bare):
    bare.call("squeeze", "--backbones wrn10_1 --epochs 3 --save-epochs 1:3:2 --schedule constant")
    assert sorted(path.name for path in bare.teachers.glob("*.pt")) == ["wrn10_1.pt", "wrn10_1@1.pt",
                                                                        "wrn10_1@3.pt"]
    result = bare.call("squeeze", "--backbones wrn10_1 --epochs 1 --schedule constant --teachers short")
    early, whole, short = (checkpoint(bare.results / "teachers" / path)["weights"] for path in (
        "supervised/wrn10_1@1.pt", "supervised/wrn10_1.pt", "short/wrn10_1.pt"))
    assert all(torch.equal(early[key], short[key]) for key in short) and list(result["top1"]) == ["wrn10_1"]
    last = checkpoint(bare.teachers / "wrn10_1@3.pt")
    assert all(torch.equal(last["weights"][key], whole[key])
               for key in whole) and last["backbone"] == "wrn10_1"
    assert any(not torch.equal(early[key], whole[key]) for key in whole)


@pytest.mark.slow
def test_weak_teachers_are_done_when_all_are_there_and_missed_when_one_is_not(bare):
    flags = "--backbones wrn10_1 --save-epochs 1:2:1 --pruned 2"
    result = bare.call("squeeze", flags)
    names = ["wrn10_1", "wrn10_1@1", "wrn10_1@2", "wrn10_1@pruned1", "wrn10_1@pruned2"]
    assert list(result["top1"]) == names
    before = bare.files()
    bare.call("squeeze", flags)
    assert "already done" in bare.printed and bare.files() == before
    assert list(bare.call("squeeze", "--backbones wrn10_1")["top1"]) == ["wrn10_1"]
    (bare.teachers / "wrn10_1@pruned2.pt").unlink()
    assert bare.call("squeeze", flags)["top1"] == result["top1"]
    written = {name for name, content in bare.files().items() if content != before.get(name)}
    assert {name for name in written
            if name.endswith(".pt")} == {"runs/beasts/teachers/supervised/wrn10_1@pruned2.pt"}
    (bare.teachers / "wrn10_1@1.pt").unlink()
    assert "wrn10_1@1.pt is missing" in bare.mistake("squeeze", flags)


@pytest.mark.slow
def test_a_pruned_teacher_has_two_thirds_of_the_parameters_and_comes_from_the_trained_one(bare):
    bare.call("squeeze", "--backbones wrn10_1 --pruned 3")
    whole, *pruned = (checkpoint(bare.teachers / f"wrn10_1{kind}.pt")
                      for kind in ("", "@pruned1", "@pruned2", "@pruned3"))
    for record in pruned:
        model = build_model("wrn10_1", 4, 16, record["widths"])
        model.load_state_dict(record["weights"])
        share = sum(p.numel() for p in model.parameters()) / sum(p.numel()
                                                                 for p in build_model("wrn10_1", 4,
                                                                                      16).parameters())
        assert 0.66 <= share < 0.75
    layer = next(iter(pruned[0]["widths"])) + ".weight"
    kept, rows, tuned = ({row.numpy().tobytes() for row in record["weights"][layer]}
                         for record in (pruned[0], whole, pruned[2]))
    assert kept < rows and not tuned & rows  # 0 epochs of fine-tuning, and 2
    pool = "--backbones wrn10_1@pruned1 wrn10_1@pruned2 wrn10_1@pruned3"
    bare.call("collect_stats", pool)
    for phase in "recover", "relabel", "train_eval":
        bare.call(phase, pool, "--subset 2 --loop original" * (phase == "recover"))


def test_the_later_a_pruned_teacher_the_more_fine_tuning_it_has():
    how = [fine_tuning(f"convnet_w8@pruned{i}", 9) for i in range(1, 10)]
    assert [one.epochs for one in how] == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert {(one.lr, one.batch_size, one.schedule, one.step_epochs, one.weight_decay)
            for one in how} == {(0.1, 32, "step", 1, 1e-4)}
    optimizer, schedule = how[-1].optimizer(torch.nn.Linear(1, 1))
    optimizer.step()
    schedule.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.001)  # in the last of its epochs


def draw_subset(count, size, *, seed, slot):
    matchers = count * [SimpleNamespace(targets={})]
    draws = recover.draw_iterations(3, matchers, 32, seed=seed, subset=size, slot=slot)
    assert len({draw["backbones"] for draw in draws}) == 1
    return draws[0]["backbones"]


def test_a_subset_of_the_pool_belongs_to_a_slot_and_all_slots_together_use_the_pool():
    drawn, again = ([draw_subset(8, 3, seed=0, slot=slot) for slot in range(50)] for _ in range(2))
    assert drawn == again and len(set(drawn)) > 20
    assert all(len(set(one)) == 3 and one == tuple(sorted(one)) for one in drawn)
    counts = np.bincount(np.concatenate(drawn), minlength=8)
    assert counts.min() > 8 and counts.max() < 32
    assert [draw_subset(8, 3, seed=1, slot=slot) for slot in range(2)] != drawn[:2]


def test_the_losses_of_a_subset_are_summed_in_every_iteration():
    torch.manual_seed(0)
    models = [freeze(build_model("wrn10_1", 4, 16).eval()) for _ in range(3)]
    matchers = [ClosedFormMatching(model, {}, layer_weights(model, 0.1, 0.0, 10.0), alpha=0.0)
                for model in models]
    pixels, labels, seen = torch.randn(1, 4, 3, 16, 16), torch.arange(4)[None], []
    draws = recover.draw_iterations(2, matchers, 16, seed=0, subset=2, slot=5, crop="none")
    chosen = draw_subset(3, 2, seed=0, slot=5)
    settings = dict(bounds=2 * [torch.zeros(3, 1, 1)], lr=0.1, dd_weight=0.0)
    settings["bounds"] = [bound + side for bound, side in zip(settings["bounds"], (-2, 2))]
    images = pixels.clone()
    for t, losses, _ in recover.recover_batch(images, labels, matchers, draws, **settings):
        seen.append((losses, images.clone()))
    assert [draw["backbones"] for draw in draws] == [chosen, chosen]
    alone = [recover.matching_gradient(matchers[k], labels, 1.0, pixels, {}, None, matchers[k].start(1))
             for k in chosen]
    for i, term in enumerate(("ce", "bn")):
        assert_near(seen[0][0][term], sum(losses[i] for _, losses, _ in alone), 1e-5)
    step = (pixels - 0.1 * sum(gradient for gradient, _, _ in alone).sign()).clamp(-2, 2)       # Adam's first
    assert ((seen[0][1] - step).abs() < 1e-3).double().mean() > 0.99


@pytest.mark.slow
def test_batches_of_other_subsets_share_no_pass(project):
    project.call("squeeze", "--teachers pool --backbones wrn10_1 --epochs 3 --save-epochs 1:3:1")
    flags = ["--teachers pool --backbones", *(f"wrn10_1@{i}" for i in (1, 2, 3)),
             "--subset 1 --loop original --conv-weight 0 --ipc 4 --batch-size 2 --dd-weight 0"]
    project.call("recover", *flags, "--groups-per-step 1")
    alone, log = project.images("gvbsm-ipc4"), project.log("gvbsm-ipc4")[1:]
    assert len({entry["backbone"] for entry in log}) > 1
    for slot in range(4):
        of_slot = {entry["backbone"] for entry in log if entry["batches"][0] // 2 == slot}
        assert len(of_slot) == 1                                    # whatever the classes
    project.call("recover", *flags, "--groups-per-step 8 --overwrite")
    assert abs(project.images("gvbsm-ipc4") - alone).max() <= 1


def test_class_statistics_are_the_moments_of_each_class_over_all_its_pixels(project, monkeypatch):
    views = []
    monkeypatch.setattr(collect_stats, "normalize", lambda *args: views.append(normalize(*args)) or views[-1])
    project.call("collect_stats", "--class-statistics --overwrite --backbones wrn10_1")
    pixels, order = torch.cat(views), torch.randperm(48, generator=generator("collect_stats", 0))
    labels, record = training_images(project)[1][order], checkpoint(project.teachers / "wrn10_1.pt")
    stored = checkpoint(project.teachers / "wrn10_1.stats.pt")["class_statistics"]
    model = build_model("wrn10_1", 4, 16).eval()
    model.load_state_dict(record["weights"])
    assert list(stored) == list(matched_layers(model))
    for label in range(4):
        with layer_inputs(model) as inputs, torch.no_grad():
            model(pixels[labels == label])
        for layer, x in inputs.items():
            is_conv = isinstance(model.get_submodule(layer), nn.Conv2d)
            rows = [x.double().transpose(0, 1).flatten(1)]
            if is_conv:
                cells = x.double().unflatten(3, (-1, 4)).unflatten(2, (-1, 4))
                rows.append(cells.permute(2, 4, 0, 1, 3, 5).flatten(0, 1).flatten(1))
            expected = [moment for row in rows for moment in (row.mean(1), row.var(1, correction=0))]
            for mine, moment in zip(stored[layer], expected, strict=True):
                torch.testing.assert_close(mine[label], moment, rtol=1e-4, atol=1e-5)


def test_image_moments_are_those_of_slow_loops():
    x = torch.randn(3, 5, 6, 6, dtype=torch.float64).float()
    mean, square, cell_mean, cell_square = collect_stats.image_moments(x, 4)  # 6 pixels: resized to 8
    whole = F.interpolate(x, size=(8, 8), mode="bilinear", align_corners=False)
    for image in range(3):
        for channel in range(5):
            assert_near(mean[image, channel], x[image, channel].mean(), 1e-5)
            assert_near(square[image, channel], (x[image, channel] ** 2).mean(), 1e-5)
        for cell, (row, column) in enumerate(itertools.product(range(2), range(2))):
            patch = whole[image, :, 4 * row:4 * row + 4, 4 * column:4 * column + 4]
            torch.testing.assert_close(cell_mean[image, cell], patch.mean(), rtol=1e-4, atol=1e-6)
            torch.testing.assert_close(cell_square[image, cell], (patch ** 2).mean(), rtol=1e-4, atol=1e-6)
    assert len(collect_stats.image_moments(x)) == 2


def test_the_moments_of_a_mixture_are_those_of_all_its_values():
    scale, shift = torch.tensor([1.0, 2, 3])[:, None, None], torch.arange(3)[:, None, None]
    values = torch.randn(3, 40, 5, dtype=torch.float64) * scale + shift
    mean, var = values.mean(1), values.var(1, correction=0)
    mixed_mean, mixed_var = mixed_moments(mean, var, torch.tensor([[1 / 3, 1 / 3, 1 / 3], [0.75, 0, 0.25]],
                                                                  dtype=torch.float64))
    for row, together in enumerate([values.flatten(0, 1), torch.cat([*3 * [values[0]], values[2]])]):
        torch.testing.assert_close(mixed_mean[row], together.mean(0))
        torch.testing.assert_close(mixed_var[row], together.var(0, correction=0))


@pytest.mark.slow
@pytest.mark.parametrize("loop", ["reorder", "original"])
def test_class_statistics_aim_each_batch_at_its_own_classes_in_both_gradients(loop, project, request):
    project.call("collect_stats", "--class-statistics --overwrite")
    request.getfixturevalue("double")
    flags = f"--class-statistics --loop {loop} --dd-weight 0 --drop-rate 0"
    project.call("recover", flags)
    project.call("recover", flags, "--statistics plain --tag plain")
    project.call("recover", flags, "--groups-per-step 2 --tag pair")
    project.call("recover", flags.replace("--class-statistics", ""), "--tag global")
    closed, plain, pair, other = (project.images(f"gvbsm-ipc2{tag}")
                                  for tag in ("", "-plain", "-pair", "-global"))
    assert (closed == plain).all() and (closed == pair).all() and abs(closed - other).max() > 1
    for entry, again in zip(project.log()[1:], project.log("gvbsm-ipc2-plain")[1:], strict=True):
        assert [entry[term] for term in ("bn", "conv")] == pytest.approx([again[term]
                                                                          for term in ("bn", "conv")],
                                                                         rel=1e-6)


def test_the_target_of_a_batch_is_the_mixture_of_its_classes(project):
    project.call("collect_stats", "--class-statistics --overwrite --backbones wrn10_1")
    stored = checkpoint(project.teachers / "wrn10_1.stats.pt")
    model = build_model("wrn10_1", 4, 16).eval()
    labels = torch.tensor([[0, 0, 1, 1], [2, 2, 2, 3]])
    matching, = make_matchers({"wrn10_1": model}, {"wrn10_1": stored}, labels, class_statistics=True,
                              bn_weight=0.01, conv_weight=0.01, first_multiplier=10.0)
    for layer, targets in matching.targets.items():
        for group, shares in enumerate([{0: 0.5, 1: 0.5}, {2: 0.75, 3: 0.25}]):
            for kind in range(0, len(targets), 2):
                means, variances = (stored["class_statistics"][layer][kind + i] for i in (0, 1))
                mean = sum(share * means[label] for label, share in shares.items())
                var = sum(share * (variances[label] + (means[label] - mean) ** 2) for label,
                          share in shares.items())
                torch.testing.assert_close(targets[kind][group], mean.float(), rtol=1e-5, atol=1e-6)
                torch.testing.assert_close(targets[kind + 1][group], var.float(), rtol=1e-4, atol=1e-6)


def test_class_statistics_that_nobody_collected_are_missed(project):
    assert "--class-statistics" in project.mistake("recover", "--class-statistics")
    assert "--overwrite" in project.mistake("collect_stats", "--class-statistics")
    project.call("collect_stats", "--class-statistics --overwrite")
    project.call("collect_stats")  # more than is asked for is no mistake
    assert "already done" in project.printed


# BiLP

def test_scores_are_smoothed_losses_of_a_small_convnet_averaged_over_trainings(bare, monkeypatch):
    bare.call("squeeze", "--backbones convnet_w8 --prune-ratio 0.25 --score-trials 2 --score-epochs 3 "
              "--score-batch-size 20 --score-lr 0.01")
    stored, record = checkpoint(bare.teachers / "scores.pt"), checkpoint(bare.teachers / "convnet_w8.pt")
    images, labels = training_images(bare)
    pixels = normalize(torch.from_numpy(images).permute(0, 3, 1, 2), record["data"]["mean"],
                       record["data"]["std"])
    labels, curves = torch.from_numpy(labels), torch.zeros(2, 3, 48)
    for trial in range(2):
        torch.manual_seed(generator("score", 0, trial).initial_seed())
        model = scores.score_network(4, 16)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
        for epoch in range(3):
            for batch in torch.randperm(48, generator=generator("score", 0, trial, epoch)).split(20):
                losses = F.cross_entropy(model(pixels[batch]), labels[batch], reduction="none")
                curves[trial, epoch, batch] = losses.detach()
                optimizer.zero_grad()
                losses.mean().backward()
                optimizer.step()
    assert model(pixels[:1]).shape == (1, 4) and model[-1].in_features == 128
    expected = (curves.mean(0) * last_epoch_weights(3).float()[:, None]).sum(0)
    assert_near(stored["scores"], expected, 1e-4)
    assert record["kept"].tolist() == drop_largest(stored["scores"], labels,
                                                   0.25).tolist() and len(record["kept"]) == 36


@pytest.mark.slow
def test_a_pruned_image_is_neither_trained_on_nor_collected_nor_a_start(bare, monkeypatch):
    asked, batches = {"train": [], "score": []}, Split.batches

    def watched(split, index, crop_seed=None):
        # not the test images, nor a pass for mean and deviation
        if len(split) == 48 and not isinstance(index, int):
            asked["score" if crop_seed is None else "train"] += torch.cat(list(index)).tolist()
        return batches(split, index, crop_seed)

    monkeypatch.setattr(Split, "batches", watched)
    bare.call("squeeze", "--prune-ratio 0.5 --score-trials 1 --score-epochs 1")
    kept, trained = checkpoint(bare.teachers / "convnet_w8.pt")["kept"].tolist(), asked["train"]
    asked["train"] = []
    bare.call("collect_stats")
    assert sorted(asked["score"]) == list(range(48)) and len(kept) == 24
    # two backbones, two epochs
    assert sorted(trained) == sorted(4 * kept) and sorted(asked["train"]) == sorted(2 * kept)
    bare.call("recover", "--init real --lr 0 --ipc 6 --iterations 1")
    images, _ = training_images(bare)
    starts = {image.tobytes() for image in bare.images("gvbsm-ipc6")}
    assert starts == {images[i].tobytes() for i in kept}
    assert "6 training images" in bare.mistake("recover", "--init real --ipc 7")


@pytest.mark.slow
def test_the_scores_are_made_once_and_another_ratio_takes_them_as_they_are(bare):
    pruning = "--score-trials 1 --score-epochs 2"
    bare.call("squeeze", pruning, "--prune-ratio 0.5 --backbones convnet_w8")
    before = (bare.teachers / "scores.pt").stat().st_mtime_ns
    bare.call("squeeze", pruning, "--prune-ratio 0.5 --backbones wrn10_1")
    assert (bare.teachers / "scores.pt").stat().st_mtime_ns == before
    assert "--prune-ratio" in bare.mistake("squeeze", pruning, "--prune-ratio 0.25")
    assert "--score-epochs" in bare.mistake("squeeze", "--score-trials 1 --score-epochs 3 --prune-ratio 0.5")


# Selections

@pytest.mark.parametrize("method", ["herding", "kcenter", "forgetting"])
def test_a_selection_is_that_of_its_function_class_by_class(method, project):
    project.call("recover", f"--method {method} --ipc 3")
    images, labels = training_images(project)
    record = checkpoint(project.teachers / "convnet_w8.pt")
    model = build_model("convnet_w8", 4, 16)
    model.load_state_dict(record["weights"])
    pixels = normalize(torch.from_numpy(images).permute(0, 3, 1, 2), record["data"]["mean"],
                       record["data"]["std"])
    with torch.no_grad():
        features = nn.Sequential(*list(model)[:-1])(pixels)  # all but the linear layer
    expected = []
    for label in range(4):
        members = torch.from_numpy(np.flatnonzero(labels == label))
        chosen = (herding(features[members], 3) if method == "herding" else k_center(features[members], 3)
                  if method == "kcenter"
                  else most_forgotten(record["forgetting"]["events"][members],
                                      record["forgetting"]["learned"][members], 3))
        expected += members[chosen].tolist()
    assert (project.images(f"{method}-ipc3") == images[expected]).all()
    if method != "forgetting":
        project.call("recover", f"--init {method} --ipc 3 --lr 0")
        assert (project.images("gvbsm-ipc3") == images[expected]).all()
    squeezenet = project.teachers / "squeezenet.pt"
    torch.save(record | {"backbone": "squeezenet", "weights": build_model("squeezenet", 4, 16).state_dict()},
               squeezenet)
    if method != "forgetting":
        assert "name another first" in project.mistake("recover",
                                                       f"--method {method} --ipc 4 --backbones squeezenet")
    project.chain(f"--method {method} --ipc 3", first="relabel")
    assert f"--ipc 13" in project.mistake("recover", f"--method {method} --ipc 13")


def test_forgetting_events_are_those_counted_by_hand_while_training(bare, monkeypatch):
    steps, gathered = [], squeeze.gathered
    monkeypatch.setattr(squeeze, "gathered", lambda right,
                        count: steps.append(right) or gathered(right, count))
    bare.call("squeeze", "--backbones convnet_w8 --epochs 12 --lr 0.3 --batch-size 16")
    events, learned, right = np.zeros(48, int), np.zeros(48, bool), np.zeros(48, bool)
    for epoch in range(12):
        order = torch.randperm(48, generator=generator("squeeze", 0, epoch))
        now = dict(zip(order.tolist(), torch.cat(steps[3 * epoch:3 * epoch + 3]).tolist(), strict=True))
        for image in range(48):
            events[image] += right[image] and not now[image]
            learned[image] |= now[image]
            right[image] = now[image]
    stored = checkpoint(bare.teachers / "convnet_w8.pt")["forgetting"]
    assert stored["events"].tolist() == events.tolist() and stored["learned"].tolist() == learned.tolist()
    assert events.sum() > 0


@pytest.mark.slow
def test_forgetting_selects_from_what_squeezing_kept_and_needs_counts(bare):
    bare.call("squeeze", "--prune-ratio 0.5 --score-trials 1 --score-epochs 1 --pruned 1 --backbones wrn10_1")
    kept = checkpoint(bare.teachers / "wrn10_1.pt")["kept"].tolist()
    images, _ = training_images(bare)
    for method in "forgetting", "herding":
        bare.call("recover", f"--method {method} --ipc 6 --backbones wrn10_1")
        assert {image.tobytes() for image in bare.images(f"{method}-ipc6")} == {images[i].tobytes()
                                                                                for i in kept}
    assert "nor with" in bare.mistake("recover",
                                      "--method forgetting --backbones wrn10_1@pruned1 --overwrite")


def test_losses_that_are_not_finite_end_squeeze(bare):
    with pytest.raises(SystemExit) as end:
        bare.call("squeeze", "--prune-ratio 0.5 --score-trials 1 --score-epochs 3 --score-lr 1e12")
    assert end.value.code == 2 and not (bare.teachers / "scores.pt").exists()


def test_a_recipe_that_is_named_is_the_one_that_was_implied(project):
    project.call("recover", "--method random")
    for flags in "", "--recipe gvbsm", "--recipe random":
        project.call("relabel", "--method random", flags)
        project.call("train_eval", "--method random", flags)
    assert "already done" in project.printed


def test_what_a_pretrained_backbone_forgot_nobody_knows(project):
    path = project.teachers / "convnet_w8.pt"
    record = checkpoint(path)
    del record["forgetting"]
    torch.save(record, path)
    assert "--backbones convnet_w8" in project.mistake("recover", "--method forgetting")


@pytest.mark.parametrize("phase, flags, told", [
    ("squeeze", "--save-epochs 1:3:1", "--epochs 2 is too few"),
    ("squeeze", "--save-epochs 1-3", "first:last:step"),
    ("squeeze", "--save-epochs 0:3:1", "first:last:step"),
    ("squeeze", "--warmup-epochs 2", "--warmup-epochs 2"),
    ("squeeze", "--save-epochs 2:1:1", "ends before it begins"),
    ("squeeze", "--pruned 1 --backbones deit_tiny", "--pruned 1"),
    ("squeeze", "--backbones wrn10_1@1", "name that, and --save-epochs"),
    ("squeeze", "--backbones nothing --pruned 1", "unknown model 'nothing'"),
    ("squeeze", "--objective moco --backbones squeezenet --batch-size 16", "it has none; name others"),
    ("squeeze", "--objective moco --epochs 1 --batch-size 16", "--epochs 1"),
    ("recover", "--crop sine", "none of: none, resized, pad<pixels>"),
    ("recover", "--method sre2l --teachers other --backbones wrn10_1@2",
     "--backbones wrn10_1, with --save-epochs"),
    ("squeeze", "--pretrained --save-epochs 1:2:1", "--no-pretrained"),
    ("squeeze", "--prune-ratio 1", "--prune-ratio"),
    ("recover", "--subset 3", "the 2 --backbones"), ("recover", "--recipe best", "--recipe"),
    ("recover", "--method herding --backbones wrn16_2", "squeeze.py"),
    ("recover", "--method bilp --backbones wrn16_2", "squeeze.py"),
    ("recover", "--init real --ipc 13", "--ipc 13"),
    ("recover", "--mosaic 2", "name an --init for them, or --mosaic 1"),
    ("recover", "--init real --mosaic 3", "16 pixels"), ("recover", "--stay 0.5", "or --stay 0"),
    ("recover", "--init real --ipc 4 --mosaic 2", "--ipc 4 with --mosaic 2 takes 16"),
    ("relabel", "--method sre2l", "squeeze.py --dataset"),
    ("relabel", "--recipe sre2l", "--method sre2l --teachers sre2l"),
    ("recover", "--method sre2l --recipe gvbsm", "--teachers sre2l --backbones"),
    ("relabel", "--method teddy --backbones wrn10_1@1", "--backbones wrn10_1, with --save-epochs")])
def test_mistakes_end_in_a_line_and_lose_nothing(phase, flags, told, project):
    assert told in project.mistake(phase, flags)


def test_a_rate_that_is_too_large_is_named_by_its_flag(bare):
    with pytest.raises(SystemExit), redirect_stderr(io.StringIO()) as err:
        bare.call("squeeze", "--prune-ratio 0.5 --score-trials 1 --score-epochs 3 --score-lr 1e30")
    assert "use a smaller --score-lr" in err.getvalue() and "--lr" not in err.getvalue()


def test_save_epochs_belong_to_work_that_is_unfinished(bare, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(InterruptedError):
        patch.setattr(squeeze, "count_forgetting", raising)
        bare.call("squeeze", "--backbones wrn10_1 --epochs 3")
    assert "--save-epochs none (now 1:3:1)" in bare.mistake("squeeze", "--backbones wrn10_1 --epochs 3 "
                                                            "--save-epochs 1:3:1")


def raising(*_):
    raise InterruptedError


@pytest.mark.slow
def test_what_is_overwritten_goes_first_so_that_the_same_command_goes_on_without(bare, monkeypatch):
    flags = ("--save-epochs 1:2:1 --pruned 1 --prune-ratio 0.25 --score-trials 1 --score-epochs 1 "
             "--backbones convnet_w8 wrn10_1")
    bare.call("squeeze", flags)
    for module, function in (squeeze, "count_forgetting"), (scores, "drop_largest"):
        with monkeypatch.context() as patch, pytest.raises(InterruptedError):
            patch.setattr(module, function, raising)
            bare.call("squeeze", flags, "--epochs 3 --overwrite --checkpoint-minutes 0")
        result = bare.call("squeeze", flags, "--epochs 3")
        assert len(result["top1"]) == 8
        for path in bare.teachers.glob("*@*.pt"):
            assert checkpoint(path)["args"]["epochs"] == 3


@pytest.mark.slow
def test_teachers_of_other_images_do_not_meet(bare):
    bare.call("squeeze", "--backbones convnet_w8")
    bare.call("squeeze", "--backbones wrn10_1 --prune-ratio 0.5 --score-trials 1 --score-epochs 1")
    assert "--prune-ratio" in bare.mistake("collect_stats")
    bare.call("collect_stats", "--backbones wrn10_1")
    (bare.dataset / "train" / "ant" / "0.png").unlink()
    for phase, flags in ("collect_stats", "--overwrite"), ("recover", "--init real"), ("recover",
                                                                                       "--method forgetting"):
        told = bare.mistake(phase, "--backbones wrn10_1", flags)
        assert f"the images of --dataset {bare.dataset} have changed since" in told and "wrn10_1.pt" in told


def test_a_network_without_batch_norm_is_warned_of_where_only_batch_norm_acts(project):
    with redirect_stderr(io.StringIO()) as err:
        project.call("recover", "--method sre2l --teachers supervised --iterations 1")
    assert "convnet_w8 has no BatchNorm" in err.getvalue() and "wrn10_1 has no" not in err.getvalue()


# Starts

@pytest.mark.parametrize("method", ["gvbsm", "sre2l", "teddy"])
def test_real_starts_are_random_training_images_of_the_class(method, project):
    project.call("recover", f"--method {method} --teachers supervised --init real --lr 0 --iterations 1 "
                 f"--ipc 3 --subset 0")
    images, labels = training_images(project)
    mine = project.images(f"{method}-ipc3").reshape(4, 3, 16, 16, 3)
    for label in range(4):
        assert {image.tobytes() for image in mine[label]} < {image.tobytes()
                                                             for image in images[labels == label]}
        assert len({image.tobytes() for image in mine[label]}) == 3


def test_images_that_stay_are_those_of_the_start_and_the_others_are_made_as_if_they_were_all(project):
    project.call("recover", "--init herding --iterations 2")                 # --ipc 2
    project.call("recover", "--init herding --iterations 2 --ipc 4 --stay 0.5")
    project.call("recover", "--method herding --ipc 4")
    moved, partly, chosen = (project.images(name).reshape(4, -1, 16, 16, 3)
                             for name in ("gvbsm-ipc2", "gvbsm-ipc4", "herding-ipc4"))
    assert (partly[:, :2] == moved).all() and (partly[:, 2:] == chosen[:, 2:]).all()
    assert (partly[:, :2] != chosen[:, :2]).any((1, 2, 3, 4)).all()


def test_a_mosaic_start_is_made_of_four_times_as_many_images(project):
    project.call("recover", "--init herding --mosaic 2 --lr 0 --iterations 1")
    project.call("recover", "--method herding --ipc 8")
    whole = project.images("herding-ipc8").reshape(4, 4, 2, 16, 16, 3)  # class, tile, image
    small = whole.reshape(4, 4, 2, 8, 2, 8, 2, 3).mean((4, 6))
    for label, image in itertools.product(range(4), range(2)):
        mine = project.images().reshape(4, 2, 16, 16, 3)[label, image]
        tiles = [mine[8 * (k // 2):8 * (k // 2) + 8, 8 * (k % 2):8 * (k % 2) + 8] for k in range(4)]
        assert max(abs(tile - small[label, k, image]).max() for k, tile in enumerate(tiles)) <= 0.6


def test_the_chosen_crops_are_those_of_least_loss_of_the_first_backbone(project):
    project.call("recover", "--init crops --lr 0 --iterations 1")
    images, labels = training_images(project)
    record = checkpoint(project.teachers / "convnet_w8.pt")
    model = build_model("convnet_w8", 4, 16).eval()
    model.load_state_dict(record["weights"])
    mean, std = record["data"]["mean"], record["data"]["std"]
    for label in range(4):
        draw, members = generator("init", 0, label), np.flatnonzero(labels == label)
        chosen = members[torch.randperm(12, generator=draw).numpy()]
        boxes = draw_resized_crop(60, 16, draw, ratio=(1.0, 1.0)).view(12, 5, 4)
        assert (boxes[..., 2] == boxes[..., 3]).all()
        best = []
        for i, image in enumerate(chosen):
            pixels = normalize(torch.from_numpy(images[image]).permute(2, 0, 1)[None], mean, std)
            crops = [apply_resized_crop(pixels, boxes[i, k][None]) for k in range(5)]
            with torch.no_grad():
                losses = [F.cross_entropy(model(crop), torch.tensor([label])).item() for crop in crops]
            best.append((min(losses), crops[int(np.argmin(losses))]))
        best = [crop for _, crop in sorted(best, key=lambda pair: pair[0])][:2]
        for mine, crop in zip(project.images()[2 * label:2 * label + 2], best, strict=True):
            exact = ((crop[0] * torch.tensor(std)[:, None, None] + torch.tensor(mean)[:, None, None])
                     * 255).permute(1, 2, 0)
            assert abs(mine - exact.numpy()).max() <= 1


# One recipe

@pytest.mark.slow
def test_a_recipe_brings_labels_and_training_of_another_method():
    for column, method, recipe in itertools.product(("cifar100", "tiny", "shapes"), METHODS, METHODS):
        flags = ["--dataset", column, "--data-dir", "nowhere", "--method", method, "--recipe", recipe]
        for module in relabel, train_eval, recover:
            parsed = vars(module.parse_args(module.get_parser(), module.__name__, flags))
            expected = preset_values("paper", column, module.__name__, 10,
                                     method if module is recover else recipe)
            assert {flag: parsed[flag] for flag in expected} == expected


@pytest.mark.slow
def test_images_of_one_set_of_teachers_take_labels_of_another(project):
    project.call("squeeze", "--teachers other --seed 1")
    project.call("recover")
    line = project.mistake("relabel", "--backbones wrn10_1")
    assert "was made from weights of convnet_w8 wrn10_1, not of wrn10_1;" in line
    project.call("relabel", "--teachers other")
    project.call("train_eval", "--teachers other")


@pytest.mark.slow
def test_a_recipe_may_bring_other_backbones_of_the_same_set_but_none_trained_anew(project):
    project.call("recover", "--backbones wrn10_1")
    project.call("relabel", "--recipe random")
    project.call("train_eval", "--recipe random")
    project.call("squeeze", "--backbones wrn10_1 --seed 1 --overwrite")
    assert "wrn10_1" in project.mistake("relabel", "--recipe random --overwrite")


# Interrupted

WORKS = {
    "scores": ("squeeze", "--prune-ratio 0.25 --score-trials 2 --score-epochs 3 --score-batch-size 20",
               "scores.normalize", 8),
    "scores, when all are made": ("squeeze", "--prune-ratio 0.25 --score-trials 1 --score-epochs 2 "
                                  "--score-batch-size 20", "scores.save_torch", 1),
    "the training behind them": ("squeeze", "--prune-ratio 0.25 --score-trials 1 --score-epochs 1 --epochs 4",
                                 "gathered", 7),
    "weak teachers": ("squeeze", "--epochs 4 --save-epochs 1:4:1", "gathered", 10),
    "pruned teachers": ("squeeze", "--pruned 3 --backbones wrn10_1", "gathered", 12),
    "class statistics": ("collect_stats", "--class-statistics --batch-size 4 --overwrite", "normalize", 17),
    "a subset's images": ("recover", "--subset 2 --init real --iterations 9", "matching_gradient", 23)}


@pytest.mark.slow
@pytest.mark.parametrize("what", WORKS)
def test_interrupted_work_goes_on_to_the_same_bytes(what, squeezed, new_project, monkeypatch):
    phase, flags, function, call = WORKS[what]
    results = []
    for broken in False, True:
        project = new_project(squeezed.dataset)
        if phase != "squeeze":
            shutil.copytree(squeezed.root / "runs", project.root / "runs")
        if broken:
            *place, name = function.split(".")
            module = globals()[place[0] if place else phase]
            calls, original = itertools.count(1), getattr(module, name)

            def interrupting(*args, **kwargs):
                if next(calls) == call:
                    raise InterruptedError
                return original(*args, **kwargs)

            with monkeypatch.context() as patch, pytest.raises(InterruptedError):
                patch.setattr(module, name, interrupting)
                project.call(phase, flags, "--checkpoint-minutes 0")
        project.call(phase, flags.replace("--overwrite", "" if broken else "--overwrite"),
                     "--checkpoint-minutes 0")
        files = [path for path in project.results.rglob("*") if path.suffix in (".pt", ".png")]
        results.append({path.relative_to(project.results): plain(checkpoint(path)) if path.suffix == ".pt"
                        else path.read_bytes()
                        for path in files})
    assert results[0] == results[1] and len(results[0]) > 1


def plain(value):
    """What a checkpoint holds beside its arguments, comparable."""
    if isinstance(value, dict):
        return {key: plain(part) for key, part in value.items()
                if key not in ("args", "made_from", "checkpoint")}
    if isinstance(value, (list, tuple)):
        return [plain(part) for part in value]
    return value.tolist() if torch.is_tensor(value) else value
