"""Statistics of layer inputs against slow loops, the hooks that read them, and the closed form of their
gradient."""
import math
from copy import deepcopy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import gradcheck

from tests.helpers import assert_near, counted_reductions, gradient, randn
from models import build_model
from utils import closed_form
from utils.closed_form import (ClosedFormMatching, FrozenNorm, Inject, affine_terms, bn_stats, conv_stats,
                               freeze, segment_norms)
from utils.losses import sds_match
from utils.stats import (Matching, channel_stats, layer_inputs, matched_layers, patch_stats, statistics_of,
                         whole_patches)

SHAPES = [  # height, width, patch
    (8, 12, 4), (4, 4, 4), (3, 6, 1),               # whole patches, one patch, single pixels
    (7, 10, 4), (8, 10, 4), (5, 4, 4),              # resized on both axes, on one of them
    (3, 5, 8), (2, 2, 4), (1, 1, 4), (1, 1, 1)]     # a map smaller than the patch, a map of one pixel
WHOLE = [shape for shape in SHAPES if shape[0] % shape[2] == shape[1] % shape[2] == 0]


pytestmark = pytest.mark.usefixtures("seed")


def moments(values):
    mean = sum(values) / len(values)
    return mean, sum((value - mean) ** 2 for value in values) / len(values)


def enlarged(rows, height, width):
    """Bilinear resizing of one map, a list of rows, pixel centres at half numbers and borders repeated."""
    def between(target, source):
        place = [min(max((i + 0.5) * source / target - 0.5, 0), source - 1) for i in range(target)]
        return [(math.floor(p), min(math.floor(p) + 1, source - 1), p - math.floor(p)) for p in place]

    return [[(1 - u) * ((1 - v) * rows[i][j] + v * rows[i][l]) + u * ((1 - v) * rows[k][j] + v * rows[k][l])
             for j, l, v in between(width, len(rows[0]))] for i, k, u in between(height, len(rows))]


def channel_loop(x):
    """One group, [B, C, H, W] -> means, variances of the channels."""
    return zip(*(moments(x[:, c].flatten().tolist()) for c in range(x.shape[1])))


def patch_loop(x, patch):
    """One group -> means, variances of the patches, row after row."""
    rows, columns = math.ceil(x.shape[2] / patch), math.ceil(x.shape[3] / patch)
    maps = [enlarged(channel, rows * patch, columns * patch) for image in x.tolist() for channel in image]
    return zip(*(moments([value for m in maps for line in m[i * patch:(i + 1) * patch]
                          for value in line[j * patch:(j + 1) * patch]])
                 for i in range(rows) for j in range(columns)))


def terms_of(statistics, slopes, patch):
    """What `Inject` is told of a loss with these slopes at a layer's statistics, (mean, var) of channels[, of
    patches]."""
    triples = zip(statistics[::2], slopes[::2], slopes[1::2])
    return {2 * i: affine_terms(*triple) for i, triple in enumerate(triples)}, patch


# The statistics

@pytest.mark.parametrize("groups", (1, 3))
@pytest.mark.parametrize("height, width, patch", SHAPES)
def test_channel_and_patch_statistics_are_those_of_slow_loops_over_each_group(height, width, patch, groups):
    x = 2 * randn(groups * 2, 3, height, width) + randn(3, 1, 1)
    loops = [[*channel_loop(group), *patch_loop(group, patch)] for group in x.chunk(groups)]
    expected = [torch.tensor(vectors, dtype=torch.float64) for vectors in zip(*loops)]
    assert expected[2].shape == (groups, math.ceil(height / patch) * math.ceil(width / patch))
    before = x.clone()
    for actual in (*channel_stats(x, groups), *patch_stats(x, patch, groups)), conv_stats(x, patch, groups):
        for vector, loop in zip(actual, expected, strict=True):
            assert_near(vector, loop, 1e-12)
    for vector, loop in zip(bn_stats(x, groups), expected[:2], strict=True):
        assert_near(vector, loop, 1e-12)
    assert torch.equal(x, before)


@pytest.mark.parametrize("height, width, patch", [(4, 8, 4), (3, 5, 4), (1, 1, 4)])
def test_channel_and_patch_statistics_have_gradients(height, width, patch):
    x = randn(4, 2, height, width).requires_grad_()
    assert gradcheck(lambda x: (*channel_stats(x, 2), *patch_stats(x, patch, 2)), x)


def test_conv_and_bn_statistics_have_no_graph():
    x = randn(2, 3, 8, 8).requires_grad_()
    assert not any(vector.requires_grad for vector in (*conv_stats(x, 4), *bn_stats(x)))
    assert all(vector.requires_grad for vector in (*channel_stats(x), *patch_stats(x, 4)))


def test_variances_survive_a_large_mean_in_float32():
    x = torch.randn(8, 3, 16, 16) + 1000
    exact = *channel_stats(x.double()), *patch_stats(x.double(), 4)
    for measured in conv_stats(x, 4), (*channel_stats(x), *patch_stats(x, 4)), bn_stats(x):
        for vector, expected in zip(measured, exact):
            assert_near(vector.double(), expected, 1e-4)


@pytest.mark.parametrize("size", (8, 7))
def test_statistics_of_bfloat16_are_those_of_float32_and_so_is_their_gradient(size):
    x = torch.randn(4, 3, size, size).bfloat16()
    exact = *channel_stats(x.float(), 2), *patch_stats(x.float(), 4, 2)
    for measured in (*channel_stats(x, 2), *patch_stats(x, 4, 2)), conv_stats(x, 4, 2), (*bn_stats(x, 2),
                                                                                         *exact[2:]):
        for vector, expected in zip(measured, exact, strict=True):
            assert vector.dtype == torch.float32
            assert_near(vector, expected, 1e-5)
    slopes = [torch.randn_like(vector) for vector in exact]
    narrow, wide = (gradient(lambda x: Inject.apply(x, *terms_of(exact, slopes, 4)).float().sum(), x)[1]
                    for x in (x, x.float()))
    assert narrow.dtype == torch.bfloat16
    assert_near(narrow.float(), wide, 0.01)


@pytest.mark.parametrize("size", (8, 7))
def test_half_of_the_channels_and_channels_last_are_measured_alike(size):
    wide = randn(4, 6, size, size)
    x = wide[:, 3:]                                                                 # ShuffleNet's halves
    for layout in x, x.contiguous(memory_format=torch.channels_last):
        for actual in (*channel_stats(layout, 2), *patch_stats(layout, 4, 2)), conv_stats(layout, 4, 2):
            for vector, expected in zip(actual, conv_stats(x.contiguous(), 4, 2)):
                assert_near(vector, expected, 1e-12)
        for vector, expected in zip(bn_stats(layout, 2), bn_stats(x.contiguous(), 2)):
            assert_near(vector, expected, 1e-12)


def test_maps_are_resized_only_where_patches_do_not_fit(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("resized")

    x = randn(2, 3, 8, 12)
    assert whole_patches(x, 4) is x
    monkeypatch.setattr(F, "interpolate", refuse)
    statistics = conv_stats(x, 4)
    patch_stats(x, 4)
    gradient(lambda x: Inject.apply(x, *terms_of(statistics, statistics, 4)).sum(), x)
    for measure in conv_stats, patch_stats:
        with pytest.raises(AssertionError, match="resized"):
            measure(x, 5)


# The hooks

LAYERS = ("stem", "bn", "conv", "shortcut")


class Fork(nn.Module):
    """A tensor that is the input of a BatchNorm and of two convolutions."""

    def __init__(self, order=("bn", "conv", "shortcut")):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.bn, self.conv, self.shortcut = nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4,
                                                                                                        1)
        self.fc, self.order = nn.Linear(4, 5), order

    def forward(self, x):
        x = self.stem(x)
        parts = {name: getattr(self, name)(x) for name in self.order}
        return self.fc((parts["shortcut"] * parts["conv"].tanh() + parts["bn"] + x).mean((2, 3)))


def fork(order=("bn", "conv", "shortcut")):
    """-> a frozen Fork in float64, targets of its convolutions, all weights, different for each layer."""
    net = Fork(order).double().eval().requires_grad_(False)
    net.bn.running_mean, net.bn.running_var = randn(4), randn(4).square()
    targets = {name: [part[0] for part in conv_stats(randn(4, 4 if name != "stem" else 3, 8, 8), 4)]
               for name in ("stem", "conv", "shortcut")}
    return net, targets, {"stem": 0.3, "bn": 0.2, "conv": 0.1, "shortcut": 0.4}


def hooks_of(net):
    return sum(len(module._forward_pre_hooks) + len(module._forward_hooks) for module in net.modules())


def test_matched_layers_are_the_convolutions_and_batchnorms_in_their_order():
    net = Fork()
    assert tuple(matched_layers(net)) == LAYERS
    assert matched_layers(net)["bn"] is net.bn


def test_layer_inputs_yields_what_each_layer_was_given_and_leaves_no_hook():
    net, _, _ = fork()
    images = randn(2, 3, 8, 8)
    plain = net(images)
    with layer_inputs(net) as inputs:
        assert torch.equal(net(images), plain)
    assert hooks_of(net) == 0
    assert inputs["stem"] is images and inputs.keys() == set(LAYERS)
    assert inputs["bn"] is inputs["conv"] is inputs["shortcut"] and torch.equal(inputs["bn"],
                                                                                net.stem(images))


def test_layer_inputs_reads_only_the_layers_it_is_asked_for():
    net, _, _ = fork()
    for names in {"conv"}, {"stem", "bn"}, set():
        with layer_inputs(net, names) as inputs:
            net(randn(2, 3, 8, 8))
        assert inputs.keys() == names


@pytest.mark.parametrize("channels", (3, 2))
def test_no_hook_survives_an_error(channels):
    net, _, _ = fork()
    with pytest.raises((KeyError, RuntimeError)), layer_inputs(net):
        net(randn(2, channels, 8, 8))                                               # fails with 2 channels
        raise KeyError
    assert hooks_of(net) == 0


def test_wrap_is_called_once_for_each_tensor_and_its_result_is_what_the_layers_see():
    net, _, _ = fork()
    images, seen = randn(2, 3, 8, 8), []

    def double(x):
        seen.append(x)
        return 2 * x

    with layer_inputs(net, {"stem", "conv", "shortcut"}, double) as inputs:
        logits = net(images)
    assert [id(x) for x in seen] == [id(images), id(inputs["conv"])]
    x = net.stem(2 * images)
    assert torch.equal(inputs["conv"], x) and torch.equal(inputs["shortcut"], x)
    assert_near(logits, net.fc((net.shortcut(2 * x) * net.conv(2 * x).tanh() + net.bn(x) + x).mean((2, 3))),
                1e-12)


# The closed form

@pytest.mark.parametrize("groups", (1, 3))
def test_segment_norms_are_the_norms_and_their_gradient_0_where_a_norm_is_0(groups):
    sizes, weight = (3, 1, 4, 2), torch.tensor([0.5, 2.0, 1.0, 0.0], dtype=torch.float64)
    segment = torch.repeat_interleave(torch.arange(4), torch.tensor(sizes))
    difference = randn(groups, 10)
    difference[0, 3:8] = 0                                                          # all of segments 1 and 2
    expected = [[math.sqrt(sum(v * v for v in row[segment == s].tolist())) for s in range(4)]
                for row in difference]
    norms, slope = segment_norms(difference, segment, 4, weight)
    assert_near(norms, expected, 1e-12)
    _, autograd = gradient(lambda d: sum(w * part.norm(dim=1).sum() for w,
                                         part in zip(weight, d.split(sizes, 1))),
                           difference)
    assert_near(slope, autograd, 1e-12)
    assert not slope[0, 3:8].any() and not slope[:, 8:].any() and slope[:, :3].all()


@pytest.mark.parametrize("count", (2, 4))
@pytest.mark.parametrize("groups", (1, 3))
@pytest.mark.parametrize("height, width, patch", SHAPES)
def test_affine_terms_are_the_gradient_of_the_statistics(height, width, patch, groups, count):
    x, upstream = 2 * randn(groups * 2, 3, height, width) + 1, randn(groups * 2, 3, height, width)
    statistics = [*channel_stats(x, groups), *patch_stats(x, patch, groups)][:count]
    slopes = [randn(*vector.shape) for vector in statistics]

    def matched(x):
        vectors = (*channel_stats(x, groups), *patch_stats(x, patch, groups))
        return (upstream * x).sum() + sum((a * b).sum() for a, b in zip(slopes, vectors))

    terms = terms_of(statistics, slopes, patch)
    _, injected = gradient(lambda x: (upstream * Inject.apply(x, *terms)).sum(), x)
    assert_near(injected, gradient(matched, x)[1], 1e-12)


def test_inject_is_the_identity_and_reads_its_terms_only_in_the_backward_pass_where_they_must_not_lack():
    x, upstream, terms = randn(4, 3, 8, 8).requires_grad_(), randn(4, 3, 8, 8), {}
    y = Inject.apply(x, terms, 4)
    assert torch.equal(y, x) and y.data_ptr() == x.data_ptr()
    with pytest.raises(ValueError, match="backward.. came before inject"):
        torch.autograd.grad(y, x, upstream, retain_graph=True)
    scale, shift = randn(2, 3), randn(2, 3)                                     # two groups of two images
    terms[0] = torch.stack([scale, shift])
    scale, shift = (vector[:, None, :, None, None] for vector in (scale, shift))
    expected = upstream + (x.detach().view(2, 2, 3, 8, 8) * scale + shift).flatten(0, 1) / (2 * 8 * 8)
    assert_near(torch.autograd.grad(y, x, upstream)[0], expected, 1e-12)


@pytest.mark.parametrize("patch", (4, 3))
def test_the_gradient_reaches_channels_last_and_half_of_the_channels_alike(patch):
    wide, slopes = randn(4, 6, 8, 8), None
    results = []
    for layout in (lambda x: x[:, 3:].contiguous(), lambda x: x[:, 3:],
                   lambda x: x[:, 3:].contiguous(memory_format=torch.channels_last)):
        def matched(wide):
            x = layout(wide)
            statistics = conv_stats(x, patch, 2)
            return Inject.apply(x, *terms_of(statistics, slopes, patch)).sum()

        slopes = slopes or [randn(*vector.shape) for vector in conv_stats(layout(wide), patch, 2)]
        results.append(gradient(matched, wide)[1])
    for other in results[1:]:
        assert_near(other, results[0], 1e-12)


def matching_loop(net, targets, weights, alpha, patch, groups, steps):
    """Eqs. 6 and 10 layer by layer; each step is (images, labels, dropped layers).   -> of each the losses of
    BatchNorm and of the convolutions, and the gradient of classification and matching at the images, all
    groups together"""
    averages, results = {}, []
    targets = targets | {"bn": (net.bn.running_mean, net.bn.running_var)}
    for images, labels, dropped in steps:
        images = images.clone().requires_grad_()
        x = net.stem(images)
        total, losses = F.cross_entropy(net(images), labels), {"bn": 0.0, "conv": 0.0}
        for name in targets:
            if name in dropped or not weights[name]:
                continue
            for g, group in enumerate((images if name == "stem" else x).chunk(groups)):
                vectors = channel_stats(group) + (() if name == "bn" else patch_stats(group, patch))
                for kind, (vector, target) in enumerate(zip(vectors, targets[name])):
                    now, past = vector[0].detach(), averages.get((name, g, kind))
                    ema = averages[name, g, kind] = now if past is None else alpha * past + (1 - alpha) * now
                    away = ema - target
                    losses["bn" if name == "bn" else "conv"] += weights[name] * away.norm()
                    total = total + weights[name] * (vector[0] * away / away.norm()).sum()          # Eq. 15
        results.append((losses["bn"], losses["conv"], torch.autograd.grad(total, images)[0]))
    return results


@pytest.mark.parametrize("groups, patch, alpha", [(1, 4, 0.8), (3, 4, 0.4), (2, 3, 0.8), (2, 4, 0.0),
                                                  (1, 16, 0.8)])
@pytest.mark.parametrize("off", ((), ("bn",), ("stem",), ("stem", "conv", "shortcut"), LAYERS))
@pytest.mark.parametrize("form", (Matching, ClosedFormMatching))
def test_closed_form_matching_is_eqs_6_10_and_15_over_several_steps_with_dropped_layers(groups, patch, alpha,
                                                                                        off, form):
    net, _, weights = fork()
    targets = {name: [vector[0] for vector in conv_stats(randn(4, 3 if name == "stem" else 4, 8, 8), patch)]
               for name in ("stem", "conv", "shortcut")}
    weights |= dict.fromkeys(off, 0.0)
    # conv is new when others have a past
    drops = (), ("conv",), ("stem", "conv"), (), ("stem", "conv", "shortcut")
    steps = [(randn(2 * groups, 3, 8, 8), torch.randint(5, (2 * groups,)), dropped)
             for dropped in drops[::-1]]
    matching = form(net, targets, weights, alpha=alpha, patch=patch)
    state = matching.start(groups)
    loop = matching_loop(net, targets, weights, alpha, patch, groups, steps)
    for (images, labels, dropped), expected in zip(steps, loop, strict=True):
        images = images.clone().requires_grad_()
        past, before = state, deepcopy(state)
        with matching.hooks(dropped) as inputs:
            logits = net(images)
        bn, conv, state = matching.inject(inputs, state)
        slope, = torch.autograd.grad(F.cross_entropy(logits, labels) + bn + conv, images)
        for actual, value in zip((bn, conv, slope), expected):
            assert_near(actual.detach(), value, 1e-12)
        assert form is Matching or not (bn.requires_grad or conv.requires_grad)
        assert torch.equal(past[0], before[0]) if form is ClosedFormMatching else past.keys() == before.keys()
        assert hooks_of(net) == 0


@pytest.mark.parametrize("alpha", (0.8, 0.0))
def test_matching_is_sds_match_of_each_layers_statistics(alpha):
    net, targets, weights = fork()
    matching, averages = Matching(net, targets, weights, alpha=alpha), {}
    state = matching.start(2)
    for _ in range(3):
        with matching.hooks() as inputs:
            net(randn(4, 3, 8, 8))
        bn, conv, state = matching.inject(inputs, state)
        expected = {"bn": 0.0, "conv": 0.0}
        for name, x in inputs.items():
            values = *channel_stats(x, 2), *(patch_stats(x, 4, 2) if name != "bn" else ())
            for kind, (value, target) in enumerate(zip(values, matching.targets[name], strict=True)):
                loss, averages[name, kind] = sds_match(value, target, averages.get((name, kind)), alpha)
                expected["bn" if name == "bn" else "conv"] += weights[name] * loss
        assert_near(torch.stack([bn, conv]), torch.stack(list(expected.values())), 1e-12)


class Elsewhere(torch.Tensor):
    """On a CPU, and says that it is not."""
    device = property(lambda self: torch.device("meta"))


@pytest.mark.parametrize("groups", (1, 3))
def test_moments_on_a_gpu_are_reduced_otherwise_to_the_same(groups):
    x = randn(6, 3, 8, 8)
    for layout in x, x.contiguous(memory_format=torch.channels_last):
        found = closed_form._batch_moments(layout.as_subclass(Elsewhere), groups)
        for mine, plain in zip(found, closed_form._batch_moments(layout, groups), strict=True):
            assert_near(mine.as_subclass(torch.Tensor), plain, 1e-12)


@pytest.mark.parametrize("order", [("conv", "shortcut", "bn"), ("conv", "bn", "shortcut"),
                                   ("bn", "conv", "shortcut")])
def test_a_tensor_that_a_batchnorm_and_two_convolutions_share_is_reduced_once(order, monkeypatch):
    reduced = counted_reductions(monkeypatch)
    net, targets, weights = fork(order)
    matching = ClosedFormMatching(net, targets, weights)
    with matching.hooks() as inputs:
        net(randn(2, 3, 8, 8).requires_grad_())
    matching.inject(inputs, matching.start(1))
    assert sorted(map(id, reduced)) == sorted({id(x) for x in inputs.values()}) and len(reduced) == 2


def test_a_layer_of_weight_0_is_not_hooked_and_needs_no_target():
    net, targets, weights = fork()
    del targets["conv"]
    matching = ClosedFormMatching(net, targets, weights | {"conv": 0.0})
    with matching.hooks() as inputs:
        net(randn(2, 3, 8, 8).requires_grad_())
    assert inputs.keys() == {"stem", "bn", "shortcut"}
    assert matching.inject(inputs, matching.start(1))[1] > 0


# Freezing

class Chain(nn.Module):
    """One convolution and BatchNorm, wired in different ways."""

    def __init__(self, wiring, affine=True):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 3, 3, padding=1, bias=False), nn.BatchNorm2d(3, affine=affine)
        self.relu, self.identity, self.wiring = nn.ReLU(inplace=True), nn.Identity(), wiring
        self.bn.running_mean.copy_(torch.randn(3))
        self.bn.running_var.copy_(torch.rand(3) + 0.5)

    def forward(self, x):
        return self.wiring(self, x)


def added(net, x):
    y = net.bn(net.conv(x))
    y += x
    return y


WIRINGS = {  # -> whether the norm may be folded, and what it gives must be a copy then
    "alone": (lambda net, x: net.relu(net.bn(net.conv(x))), True, False),
    "added to another": (lambda net, x: x + net.bn(net.conv(x)), True, False),
    "added to in place": (added, True, True),
    "passed on and added to": (lambda net, x: net.relu(net.identity(net.bn(net.conv(x))).add_(x)), True,
                               True),
    "overwritten": (lambda net, x: F.relu(net.bn(net.conv(x)), inplace=True), True, True),
    "of an activation": (lambda net, x: net.bn(net.conv(x).tanh()), False, False),
    "of what others read": (lambda net, x: net.bn(y := net.conv(x)) + y, False, False),
    "after a convolution of two": (lambda net, x: net.bn(net.conv(net.conv(x).tanh())), False, False),
    "called twice": (lambda net, x: net.bn(net.bn(net.conv(x)).tanh()), False, False),
    "not to be traced": (lambda net, x: net.bn(net.conv(x)) if x.sum() > -1e9 else x, False, False)}


@pytest.mark.parametrize("wiring", WIRINGS)
def test_a_norm_is_folded_only_where_nothing_else_can_tell(wiring):
    forward, folds, copies = WIRINGS[wiring]
    net = Chain(forward).double().eval().requires_grad_(False)
    x = randn(4, 3, 8, 8)
    expected = net(x)
    with layer_inputs(net, {"bn"}) as inputs_before:
        net(x)
    frozen = freeze(net)
    assert frozen is net and isinstance(net.bn, FrozenNorm) and not net.relu.inplace
    assert (net.bn.folded, net.bn.overwritten) == (folds, copies)
    assert_near(net(x), expected, 1e-12)
    matching = ClosedFormMatching(net, {}, {"conv": 0.0, "bn": 1.0})
    leaf = x.clone().requires_grad_()
    with matching.hooks() as inputs:
        total = matching.model(leaf).sum()
    bn, _, _ = matching.inject(inputs, matching.start(1))
    mean, var = channel_stats(inputs_before["bn"])
    assert_near(bn, (mean - net.bn.running_mean).norm() + (var - net.bn.running_var).norm(), 1e-9)
    assert torch.autograd.grad(total, leaf)[0].isfinite().all()


@pytest.mark.parametrize("weight, folds", [(1.0, True), (-1.0, True), (1e-3, False), (0.0, False)])
def test_a_norm_with_a_vanishing_gain_keeps_its_input(weight, folds):
    net = Chain(WIRINGS["alone"][0]).double().eval().requires_grad_(False)
    net.bn.weight[1], net.bn.bias[1] = weight, 0.5
    x = randn(2, 3, 8, 8)
    expected = net(x)
    assert freeze(net).bn.folded == folds
    assert_near(net(x), expected, 1e-12)


def test_a_norm_without_weights_and_a_model_without_norms_are_frozen_too():
    net = Chain(WIRINGS["alone"][0], affine=False).double().eval()
    x = randn(2, 3, 8, 8)
    expected = net(x)
    assert_near(freeze(net)(x), expected, 1e-12)
    assert not net.bn.folded
    plain = nn.Sequential(nn.Conv2d(3, 4, 3), nn.GroupNorm(4, 4), nn.ReLU(True)).double().eval()
    expected = plain(x)
    assert torch.equal(freeze(plain)(x), expected) and plain[2].inplace and plain[0].weight.is_contiguous()


@pytest.mark.parametrize("name", ("resnet18", "convnet_w8"))
def test_freezing_twice_changes_nothing_and_no_parameter_is_trainable(name):
    torch.manual_seed(0)
    model, x = build_model(name, 10, 32).eval(), torch.randn(2, 3, 32, 32)
    once = freeze(model)(x)
    assert torch.equal(freeze(model)(x), once) and not any(p.requires_grad for p in model.parameters())


def test_a_frozen_model_gives_no_weights_that_another_could_take():
    model, x = build_model("resnet18", 10, 32).eval(), torch.randn(2, 3, 32, 32)
    copy = deepcopy(freeze(deepcopy(model)))
    assert_near(copy(x), model(x), 1e-4)
    with pytest.raises(ValueError, match="before freeze"):
        copy.state_dict()
    assert freeze(build_model("convnet_w8", 10, 32).eval()).state_dict()      # nothing was folded


# Mistakes in calling them

@pytest.mark.parametrize("form", (Matching, ClosedFormMatching))
def test_a_layer_that_does_not_fit_its_targets_is_named_with_the_shapes(form):
    net, targets, weights = fork()
    lacking, short = dict(targets), dict(targets)
    del lacking["conv"]
    short["conv"] = [vector[:3] for vector in targets["conv"]]
    for given, by, words in [
            (lacking, weights, r"layer 'conv' \(Conv2d\) has no targets; .*statistics_of"),
            (short, weights, r"layer 'conv': targets of shapes \[\(3,\), \(3,\), .*4 channels"),
            (targets | {"conv": targets["conv"][:2]}, weights, "layer 'conv': .* expected 4 vectors"),
            (targets, {name: 1.0 for name in weights if name != "bn"}, "weights lack layer 'bn'")]:
        with pytest.raises(ValueError, match=words):
            form(net, given, by)
    with pytest.raises(ValueError, match="train mode .layer 'Fork'.; call model.eval"):
        form(Fork(), targets, weights)
    for size, patch in (16, 4), (8, 2):
        matching = form(net, targets, weights, patch=patch)
        with matching.hooks() as inputs:
            net(randn(2, 3, size, size).requires_grad_())
        with pytest.raises(ValueError, match=rf"layer '.*': an input of shape \(2, ., {size}, {size}\) has "
                           rf"16 patches of {patch} "):
            matching.inject(inputs, matching.start(1))
    matching = form(net, targets, weights)
    with matching.hooks() as inputs:
        net(randn(3, 3, 8, 8).requires_grad_())
    with pytest.raises(ValueError, match="layer .*: 3 inputs are not 2 batches of one size"):
        matching.inject(inputs, matching.start(2))


def test_forgetting_to_inject_is_an_error_and_not_a_gradient_without_statistics():
    net, targets, weights = fork()
    matching = ClosedFormMatching(net, targets, weights)
    with matching.hooks():
        logits = net(randn(2, 3, 8, 8).requires_grad_())
    with pytest.raises(ValueError, match="inject"):
        logits.sum().backward()


def test_inputs_that_hooks_did_not_give_are_refused():
    net, targets, weights = fork()
    with layer_inputs(net) as inputs:
        net(randn(2, 3, 8, 8).requires_grad_())
    for matching in ClosedFormMatching(net, targets, weights), ClosedFormMatching(net, targets, weights):
        with matching.hooks():
            net(randn(2, 3, 8, 8))
        with pytest.raises(ValueError, match=r"not those of hooks\(\)"):
            matching.inject(inputs, matching.start(1))


@pytest.mark.parametrize("function", (freeze, lambda model: statistics_of(model, [randn(2, 3, 8, 8)])))
def test_a_model_in_train_mode_is_refused_and_stays_as_it_is(function):
    model = Fork().double()
    before = deepcopy(model.state_dict())
    for mode, layer in (True, "Fork"), (False, "bn"):
        model.train(mode).bn.train()
        with pytest.raises(ValueError, match=f"train mode .layer '{layer}'"):
            function(model)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_autograd_matches_no_frozen_model():
    model = build_model("wrn10_1", 4, 16).eval()
    with pytest.raises(ValueError, match="of freeze.., for ClosedFormMatching"):
        Matching(freeze(model), {}, dict.fromkeys(matched_layers(model), 1.0))


def test_statistics_of_a_model_are_eq_9_over_batches_by_their_size():
    net, _, _ = fork()
    batches = [randn(4, 3, 8, 8), randn(4, 3, 8, 8) + 1, randn(2, 3, 8, 8)]
    found = statistics_of(net, batches, patch=4)
    assert list(found) == ["stem", "conv", "shortcut"]
    for name in found:
        inputs = [batch if name == "stem" else net.stem(batch) for batch in batches]
        parts = [[torch.tensor(vector) for vector in (*channel_loop(x), *patch_loop(x, 4))] for x in inputs]
        for kind, vector in enumerate(found[name]):
            assert_near(vector, (0.4 * parts[0][kind] + 0.4 * parts[1][kind] + 0.2 * parts[2][kind]).float(),
                        1e-5)
    with pytest.raises(ValueError, match="no images"):
        statistics_of(net, [])
