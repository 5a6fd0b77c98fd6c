"""Class-incremental learning and data-free pruning: what is seen in each step, no leaks, kills, results and
mistakes."""
import json
import statistics
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import train_eval
from models import build_model
from models.pruning import channel_scales
from utils import protocols, report
from utils.data import load_split
from utils.labels import SeenLabels, StoredLabels
from utils.protocols import classes_so_far, incremental_step, prune
from utils.run import generator

CONTINUAL = "--protocol continual --steps 2 --orders 2"
PRUNE = "--protocol prune --students wrn10_1 --sparsity 0.5"


def result_of(project, name):
    """A result file but for what depends on time and memory."""
    result = json.loads((project.run() / "eval" / f"{name}.json").read_text())
    return {key: value for key, value in result.items() if key not in ("seconds", "peak_memory")}


@pytest.fixture
def recorded(monkeypatch):
    """recorded(module, name): a list of the arguments of the calls of module.name from now on."""
    def watch(module, name):
        function, calls = getattr(module, name), []
        monkeypatch.setattr(module, name, lambda *args,
                            **kwargs: calls.append(args) or function(*args, **kwargs))
        return calls
    return watch


# Classes in steps

@pytest.mark.parametrize("count, steps, sizes", [(10, 5, [2] * 5), (10, 3, [4, 3, 3]), (4, 4, [1] * 4),
                                                 (7, 1, [7])])
def test_classes_arrive_in_steps_as_equal_as_possible_and_stay(count, steps, sizes):
    seen = [part.tolist() for part in classes_so_far(count, steps, generator(0))]
    assert [len(after) - len(before) for before, after in zip([[], *seen], seen)] == sizes
    assert all(set(before) < set(after) for before,
               after in zip(seen, seen[1:])) and seen[-1] == list(range(count))
    assert all(part == sorted(part) for part in seen)


def test_the_order_of_the_classes_is_that_of_the_generator_and_each_class_can_come_first():
    first = [classes_so_far(10, 10, generator(seed))[0].item() for seed in range(100)]
    assert set(first) == set(range(10)) and first == [classes_so_far(10, 10, generator(seed))[0].item()
                                                      for seed in range(100)]


def made_up(epochs=12, n=12, classes=4, seed=0):
    """Labels as `StoredLabels` gives them, whose logits and crops tell where they come from."""
    rng = np.random.default_rng(seed)
    tell = np.arange(epochs)[:, None, None] * 10000 + np.arange(n)[:, None] * 100 + np.arange(classes)
    stored = object.__new__(StoredLabels)
    stored.mix, stored.logits = "cutmix", tell.astype(np.float64)
    stored.drawn = {"crop": tell, "flip": rng.random((epochs, n)) < 0.5, "box": tell,
                    "partner": np.stack([rng.permutation(n) for _ in range(epochs)]).astype(np.int32),
                    "ratio": rng.random((epochs, n), dtype=np.float32)}
    return stored


@pytest.mark.parametrize("used", [12, 7])
def test_each_image_takes_those_of_its_stored_samples_in_turn_that_show_no_class_to_come(used):
    stored, seen = made_up(), torch.tensor([1, 2])
    images = torch.arange(12) % 4
    labels = SeenLabels(stored, used, torch.isin(images, seen), seen)
    rows = labels.rows.tolist()
    assert rows == [i for i in range(12) if i % 4 in (1, 2)]
    for epoch in range(20):
        draw = labels.epoch(epoch)
        logits = labels.soft_logits(epoch, torch.arange(len(rows)).flip(0),
                                    torch.zeros(1, dtype=torch.float64)).flip(0)
        for at, image in enumerate(rows):                            # the slow loop
            fits = [e for e in range(used) if stored.drawn["partner"][e, image] in rows]
            e = fits[epoch % len(fits)]
            assert logits[at].tolist() == [10000 * e + 100 * image + c for c in (1, 2)]
            assert rows[draw["partner"][at]] == stored.drawn["partner"][e, image]
            assert draw["crop"][at].tolist() == stored.drawn["crop"][e, image].tolist()
            assert draw["crop"][at].tolist() == draw["box"][at].tolist()
            assert (draw["flip"][at], draw["ratio"][at]) == (stored.drawn["flip"][e, image],
                                                             stored.drawn["ratio"][e, image])


def test_an_image_whose_samples_all_show_classes_to_come_is_left_out_and_so_are_those_that_had_it_alone():
    stored = made_up(epochs=2, n=6)
    stored.drawn["partner"][:] = [3, 0, 2, 4, 5, 1]  # 0: of class 1; 1: of 0; 2: of itself; 3 ...
    few = torch.tensor([0, 0, 0, 1, 1, 1])
    labels = SeenLabels(stored, 2, few == 0, torch.tensor([0]))
    assert labels.rows.tolist() == [2] and labels.epoch(1)["partner"].tolist() == [0]
    assert SeenLabels(stored, 2, few >= 0, torch.tensor([0, 1])).rows.tolist() == list(range(6))
    with pytest.raises(ValueError, match="free of classes to come"):
        SeenLabels(stored, 2, torch.tensor([1, 1, 0, 0, 0, 0]).bool(), torch.tensor([0]))


def test_with_all_classes_labels_are_what_they_were():
    stored = made_up()
    labels = SeenLabels(stored, 12, torch.ones(12, dtype=torch.bool), torch.arange(4))
    for epoch in range(12):
        whole, batch = stored.epoch(epoch), torch.randperm(12)
        assert all(torch.equal(value, whole[key]) for key, value in labels.epoch(epoch).items())
        ask = epoch, batch, torch.zeros(1)
        assert torch.equal(labels.soft_logits(*ask), stored.soft_logits(*ask))


def test_a_step_holds_the_images_and_test_images_of_its_classes_numbered_among_them(beasts):
    test = load_split(str(beasts), None, "test", 16, 0)
    images, classes = torch.arange(12).view(12, 1, 1, 1), torch.arange(12) % 4
    data = {"classes": test.classes, "image_size": 16}
    labels = SimpleNamespace(of=lambda rows, seen: (rows.nonzero().flatten(), "labels"))
    step = incremental_step(torch.tensor([1, 3]), images, classes, labels, test, data)
    assert step["images"].flatten().tolist() == [1, 3, 5, 7, 9, 11] and step["classes"].tolist() == [0, 1] * 3
    assert (step["data"], step["labels"]) == ({"classes": ["9", "bee"], "image_size": 16}, "labels")
    pixels, numbers = (torch.cat(parts) for parts in zip(*step["test"].batches(5)))
    kept = [i for i, label in enumerate(test.labels.tolist()) if label in (1, 3)]
    assert torch.equal(pixels, test.images[kept]) and numbers.tolist() == [[1, 3].index(test.labels[i])
                                                                           for i in kept]
    assert len(kept) == 12


# Class-incremental learning by train_eval.py

@pytest.mark.parametrize("labels", ["stored", "online", "hard"])
def test_a_student_sees_images_and_logits_of_the_classes_so_far_alone(labels, relabelled, recorded):
    seen, losses = recorded(train_eval, "apply_epoch"), recorded(train_eval, "student_loss")
    result = relabelled.call("train_eval", CONTINUAL, "--orders 1 --labels", labels)
    every = torch.from_numpy(relabelled.images()).permute(0, 3, 1, 2).to(torch.uint8)
    first = classes_so_far(4, 2, generator("class order", 0, 0))[0].tolist()
    allowed = {image.numpy().tobytes() for image, c in zip(every, [0, 0, 1, 1, 2, 2, 3, 3]) if c in first}
    steps = [(images, draw, batch) for images, draw, batch, *_ in seen]
    assert len(steps) == 6
    for images, draw, batch in steps[:3]:
        assert {image.numpy().tobytes() for image in images} <= allowed
        assert max(draw["partner"]) < len(images) == len(batch) == result["curve_images"][0][0]
    for logits, y, soft, partner_y, _ in losses[:3]:
        assert logits.shape[1] == 2 and {*y.tolist(), *partner_y.tolist()} <= {0, 1}
        assert labels == "hard" or soft.shape == logits.shape
    assert len(steps[3][0]) == 8 and losses[3][0].shape[1] == 4


def test_the_curve_is_over_orders_and_seeds_and_ends_with_what_all_classes_give(relabelled):
    result = relabelled.call("train_eval", CONTINUAL, "--student-seeds 0 1 --checkpoint-minutes 0")
    assert [path.name for path in (relabelled.run() / "eval").iterdir()] == ["convnet_w8-continual2.json"]
    curves = result["curves"]
    assert [len(curve) for curve in curves] == [2] * 4 and result["curve_images"][0][1] == 8
    assert result["curve"] == [pytest.approx(statistics.fmean(step)) for step in zip(*curves)]
    assert result["curve_std"] == [pytest.approx(statistics.stdev(step)) for step in zip(*curves)]
    assert (result["top1"], result["top1_per_seed"]) == (result["curve"][-1], [curves[0][1], curves[2][1]])
    whole = relabelled.call("train_eval", "--student-seeds 0 1")
    keys = "top1_by_epoch", "top1_per_seed", "top1_std"
    assert [result[key] for key in keys] == [whole[key] for key in keys] and curves[0][1] == curves[1][1]
    assert [key[1:] for key in report.read_results(relabelled.results)] == [("convnet_w8", "stored", "gvbsm",
                                                                             None)]
    assert report.read_results(relabelled.results)[2, "convnet_w8", "stored", "gvbsm",
                                                   None]["args"]["protocol"] == "standard"


def test_all_classes_are_trained_on_once_for_a_seed(relabelled, recorded):
    seen = recorded(train_eval, "apply_epoch")
    relabelled.call("train_eval", "--protocol continual --steps 4 --orders 3 --labels hard --epochs 1")
    classes = [len(set(call[0].flatten(1).sum(1).tolist())) for call in seen]
    assert len(seen) == 3 * 3 + 1 and classes.count(max(classes)) == 1


@pytest.mark.slow
def test_the_five_orders_differ_and_are_those_of_the_seed(relabelled, monkeypatch):
    orders = []
    monkeypatch.setattr(protocols, "classes_so_far",
                        lambda *args: orders.append(classes_so_far(*args)) or orders[-1])
    for seed in 0, 0, 1:
        relabelled.call("train_eval", "--protocol continual --steps 4 --labels hard --epochs 1 --overwrite "
                        "--seed", seed)
    told = [str([step.tolist() for step in order]) for order in orders]
    assert len(told) == 15 and told[:5] == told[5:10] != told[10:] and len(set(told[:5])) > 2


@pytest.mark.slow
@pytest.mark.parametrize("flags, module, call, at", [
    (CONTINUAL, train_eval, "train_student", 3), (CONTINUAL, train_eval, "student_loss", 5),
    (PRUNE, train_eval, "student_loss", 2),
    (PRUNE, train_eval, "student_loss", 5), (f"{PRUNE} --precision bf16", protocols, "shrink", 1)])
def test_an_interrupted_protocol_goes_on_as_if_nothing_had_happened(flags, module, call, at, relabelled,
                                                                    interrupt, monkeypatch, recorded):
    name = "convnet_w8-continual2" if flags == CONTINUAL else "wrn10_1-prune50"
    flags += " --batch-size 4 --whole-up-to 0 --checkpoint-minutes 0"
    relabelled.call("train_eval", flags)
    whole = result_of(relabelled, name)
    steps = recorded(train_eval, "student_loss")
    relabelled.call("train_eval", flags, "--overwrite")
    every = len(steps)
    (relabelled.run() / "eval" / f"{name}.json").unlink()
    with pytest.raises(InterruptedError), monkeypatch.context():
        interrupt(module, call, at)
        relabelled.call("train_eval", flags)
    monkeypatch.undo()
    steps = recorded(train_eval, "student_loss")
    relabelled.call("train_eval", flags)
    assert result_of(relabelled, name) == whole and 0 < len(steps) < every


# Data-free pruning by train_eval.py

def test_a_teacher_is_pruned_on_the_distilled_images_and_all_stages_are_told(relabelled):
    result = relabelled.call("train_eval", PRUNE, "--student-seeds 0 1 --sparsity 0.4")
    assert [path.name for path in (relabelled.run() / "eval").iterdir()] == ["wrn10_1-prune40.json"]
    stages = result["stages"]
    teacher = torch.load(relabelled.teachers / "wrn10_1.pt", weights_only=True)
    count = sum(p.numel() for p in build_model("wrn10_1", 4, 16).parameters())
    assert list(stages) == ["teacher", "sparse", "pruned", "tuned"]
    assert stages["teacher"] == {"top1": [pytest.approx(teacher["top1"])] * 2, "parameters": [count] * 2}
    assert stages["sparse"]["parameters"] == [count] * 2 and max(stages["pruned"]["parameters"]) < count
    assert stages["tuned"]["parameters"] == stages["pruned"]["parameters"]
    assert result["top1_per_seed"] == stages["tuned"]["top1"]
    assert result["top1"] == statistics.fmean(result["top1_per_seed"])
    assert result["upstream"]["squeeze"]["wrn10_1"]["epochs"] == 2 and result["made_from"]["teacher"]
    assert not report.read_results(relabelled.results)


def test_the_penalty_is_the_l1_norm_of_the_scales_that_may_go(relabelled, monkeypatch):
    kept = []

    def keep(weights):
        kept.append({key: value.clone() for key, value in weights.items()})

    monkeypatch.setattr(train_eval, "prune", lambda *args: prune(*args[:-1], keep))
    once = "--epochs 1 --optimizer sgd --momentum 0 --lr 0.1 --schedule constant --weight-decay 0 --overwrite"
    for l1 in 0, 0.5:
        relabelled.call("train_eval", PRUNE, once, "--l1", l1)
    model = build_model("wrn10_1", 4, 16)
    scales = {name for name, p in model.named_parameters()
              if any(p is scale for scale in channel_scales(model).values())}
    assert len(scales) == len(channel_scales(model)) > 0
    for name, without in kept[0].items():
        # all scales begin at about 1
        difference = 0.1 * 0.5 * without.sign() if name in scales else torch.zeros(())
        assert torch.allclose(without.float() - kept[1][name], difference.float().expand_as(without),
                              atol=1e-6), name


def test_a_network_is_trained_pruned_and_trained_again_and_tested_in_between():
    torch.manual_seed(0)
    model, called = build_model("wrn10_1", 4, 16), []

    def train(stage, trained, penalty):
        called.append((stage, float(torch.as_tensor(penalty()).detach())))
        return {1: 5.0}

    result = prune(model, train, lambda tested: len(called), 0.5, 0.25)
    total = sum(len(scale) for scale in channel_scales(build_model("wrn10_1", 4, 16)).values())
    # scales of 1: none goes
    assert called == [("sparse", 0.25 * total), ("tuned", 0.0)] and result["top1"] == {1: 5.0}
    assert [stage["top1"] for stage in result["stages"].values()] == [0, 1, 1, 5]


# Mistakes

@pytest.mark.parametrize("flags, words", [
    (f"{CONTINUAL} --steps 5", ["--steps 5", "4 classes"]),
    ("--protocol prune --students convnet_w8", ["--students convnet_w8", "BatchNorm", "resnet18"]),
    ("--protocol prune --students wrn10_1 vgg11_bn",
     ["vgg11_bn.pt is missing", "squeeze.py", "--backbones vgg11_bn"])])
def test_what_a_protocol_cannot_do_ends_in_a_line(flags, words, relabelled):
    line = relabelled.mistake("train_eval", flags)
    assert all(word in line for word in words), line


def test_labels_that_all_show_classes_to_come(relabelled):
    path = relabelled.run() / "labels/partner.npy"
    # always of the class before
    np.save(path, np.roll(np.tile(np.arange(8, dtype=np.int32), (3, 1)), 2, axis=1))
    line = relabelled.mistake("train_eval", CONTINUAL, "--steps 4")
    assert "--steps 4" in line and "--labels online" in line
    assert relabelled.call("train_eval", CONTINUAL, "--steps 4 --labels online")["curve_images"][0] == [2, 4,
                                                                                                        6, 8]


def test_a_teacher_trained_anew_since_it_was_pruned(relabelled):
    relabelled.call("train_eval", PRUNE)
    record = torch.load(relabelled.teachers / "wrn10_1.pt", weights_only=True)
    torch.save(record | {"top1": 0.0}, relabelled.teachers / "wrn10_1.pt")
    assert "made from other teacher" in relabelled.mistake("train_eval", PRUNE)


def test_a_teacher_of_other_images(relabelled):
    record = torch.load(relabelled.teachers / "wrn10_1.pt", weights_only=True)
    torch.save(record | {"data": record["data"] | {"mean": [0.0, 0.0, 0.0]}},
               relabelled.teachers / "wrn10_1.pt")
    line = relabelled.mistake("train_eval", PRUNE)
    assert "wrn10_1.pt" in line and "differ in mean" in line
