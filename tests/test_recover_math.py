"""Recover: the closed form is the gradient of the equations as written, and batches that share a pass move as
alone."""
import math
from collections import Counter
from contextlib import nullcontext
from copy import deepcopy
from functools import cache
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.helpers import assert_near, counted_reductions, faked_graphs, randn, saved_bytes
from models import build_model
from recover import draw_iterations, make_batches, matching_gradient, noise, recover_batch
from utils import passes
from utils.augment import apply_view, draw_epoch, draw_view
from utils.closed_form import ClosedFormMatching, conv_stats, freeze
from utils.losses import data_densification, pooled_rows
from utils.run import generator
from utils.stats import Matching, layer_inputs, layer_weights, matched_layers

SMALL = ("resnet18", "convnet_w128", "mobilenetv2_05", "wrn16_2", "shufflenetv2_05")
FORMS = Matching, ClosedFormMatching
DATA = {"mean": (0.49, 0.48, 0.45), "std": (0.25, 0.24, 0.26), "classes": [str(label) for label in range(10)]}

MEAN, STD = (torch.tensor(DATA[key], dtype=torch.float64)[:, None, None] for key in ("mean", "std"))
LOW, HIGH = -MEAN / STD, (1 - MEAN) / STD


pytestmark = pytest.mark.usefixtures("seed")


@cache
def frozen(name, size):
    """A backbone in float64 as recover uses it, with running statistics of random images."""
    torch.manual_seed(0)
    model = build_model(name, 10, size).double().requires_grad_(False)
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.momentum = 1.0
    model.train()(randn(8, 3, size, size))
    return model.eval()


@cache
def dataset_statistics(name, patch, size):
    model = frozen(name, size)
    with torch.no_grad(), layer_inputs(model) as inputs:
        model(1 + randn(4, 3, size, size))
    return {layer: [vector[0] for vector in conv_stats(inputs[layer], patch)]
            for layer, module in matched_layers(model).items() if isinstance(module, nn.Conv2d)}


def convolutions(model):
    return [name for name, layer in matched_layers(model).items() if isinstance(layer, nn.Conv2d)]


def matching_of(form, name, size, patch=4, alpha=0.8, bn=0.7, conv=0.5, first=10.0):
    model = frozen(name, size)
    return form(model, dataset_statistics(name, patch, size), layer_weights(model, bn, conv, first),
                alpha=alpha, patch=patch)


# The closed form is the gradient

def iterate(matching, steps, groups):
    """Each step is (images, labels, dropped).   -> losses of BatchNorm, of convolutions, gradient of all at
    images"""
    state = matching.start(groups)
    for images, labels, dropped in steps:
        images = images.clone().requires_grad_()
        with matching.hooks(dropped) as inputs:
            logits = matching.model(images)
        bn, conv, state = matching.inject(inputs, state)
        yield bn.detach(), conv.detach(), torch.autograd.grad(F.cross_entropy(logits, labels) + bn + conv,
                                                              images)[0]


# size of the images, groups, drop rate, what else; maps of 2x2 pixels and, at 16, of one are among them
CASES = [
    (32, 1, 0.0, {}), (16, 3, 0.4, {}), (16, 1, 0.4, dict(patch=5)), (16, 1, 0.4, dict(patch=3)),
    (16, 1, 1.0, {}),
    (16, 1, 0.4, dict(bn=0.0)), (16, 1, 0.0, dict(conv=0.0)), (16, 1, 0.0, dict(bn=0.0, conv=0.0)),
    (16, 1, 0.4, dict(alpha=0.0)), (16, 1, 0.4, dict(first=0.0))]


@pytest.mark.parametrize("name, size, groups, drop, settings", [
    pytest.param(name, *case, marks=[pytest.mark.slow]
                 * (case != CASES[1] and name not in ("convnet_w128", "wrn16_2")))
    for case in CASES for name in SMALL], ids=str)
def test_the_closed_form_gives_the_losses_and_the_pixel_gradient_as_written(name, size, groups, drop,
                                                                            settings):
    plain, closed = (matching_of(form, name, size, **settings) for form in FORMS)
    steps = [(randn(2 * groups, 3, size, size), torch.randint(10, (2 * groups,)),
              [layer for layer in convolutions(plain.model) if torch.rand(()) < drop]) for _ in range(3)]
    both = zip(iterate(plain, steps, groups), iterate(closed, steps, groups), strict=True)
    for (_, _, dropped), (expected, actual) in zip(steps, both):
        for a, b in zip(actual, expected, strict=True):
            assert_near(a, b, 1e-9)
        acting = {layer for layer, weight in plain.weights.items() if weight} - set(dropped)
        convs = acting & set(convolutions(plain.model))
        assert (actual[0] > 0, actual[1] > 0) == (len(acting) > len(convs), len(convs) > 0)


@pytest.mark.parametrize("name, folded, norms", [
    ("resnet18", 20, 20), ("convnet_w128", 0, 0), ("mobilenetv2_05", 53, 53), ("wrn16_2", 7, 13),
    ("shufflenetv2_05", 56, 56)])
@pytest.mark.parametrize("drop", (pytest.param(0.0, marks=pytest.mark.slow), 0.4))
def test_a_frozen_backbone_gives_the_losses_and_the_gradient_of_the_one_it_was(name, folded, norms, drop):
    plain = matching_of(Matching, name, 16)
    model = freeze(deepcopy(plain.model))
    closed = ClosedFormMatching(model, plain.targets, plain.weights)
    frozen_norms = [layer for layer in model.modules() if isinstance(layer, nn.BatchNorm2d)]
    assert (sum(norm.folded for norm in frozen_norms), len(frozen_norms)) == (folded, norms)
    steps = [(randn(4, 3, 16, 16), torch.randint(10, (4,)),
              [layer for layer in convolutions(model) if torch.rand(()) < drop]) for _ in range(2)]
    for (images, _, _), expected, actual in zip(steps, iterate(plain, steps, 2), iterate(closed, steps, 2),
                                                strict=True):
        assert_near(model(images), plain.model(images), 1e-9)
        for a, b in zip(actual, expected, strict=True):
            assert_near(a, b, 1e-9)


@pytest.mark.parametrize("name, folded", [
    ("resnet18", 20), ("mobilenetv2", 52), ("efficientnet_b0", 49), ("shufflenetv2_05", 56),
    ("resnet50", 53)])
def test_so_do_those_of_large_images(name, folded):
    plain = matching_of(Matching, name, 72, patch=16)
    model = freeze(deepcopy(plain.model))
    closed = ClosedFormMatching(model, plain.targets, plain.weights, patch=16)
    steps = [(randn(2, 3, 72, 72), torch.randint(10, (2,)), [])]
    (expected,), (actual,) = iterate(plain, steps, 1), iterate(closed, steps, 1)
    for a, b in zip(actual, expected, strict=True):
        assert_near(a, b, 1e-8)
    assert sum(getattr(layer, "folded", False) for layer in model.modules()) == folded


@pytest.mark.parametrize("name, shared", [
    ("resnet18", 3), ("convnet_w128", 0), ("mobilenetv2_05", 0), ("wrn16_2", 3), ("shufflenetv2_05", 3)])
def test_each_tensor_is_reduced_once_though_shortcuts_share_their_inputs(name, shared, monkeypatch):
    reduced = counted_reductions(monkeypatch)
    matching = matching_of(ClosedFormMatching, name, 32, patch=1)           # at 1 nothing is resized
    with matching.hooks() as inputs, torch.no_grad():
        matching.model(randn(1, 3, 32, 32))
    matching.inject(inputs, matching.start(1))
    assert len(reduced) == len({id(x) for x in reduced}) == len(inputs) - shared


@pytest.mark.parametrize("name", SMALL)
def test_the_closed_form_keeps_no_graph_through_the_statistics(name):
    model, images, labels = frozen(name, 32), randn(4, 3, 32, 32).requires_grad_(), torch.randint(10, (4,))

    def step(form):
        matching = matching_of(form, name, 32)
        with matching.hooks() as inputs:
            loss = F.cross_entropy(model(images), labels)
        bn, conv, _ = matching.inject(inputs, matching.start(2))
        return loss + bn + conv

    bare = saved_bytes(model, lambda: F.cross_entropy(model(images), labels))
    assert saved_bytes(model, lambda: step(ClosedFormMatching)) == bare
    assert saved_bytes(model, lambda: step(Matching)) > bare


@pytest.mark.parametrize("name", SMALL)
def test_an_iteration_asks_the_device_for_no_value(name):
    """Tensors of the meta device have none: whoever reads one on the host fails."""
    matching = matching_of(ClosedFormMatching, name, 32)
    matching.model = freeze(deepcopy(matching.model)).to("meta")
    for key, value in vars(matching).items():
        if isinstance(value, torch.Tensor):
            setattr(matching, key, value.to("meta"))
    pixels, labels = torch.empty(2, 3, 3, 32, 32, device="meta"), torch.empty(2, 3, dtype=torch.long,
                                                                              device="meta")
    kept = torch.empty(len(matching.targets), dtype=torch.bool, device="meta")
    view = {key: value.to("meta") for key, value in draw_view(2, 32, "resized", True, 5,
                                                              generator("meta")).items()}
    gradient, losses, state = matching_gradient(matching, labels, 1.0, pixels.double(), view, kept,
                                                matching.start(2))
    assert gradient.shape == pixels.shape and all(tensor.is_meta for tensor in (gradient, *losses, *state))


def test_layer_weights_count_the_first_layer_more():
    for name in "wrn10_1", "convnet_w8":
        model = frozen(name, 16)
        weights = layer_weights(model, 0.3, 0.2, 10.0)
        assert list(weights) == list(matched_layers(model))
        for i, (layer, module) in enumerate(matched_layers(model).items()):
            assert weights[layer] == (0.3 if isinstance(module, nn.BatchNorm2d) else 0.2) * (10 if i == 0
                                                                                             else 1)


# The loop

DRAWN = dict(seed=0, iterations=4, choice="uniform", subset=0, drop_rate=0.4, crop="resized", flip=True,
             roll=5)
LOOP = dict(lr=0.1, ce_weight=1.0, dd_weight=5.0, tau=4.0, dd_scale="mean", unit_gradients=False)
BOUNDS = tuple(bound.float() for bound in (LOW, HIGH))


def recovered(pixels, labels, numbers, matchings, each=lambda t, losses, pixels: None, **changes):
    """recover_batch on a copy -> pixels, the backbones and losses of each iteration as plain numbers"""
    pixels, labels, reports = pixels.clone(), torch.as_tensor(labels), []
    drawn, loop = ({key: changes.pop(key, value) for key, value in table.items()} for table in (DRAWN, LOOP))
    draws = draw_iterations(drawn.pop("iterations"), matchings, pixels.shape[-1], batches=numbers, **drawn)
    for t, losses, _ in recover_batch(pixels, labels, matchings, draws,
                                      **dict(bounds=BOUNDS) | loop | changes):
        assert t == len(reports)
        reports.append({"backbone": draws[t]["backbones"][0],
                        **{term: value.item() for term, value in losses.items()}})
        each(t, losses, pixels)
    return pixels, reports


def matchings_of(form, names):
    return [matching_of(form, name, 16) for name in names]


@pytest.mark.parametrize("unit", (False, True))
def test_batches_that_share_a_pass_move_as_if_each_were_alone(unit):
    labels, numbers = [[0, 0, 1, 1, 1], [1, 1, 1, 1, 1], [0, 2, 0, 2, 3]], [7, 2, 3]
    pixels, settings = randn(3, 5, 3, 16, 16), dict(iterations=6, unit_gradients=unit)
    matchings = matchings_of(ClosedFormMatching, ("wrn10_1", "convnet_w8"))
    together, reports = recovered(pixels, labels, numbers, matchings, **settings)
    sums = [Counter() for _ in reports]
    for g in range(3):
        alone, own = recovered(pixels[g:g + 1], labels[g:g + 1], numbers[g:g + 1], matchings, **settings)
        assert_near(together[g], alone[0], 1e-9)
        for total, losses in zip(sums, own):
            total.update({**losses, "backbone": losses["backbone"] / 3})
    for shared, total in zip(reports, sums):
        assert shared == pytest.approx(total, rel=1e-9)
        assert min(shared["ce"], shared["conv"], shared["dd"]) > 0
    assert {losses["backbone"] for losses in reports} == {0, 1}


@pytest.mark.parametrize("names, labels, changes", [
    (("wrn10_1", "convnet_w8", "mobilenetv2_05"), [[0, 0, 1, 1], [2, 3, 2, 2]], {}),
    (("wrn10_1", "convnet_w8"), [[0, 0, 1, 2]], dict(choice="cycle", crop="pad4")),
    (("wrn10_1",), [[0, 0, 0], [1, 1, 2]], dict(drop_rate=0.0, dd_scale="sum", crop="none", flip=False,
                                                roll=0)),
    (("convnet_w8",), [[0, 0, 1, 1]], {}),                                          # no BatchNorm
    (("wrn10_1", "convnet_w8"), [[3, 1, 2], [4, 5, 6]], {}),                        # one image of each class
    (("wrn10_1", "convnet_w8"), [[5]], {}),                                         # a batch of one
    (("wrn10_1", "convnet_w8"), [[1, 1, 2, 2]], dict(drop_rate=1.0, dd_weight=0.0))])
def test_recovery_is_the_same_with_statistics_closed_and_plain(names, labels, changes):
    pixels = randn(len(labels), len(labels[0]), 3, 16, 16)
    (plain, expected), (closed, reports) = (
        recovered(pixels, labels, list(range(len(labels))), matchings_of(form, names),
                  dd_autograd=form is Matching, **dict(iterations=6) | changes)
        for form in FORMS)
    assert_near(closed, plain, 1e-9)
    for a, b in zip(reports, expected, strict=True):
        assert a == pytest.approx(b, rel=1e-9)
    alike = any(len(set(row)) < len(row) for row in labels) and "dd_weight" not in changes
    assert all((losses["dd"] > 0) == alike for losses in reports)


def test_recovery_is_the_same_by_graphs_which_drop_layers_by_a_mask(monkeypatch):
    graphed = faked_graphs(monkeypatch, passes)
    names, pixels, labels = ("wrn10_1", "convnet_w8",
                             "mobilenetv2_05"), randn(2, 4, 3, 16, 16), [[0, 0, 1, 1], [2, 3, 2, 2]]
    (images, reports), (expected, alike) = (
        recovered(pixels, labels, [0, 1], matchings_of(ClosedFormMatching, names), iterations=12,
                  choice="cycle", gradient=gradient)
        for gradient in (passes.graphed(matching_gradient), matching_gradient))
    assert_near(images, expected, 1e-6)  # rounding grows from step to step
    for a, b in zip(reports, alike, strict=True):
        assert a == pytest.approx(b, rel=1e-6)
    assert len(graphed) == 3 and sum(one.graph.replays for one in graphed) == 12 - 2 * 3


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("cuda_graphs", (False, True))
def test_a_gpu_recovers_what_the_cpu_does_and_never_waits(cuda_graphs):
    names, pixels, labels = ("wrn10_1", "convnet_w8",
                             "mobilenetv2_05"), randn(2, 4, 3, 16, 16), [[0, 0, 1, 1], [2, 3, 2, 2]]
    settings = dict(iterations=12, choice="cycle", dd_weight=0.0)  # densification: eigh waits by itself
    expected, _ = recovered(pixels, labels, [0, 1], matchings_of(ClosedFormMatching, names), **settings)
    matchings = []
    for name in names:
        model = freeze(deepcopy(frozen(name, 16))).cuda()
        targets = {layer: [v.cuda() for v in vectors] for layer,
                   vectors in dataset_statistics(name, 4, 16).items()}
        matchings.append(ClosedFormMatching(model, targets, layer_weights(model, 0.7, 0.5, 10.0)))

    gradient = passes.graphed(matching_gradient) if cuda_graphs else matching_gradient
    draws = draw_iterations(12, matchings, 16, batches=[0, 1], **{
        key: value for key, value in DRAWN.items() if key != "iterations"} | dict(choice="cycle"))
    images, loop = pixels.clone().cuda(), LOOP | dict(dd_weight=0.0,
                                                      bounds=[bound.cuda() for bound in BOUNDS],
                                                      gradient=gradient)
    try:
        for t, _, _ in recover_batch(images, torch.tensor(labels).cuda(), matchings, draws, **loop):
            torch.cuda.set_sync_debug_mode("error" if t < 11 else "default")
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert_near(images.cpu(), expected, 1e-6)


def test_auto_is_one_batch_on_a_cpu_and_on_a_gpu_what_fits_and_fills(monkeypatch):
    matchings = matchings_of(ClosedFormMatching, ("wrn10_1",))
    assert passes.fitting_groups(matching_gradient, matchings, 5, 16, torch.device("cpu")) == 1
    memory = iter([100, 400, 100, 400, 100, 400])
    for name, value in dict(reset_peak_memory_stats=None, empty_cache=None,
                            mem_get_info=(6000, 8000)).items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: next(memory))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda _: next(memory))
    for make in torch.zeros, torch.ones:
        monkeypatch.setattr(torch, make.__name__, lambda *size, device, make=make,
                            **kind: make(*size, **kind, device="meta"))
    gpu = torch.device("cuda")
    assert passes.fitting_groups(lambda *_: None, matchings, 50, 32, gpu) == 16  # 0.8 * 6000 / 300
    assert passes.fitting_groups(lambda *_: None, matchings, 40, 224, gpu) == 2  # two fill it
    assert passes.fitting_groups(lambda *_: None, matchings, 5000, 224, gpu) == 1


@pytest.mark.parametrize("unit", (False, True))
def test_recovery_is_adam_with_a_cosine_on_the_sum_of_the_losses_clamped_to_valid_pixels(unit):
    pixels, labels = 1.5 * randn(1, 5, 3, 16, 16), [[0, 0, 0, 1, 1]]
    settings = dict(iterations=5, choice="cycle", unit_gradients=unit, drop_rate=0.0, crop="none", flip=False,
                    roll=0, ce_weight=2.0)
    matchings = matchings_of(Matching, ("wrn10_1", "convnet_w8"))
    x, first, second, norms = pixels[0].clone(), 0, 0, []
    states = [matching.start(1) for matching in matchings]
    for t in range(5):
        x.requires_grad_()
        matching = matchings[t % 2]
        with matching.hooks() as inputs:
            logits = matching.model(x)
        bn, conv, states[t % 2] = matching.inject(inputs, states[t % 2])
        slope, = torch.autograd.grad(2 * F.cross_entropy(logits, torch.tensor(labels[0])) + bn + conv, x)
        norms.append(slope.norm().item())
        slope = slope / norms[-1] if unit else slope
        slope = slope + torch.autograd.grad(5 * data_densification(x, torch.tensor(labels[0]), 4.0, "mean"),
                                            x)[0]
        first, second = 0.5 * first + 0.5 * slope, 0.9 * second + 0.1 * slope ** 2
        step = first / (1 - 0.5 ** (t + 1)) / ((second / (1 - 0.9 ** (t + 1))).sqrt() + 1e-8)
        x = (x.detach() - 0.1 * (1 + math.cos(math.pi * t / 5)) / 2 * step).maximum(LOW).minimum(HIGH)
    for form in FORMS:
        result, reports = recovered(pixels, labels, [0], matchings_of(form, ("wrn10_1", "convnet_w8")),
                                    dd_autograd=form is Matching, **settings)
        assert [losses["gradient"] for losses in reports] == pytest.approx(norms, rel=1e-4)
        assert (result[0] - x).abs().max() < 1e-6  # the bounds are those of float32


@pytest.mark.parametrize("unit", (False, True))
def test_with_unit_gradients_no_backbone_is_louder_than_another(unit):
    pixels, settings = randn(1, 4, 3, 16, 16), dict(choice="cycle", unit_gradients=unit, ce_weight=0.0,
                                                    dd_weight=0.0)
    names = "wrn10_1", "convnet_w8"
    alike, louder = ([matching_of(ClosedFormMatching, name, 16, bn=loud, conv=loud) for name,
                      loud in zip(names, (1, times))]
                     for times in (1, 1000))
    images, others = (recovered(pixels, [[0, 0, 1, 1]], [0], matchings, **settings)[0]
                      for matchings in (alike, louder))
    assert torch.allclose(images, others, atol=1e-6) == unit


def test_pixels_stay_in_the_valid_range_of_every_channel():
    seen = []
    pixels = 3 * randn(2, 2, 3, 8, 8)
    recovered(pixels, [[0, 1], [2, 3]], [0, 1], [Spy()], lambda t, losses,
              pixels: seen.append(pixels.detach().clone()), lr=0.5)
    for images in seen:
        assert (images >= LOW - 1e-6).all() and (images <= HIGH + 1e-6).all()
        assert ((images - LOW).abs() < 1e-6).any() and ((images - HIGH).abs() < 1e-6).any()


def test_averages_and_optimizer_start_anew_with_every_image_batch():
    matchings = matchings_of(ClosedFormMatching, ("wrn10_1", "convnet_w8"))
    pixels = randn(1, 4, 3, 16, 16)
    first, again = (recovered(pixels, [[0, 0, 1, 1]], [0], matchings)[0] for _ in range(2))
    assert torch.equal(first, again)


def test_the_learning_rate_falls_along_a_cosine_to_0(monkeypatch):
    rates = []

    class Recorded(torch.optim.Adam):
        def step(self):
            rates.append(self.param_groups[0]["lr"])
            super().step()

    monkeypatch.setattr(torch.optim, "Adam", Recorded)
    recovered(randn(1, 2, 3, 8, 8), [[0, 1]], [0], [Spy()], iterations=100, lr=0.05)
    assert rates == pytest.approx([0.025 * (1 + math.cos(math.pi * t / 100)) for t in range(100)])
    assert rates[0] == 0.05 and 0 < rates[-1] < 2e-5


class Spy:
    """A matching that only records: linear logits of the mean colour, targets of three convolutions and a
    BatchNorm."""

    targets = {"a": (0,) * 4, "bn": (0,) * 2, "b": (0,) * 4, "c": (0,) * 4}

    def __init__(self):
        self.images, self.dropped, self.weight = [], [], randn(3, 10)

    def start(self, groups):
        return None

    def hooks(self, dropped=()):
        self.dropped.append(tuple(dropped))
        return nullcontext({})

    def model(self, images):
        self.images.append(images.detach().clone())
        return images.mean((2, 3)) @ self.weight

    def inject(self, inputs, state, kept):
        return self.weight.new_zeros(()), self.weight.new_zeros(()), state


def spied(numbers=(0,), spies=3, **changes):
    """A run on equal images that stay as they are.
    -> of each iteration: the backbone's index, dropped layers, images shown [iterations, batches, 2, 3, 8,
    8]"""
    spies = [Spy() for _ in range(spies)]
    image = torch.linspace(-1, 1, 192, dtype=torch.float64).view(3, 8, 8)
    _, reports = recovered(image.expand(len(numbers), 2, -1, -1, -1), [[0, 1]] * len(numbers), list(numbers),
                           spies, lr=0.0, **changes)
    chosen = [losses["backbone"] for losses in reports]
    place = [chosen[:t].count(k) for t, k in enumerate(chosen)]
    dropped = [spies[int(k)].dropped[i] for k, i in zip(chosen, place)]
    images = torch.stack([spies[int(k)].images[i] for k, i in zip(chosen, place)])
    return chosen, dropped, images.unflatten(1, (len(numbers), 2))


def within(count, n, p):
    """A binomial count within four standard errors."""
    return abs(count - n * p) <= 4 * math.sqrt(n * p * (1 - p))


def test_backbones_are_drawn_uniformly_and_convolutions_dropped_independently_at_the_rate():
    chosen, dropped, _ = spied(iterations=600, drop_rate=0.4)
    assert all(within(chosen.count(k), 600, 1 / 3) for k in range(3))
    assert within(sum(a == b for a, b in zip(chosen, chosen[1:])), 599, 1 / 3)      # no round-robin
    for layers in product((0, 1), repeat=3):
        pattern = tuple(name for name, out in zip("abc", layers) if out)            # never the BatchNorm
        assert within(dropped.count(pattern), 600, math.prod(0.4 if out else 0.6 for out in layers))
    assert not any(spied(drop_rate=0.0)[1]) and set(spied(drop_rate=1.0)[1]) == {("a", "b", "c")}


def test_cycle_takes_the_backbones_in_turn():
    assert spied(iterations=8, choice="cycle")[0] == [0, 1, 2, 0, 1, 2, 0, 1]


@pytest.mark.parametrize("crop, flip, roll", [
    ("resized", False, 0), ("pad4", False, 0), ("none", True, 0), ("none", False, 7)])
def test_a_batch_has_one_view_that_depends_on_seed_iteration_and_its_number(crop, flip, roll):
    settings = dict(iterations=12, crop=crop, flip=flip, roll=roll)
    chosen, dropped, views = spied((4, 9), **settings)
    assert torch.equal(views[:, :, 0], views[:, :, 1])                              # of the whole batch
    for g, number in enumerate((4, 9)):
        alone = spied((number,), **settings)
        assert alone[:2] == (chosen, dropped) and torch.equal(alone[2][:, 0], views[:, g])
    other = spied((4, 9), seed=1, **settings)
    assert other[0] != chosen and other[1] != dropped and not torch.equal(other[2], views)
    assert not torch.equal(views[:, 0], views[:, 1]) and len(views[:, 0].unique(dim=0)) > 1


def test_without_augmentation_the_network_sees_the_pixels():
    views = spied(crop="none", flip=False, roll=0)[2]
    assert torch.equal(views[0, 0, 0].flatten(), torch.linspace(-1, 1, 192, dtype=torch.float64))


def test_pixels_are_changed_in_place_and_stay_without_a_graph():
    pixels, labels = randn(1, 2, 3, 8, 8), torch.tensor([[0, 1]])
    before = pixels.clone()
    for _ in recover_batch(pixels, labels, [Spy()], draw_iterations(2, [Spy()], 8, seed=0), bounds=BOUNDS):
        assert not pixels.requires_grad and pixels.grad is None and not torch.equal(pixels, before)


@pytest.mark.parametrize("form", FORMS)
def test_a_state_goes_on_to_the_same_pixels(form):
    matchings, labels, start = matchings_of(form, ("wrn10_1",
                                                   "convnet_w8")), torch.tensor([[0, 0, 1]]), randn(1, 3, 3,
                                                                                                    16, 16)
    draws, whole, first, rest = draw_iterations(6, matchings, 16, seed=0), *(start.clone() for _ in range(3))
    states = [deepcopy(state()) for _, _, state in recover_batch(whole, labels, matchings, draws,
                                                                 bounds=BOUNDS)]
    assert [state["iterations"] for state in states] == [1, 2, 3, 4, 5, 6]
    for at in 2, 5:
        steps = [t for t, _, _ in recover_batch(rest, labels, matchings, draws, bounds=BOUNDS,
                                                resume=deepcopy(states[at - 1]))]
        assert steps == list(range(at, 6)) and torch.equal(rest, whole)


def test_averages_carried_over_are_the_past_of_the_first_iteration():
    matching, labels, start = matching_of(Matching, "wrn10_1", 16), torch.tensor([[0, 1]]), randn(1, 2, 3, 16,
                                                                                                  16)
    draws = draw_iterations(1, [matching], 16, seed=0, drop_rate=0.0, crop="none")
    values = []
    for averages in None, [matching.start(1)]:
        for _, losses, state in recover_batch(start.clone(), labels, [matching], draws, bounds=BOUNDS,
                                              averages=averages):
            values.append(losses["conv"])
    assert torch.equal(*values)
    carried, other = state()["averages"], randn(1, 2, 3, 16, 16)
    (_, losses, _), = recover_batch(other.clone(), labels, [matching], draws, bounds=BOUNDS, averages=carried)
    with matching.hooks() as inputs:
        matching.model(other[0])
    assert_near(losses["conv"], matching.inject(inputs, carried[0])[1].detach(), 1e-12)
    assert not torch.allclose(losses["conv"], matching.inject(inputs, matching.start(1))[1])


def test_densification_on_the_view_is_that_of_what_the_backbone_sees():
    pixels, labels, spy = 0.3 * randn(1, 4, 3, 8, 8), torch.tensor([[0, 0, 1, 1]]), Spy()
    draws = draw_iterations(1, [spy], 8, seed=0, crop="pad2", flip=True)
    view = apply_view(pixels.flatten(1, 2), draws[0]["view"]).view(4, 3, 8, 8)
    for dd_on, autograd in product(("pixels", "view"), (True, False)):
        (_, losses, _), = recover_batch(pixels.clone(), labels, [spy], draws, bounds=BOUNDS, dd_on=dd_on,
                                        dd_weight=3.0, dd_autograd=autograd)
        assert_near(losses["dd"], 3 * data_densification(pixels[0] if dd_on == "pixels" else view, labels[0]),
                    1e-9)


def test_weight_decay_is_adams():
    pixels, labels = randn(1, 2, 3, 8, 8), torch.tensor([[0, 1]])
    draws = draw_iterations(1, [Spy()], 8, seed=0)
    for decay in 0.0, 0.1:
        images = pixels.clone()
        (_, losses, _), = recover_batch(images, labels, [Spy()], draws, bounds=(LOW - 9, HIGH + 9),
                                        ce_weight=0.0, lr=0.1, weight_decay=decay, dd_weight=0.0)
        step = 0.1 * pixels.sign() if decay else torch.zeros_like(pixels)                   # Adam's first
        assert (images - (pixels - step)).abs().max() < 1e-5


def test_shapes_that_do_not_fit_are_named():
    draws = draw_iterations(1, [Spy()], 8, seed=0)
    for images, labels in (randn(2, 3, 8, 8), torch.tensor([0, 1])), (randn(1, 2, 3, 8, 8),
                                                                      torch.tensor([[0, 1, 2]])):
        with pytest.raises(ValueError, match=r"images of shape \(.*labels of shape \(.*\[groups, batch"):
            next(recover_batch(images, labels, [Spy()], draws, bounds=BOUNDS))
    images, labels = randn(2, 1, 3, 8, 8), torch.tensor([[0], [1]])
    for images, words in ((images, r"other groups.* batches=range\(2\)"),
                          (images[..., ::2, ::2], "sizes; give .* 4,")):
        with pytest.raises(ValueError, match=words):
            next(recover_batch(images, labels, [Spy()], draws, bounds=BOUNDS))


@pytest.mark.parametrize("call, words", [
    (lambda: make_batches(2, 2, 2, "reordered"), "loop 'reordered' is neither 'reorder' nor 'original'"),
    (lambda: draw_iterations(1, [Spy()], 8, seed=0, choice="uniforms"), "choice 'uniforms' is neither"),
    (lambda: draw_iterations(1, [Spy()], 8, seed=0, subset=2), "subset of 2 is more than the 1 matchers"),
    (lambda: draw_iterations(1, [Spy()], 8, seed=0, crop="rezised"), "crop 'rezised' is none of"),
    (lambda: draw_iterations(1, [Spy()], 8, seed=0, crop="cosin"), "crop 'cosin' is none of"),
    (lambda: draw_epoch(2, 8, 2, "mixUp", torch.Generator()), "mix 'mixUp' is none of"),
    (lambda: pooled_rows(randn(1, 3, 8, 8), "men"), "scale 'men' is neither"),
    (lambda: next(recover_batch(randn(1, 1, 3, 8, 8), torch.zeros(1, 1).long(), [Spy()],
                                draw_iterations(1, [Spy()], 8, seed=0), bounds=BOUNDS, dd_on="pixel")),
     "dd_on 'pixel' is neither")])
def test_words_that_are_none_of_a_choice_are_named(call, words):
    with pytest.raises(ValueError, match=words):
        call()


# Batches and their start

# classes, ipc, batch size
GRID = list(product((1, 2, 3, 7, 10), (1, 2, 3, 5, 10, 50), (1, 2, 3, 4, 7, 10, 50, 100)))


@pytest.mark.parametrize("loop", ("reorder", "original"))
def test_every_image_is_in_exactly_one_batch_and_no_batch_is_too_large(loop):
    for num_classes, ipc, batch_size in GRID:
        batches = make_batches(num_classes, ipc, batch_size, loop)
        assert all(1 <= len(batch) <= batch_size for batch in batches)
        assert sorted(sum(batches, [])) == list(product(range(num_classes), range(ipc)))


def test_the_original_loop_has_at_most_one_image_of_a_class_in_a_batch():
    for num_classes, ipc, batch_size in GRID:
        batches = make_batches(num_classes, ipc, batch_size, "original")
        assert all(len({label for label, _ in batch}) == len(batch) for batch in batches)
        assert len(batches) == ipc * math.ceil(num_classes / batch_size)


def test_the_reorder_loop_keeps_classes_together_and_takes_as_many_as_fit():
    for num_classes, ipc, batch_size in GRID:
        batches = make_batches(num_classes, ipc, batch_size, "reorder")
        classes = [{label for label, _ in batch} for batch in batches]
        if ipc <= batch_size:
            assert sum(map(len, classes)) == num_classes                            # none is cut
            assert all(len(batch) + ipc > batch_size for batch in batches[:-1])
        else:
            assert all(len(members) == 1 for members in classes)
            assert len(batches) == num_classes * math.ceil(ipc / batch_size)


def test_noise_is_normal_and_depends_on_seed_class_and_index_alone():
    start = noise(3, 7, 64, 0)
    torch.rand(5)
    assert start.shape == (3, 64, 64) and torch.equal(noise(3, 7, 64, 0), start)
    others = [noise(*key) for key in ((3, 7, 64, 1), (4, 7, 64, 0), (3, 8, 64, 0), (7, 3, 64, 0))]
    for other in others:
        assert abs((start * other).mean()) < 4 / start.numel() ** 0.5               # not even correlated
    assert abs(start.mean()) < 4 / start.numel() ** 0.5
    assert abs(start.var() - 1) < 4 * (2 / start.numel()) ** 0.5
