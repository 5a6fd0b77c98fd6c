"""Which convolutions can be pruned, and pruned networks against whole ones whose removed channels are
zero."""
import math
from copy import deepcopy

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

from models import build_model
from tests.helpers import assert_near
from models.pruning import channel_scales, coupled, largest_scales, random_channels, shrink

PRUNED = "resnet18", "resnet50", "vgg11_bn", "wrn16_2", "convnet_w16", "mobilenetv2_05", "efficientnet_b0"


def parameters(model):
    return sum(tensor.numel() for tensor in model.parameters())


def multiply_adds(model, size):
    """Of the convolutions and linear layers for one image; the model is on the meta device."""
    total = 0

    def count(layer, args, out):
        nonlocal total
        total += out.numel() * layer.weight[0].numel()

    for layer in model.modules():
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            layer.register_forward_hook(count)
    model.eval()(torch.empty(1, 3, size, size, device="meta"))
    return total


def lively(name, size=32):
    """A model in eval mode and float64 whose norms are no identity."""
    torch.manual_seed(0)
    model = build_model(name, 5, size).double().eval()
    for layer in model.modules():
        if isinstance(layer, (nn.BatchNorm2d, nn.GroupNorm)):
            nn.init.uniform_(layer.weight, 0.5, 2)
            nn.init.normal_(layer.bias)
        if isinstance(layer, nn.BatchNorm2d):
            layer.running_mean.normal_()
            layer.running_var.uniform_(0.5, 2)
    return model


def mask(model, kept):
    """The whole network, whose removed channels come as zeros to whatever reads them."""
    layers, plan = dict(model.named_modules()), coupled(model)
    for name, index in kept.items():
        alive = torch.zeros(layers[name].out_channels, dtype=torch.float64).index_fill_(0, index, 1)
        for consumer in plan[name][2]:
            def zero(layer, args, alive=alive):
                return (args[0].unflatten(1, (len(alive), -1))
                        * alive[:, None]).flatten(1) if args[0].dim() == 2 \
                    else args[0] * alive[:, None, None]
            layers[consumer].register_forward_pre_hook(zero)
    return model


def prunable(model):
    """Those of `coupled` that are added to no other.   -> {convolution: (norms behind it, consumers)}"""
    return {name: tuple(rest) for name, (convs, *rest) in coupled(model).items() if len(convs) == 1}


def half(model, seed=0):
    return random_channels(model, 0.5, torch.Generator().manual_seed(seed))


def conv_names(model):
    return {name for name, layer in model.named_modules() if isinstance(layer, nn.Conv2d)}


# Which convolutions

@pytest.mark.parametrize("size", (32, 224))
def test_the_inner_convolutions_of_residual_blocks_can_be_pruned_and_stems_nothing_is_added_to(size):
    resnet18 = {f"layer{i}.{j}.conv1" for i in range(1, 5) for j in range(2)}
    resnet50 = {f"layer{i + 1}.{j}.conv{k}" for i,
                n in enumerate((3, 4, 6, 3)) for j in range(n) for k in (1, 2)}
    with torch.device("meta"):
        assert set(prunable(build_model("resnet18", 5, size))) == resnet18
        plan = prunable(build_model("resnet50", 5, size))
    assert set(plan) == {"conv1"} | resnet50  # the first block has a projection instead of an addition
    assert plan["conv1"] == (("bn1",), ("layer1.0.conv1", "layer1.0.downsample.0"))


def test_wide_residual_networks_norms_come_before_the_convolutions():
    inner = {f"blocks.{i}.conv1": ((f"blocks.{i}.bn2",), (f"blocks.{i}.conv2",)) for i in range(6)}
    assert prunable(build_model("wrn16_1", 5, 32)) == inner
    assert prunable(build_model("wrn16_2", 5, 32)) == inner | {
        "conv": (("blocks.0.bn1",), ("blocks.0.conv1", "blocks.0.shortcut"))}


@pytest.mark.parametrize("name,size", (("vgg11_bn", 32), ("vgg11_bn", 224), ("convnet_w8", 32),
                                       ("convnet_w8_d4", 64)))
def test_all_convolutions_of_a_chain_can_be_pruned(name, size):
    with torch.device("meta"):
        model = build_model(name, 5, size)
        assert set(prunable(model)) == conv_names(model)


def test_what_is_shuffled_chunked_or_attended_to_is_left_alone():
    for name in "swin_t", "deit_tiny":
        assert not coupled(build_model(name, 5, 32))
    assert list(coupled(build_model("shufflenetv2_05", 5, 32))) == ["conv5.0"]               # which is pooled


class Ways(nn.Module):
    """A convolution, then `way` of its output."""

    def __init__(self, way, **layers):
        super().__init__()
        self.first, self.second, self.head = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 1), nn.Linear(16,
                                                                                                          2)
        self.way = way
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, x):
        return self.way(self, self.first(x))


@pytest.mark.parametrize("way,layers", (
    (lambda net, x: net.second(x) + x, {}),                                         # added to
    (lambda net, x: net.second(torch.cat((x, x), 1)[:, :4]), {}),
    (lambda net, x: net.second(x.chunk(2, 1)[0].repeat(1, 2, 1, 1)), {}),
    (lambda net, x: net.second(net.deep(x)), {"deep": nn.Conv2d(4, 4, 3, padding=1, groups=4)}),
    (lambda net, x: net.second(net.norm(x)), {"norm": nn.GroupNorm(2, 4)}),         # two channels a group
    # layers called twice
    (lambda net, x: net.second(net.norm(net.second(net.norm(x)))), {"norm": nn.BatchNorm2d(4)}),
    (lambda net, x: net.second(net.relu(x)), {"relu": nn.Softmax(1)}),              # whatever its name
    (lambda net, x: net.head(x.mean((1, 2))), {}),                                  # of the images' rows
    (lambda net, x: net.head(torch.flatten(x)), {}),                                # of the batch as well
    (lambda net, x: net.head(x), {}),                                               # along the last dimension
    (lambda net, x: x, {}),                                                         # given out
    (lambda net, x: (net.second(x), F.relu(x)), {}),
))
def test_what_mixes_shares_or_gives_out_channels_rules_a_convolution_out(way, layers):
    assert "first" not in prunable(Ways(way, **layers))


@pytest.mark.parametrize("way", (
    lambda net, x: net.second(F.avg_pool2d(F.relu(x), 2)), lambda net,
    x: net.second(F.max_pool2d(x.relu(), 2)),
    lambda net, x: net.second(x) + net.second2(F.adaptive_avg_pool2d(x, 2)),
    lambda net, x: net.head(F.dropout(torch.flatten(x, 1), training=net.training)),
    lambda net, x: net.head(x.flatten(1).relu()), lambda net, x: net.head(x.flatten(start_dim=1))))
def test_functions_of_each_channel_by_itself_do_not(way):
    torch.manual_seed(0)
    net = Ways(way, second2=nn.Conv2d(4, 4, 1)).double().eval()
    images, kept = torch.randn(2, 3, 2, 2, dtype=torch.float64), {"first": torch.tensor([3, 1])}
    expected = mask(deepcopy(net), kept)(images)
    assert_near(shrink(net, kept)(images), expected, 1e-12)


@pytest.mark.parametrize("size", (32, 224))
def test_all_20_convolutions_of_resnet18_lose_channels_those_of_a_stage_the_same(size):
    with torch.device("meta"):
        model = build_model("resnet18", 5, size)
    plan = coupled(model)
    assert plan["conv1"][0] == ("conv1", "layer1.0.conv2", "layer1.1.conv2")
    assert plan["layer2.0.conv2"][0] == ("layer2.0.conv2", "layer2.0.downsample.0", "layer2.1.conv2")
    assert plan["layer4.0.conv2"][2] == ("layer4.1.conv1", "fc") and len(plan) == 12
    every = [name for convs, *_ in plan.values() for name in convs]
    assert sorted(every) == sorted(conv_names(model)) and len(every) == 20


def test_the_streams_of_a_wide_residual_network_reach_the_linear_layer():
    plan = coupled(build_model("wrn16_2", 5, 32))
    assert sorted(name for convs, *_ in plan.values()
                  for name in convs) == sorted(conv_names(build_model("wrn16_2", 5, 32)))
    assert plan["blocks.4.conv2"][0] == ("blocks.4.conv2", "blocks.4.shortcut", "blocks.5.conv2")
    assert plan["blocks.4.conv2"][1:] == (("blocks.5.bn1", "bn"), ("blocks.5.conv1", "fc"))


def test_channels_that_are_added_to_an_image_stay():
    class Added(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.last = nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 2, 1)

        def forward(self, x):
            return self.last(self.conv(x) + x)

    assert not coupled(Added())


# Shrinking

@pytest.mark.parametrize("name", PRUNED)
def test_a_pruned_network_is_the_whole_one_with_zeros_and_has_its_gradient(name):
    model = lively(name)
    kept = half(model)
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64, requires_grad=True)
    whole, pruned = mask(deepcopy(model), kept), shrink(deepcopy(model), kept)
    direction = torch.randn(2, 5, dtype=torch.float64)
    expected, actual = whole(images), pruned(images)
    assert_near(actual, expected, 1e-11)
    assert_near(*(torch.autograd.grad((out * direction).sum(), images)[0] for out in (actual, expected)),
                1e-10)
    assert (expected - model(images)).abs().max() > 1e-3 * expected.abs().max()  # the removed ones did count


@pytest.mark.slow
def test_the_layers_of_a_pruned_network_name_their_sizes_and_keep_their_flags():
    model = build_model("convnet_w16", 5, 32)
    model[0].weight.requires_grad_(False)
    index = torch.tensor([9, 2, 4])
    before = deepcopy(model.state_dict())
    assert shrink(model, {"0": index}) is model
    assert (model[0].out_channels, model[1].num_groups, model[1].num_channels, model[4].in_channels) == (3, 3,
                                                                                                         3, 3)
    assert torch.equal(model[0].weight, before["0.weight"][index]) and not model[0].weight.requires_grad
    assert torch.equal(model[4].weight, before["4.weight"][:, index]) and model[4].weight.requires_grad
    shrink(model, {"8": index})
    assert model[13].in_features == 3 * 16 and model[0].out_channels == 3
    vgg = shrink(build_model("vgg11_bn", 5, 32), {"features.0": index})
    assert (vgg.features[1].num_features, len(vgg.features[1].running_var)) == (3, 3)


def test_a_pruned_network_is_trained_and_can_be_pruned_again():
    model = build_model("wrn10_2", 5, 32)
    for seed in 0, 1:
        before = parameters(model)
        shrink(model, half(model, seed))
        assert parameters(model) < 0.6 * before
    model(torch.randn(2, 3, 32, 32)).sum().backward()
    assert all(tensor.grad.shape == tensor.shape for tensor in model.parameters())


def test_no_convolution_loses_all_channels_and_only_prunable_ones_lose_any():
    model = build_model("wrn10_1", 5, 32)
    for name, index, match in ("blocks.0.conv1", [], "would lose all"), ("blocks.0.conv2", [0],
                                                                         "is not prunable"):
        with pytest.raises(ValueError, match=match):
            shrink(model, {name: torch.tensor(index, dtype=torch.long)})


@pytest.mark.parametrize("name", ("resnet18", "vgg11_bn", "wrn16_2", "convnet_w16"))
def test_a_checkpoint_and_its_widths_are_loaded_again(name):
    model = lively(name)
    kept = half(model)
    shrink(model, kept)
    saved = {layer: len(index) for layer, index in kept.items()}
    torch.manual_seed(1)
    loaded = shrink(build_model(name, 5, 32), {layer: torch.arange(width) for layer, width in saved.items()})
    loaded.double().eval().load_state_dict(model.state_dict())
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    assert torch.equal(loaded(images), model(images))


# How many channels

def test_teddys_resnet18_has_7_72_million_parameters_and_1_2_billion_multiply_adds():
    with torch.device("meta"):
        model = torchvision.models.resnet18()
    assert parameters(model) == 11_689_512 and multiply_adds(deepcopy(model), 224) == 1_814_073_344
    kept = random_channels(model, 7.72 / 11.69, torch.Generator().manual_seed(0))
    part = len(kept["layer4.1.conv1"]) / 512
    streams = ["conv1", "layer2.0.conv2", "layer3.0.conv2", "layer4.0.conv2"]
    left = [len(kept[name]) for name in streams]
    inner = [f"layer{i}.{j}.conv1" for i in range(1, 5) for j in range(2)]
    assert all(abs(number - part * channels) < 1 for number,
               channels in zip(left, (64, 128, 256, 512), strict=True))
    assert kept.keys() == {*streams, *inner} and [len(kept[name]) for name in inner] == [n for n in left
                                                                                         for _ in range(2)]
    # the stem and its norm, the linear layer
    expected = 3 * 49 * left[0] + 2 * left[0] + (left[3] + 1) * 1000
    for i, channels in enumerate(left):
        before = left[max(i - 1, 0)]
        expected += 9 * channels * (before + 3 * channels) + 8 * channels + (channels * (before + 2)) * (i
                                                                                                         > 0)
    shrink(model, kept)
    assert parameters(model) == expected and abs(expected / 7.72e6 - 1) < 0.001
    assert abs(multiply_adds(model, 224) / 1.2e9 - 1) < 0.02


@pytest.mark.parametrize("name", ("resnet18", "resnet50", "vgg11_bn", "wrn16_2", "convnet_w16",
                                  "mobilenetv2_05"))
@pytest.mark.parametrize("share", (0.9, 0.6))
def test_random_channels_keeps_the_share_of_the_parameters_and_the_same_part_everywhere(name, share):
    with torch.device("meta"):
        model = build_model(name, 100, 32)
    kept = random_channels(model, share, torch.Generator().manual_seed(0))
    fewer = {layer: index[1:] for layer, index in kept.items()}
    assert parameters(shrink(deepcopy(model), fewer)) < share * parameters(model) \
        <= parameters(shrink(deepcopy(model), kept))
    layers = dict(model.named_modules())
    rounded = [(len(index), layers[layer].out_channels) for layer, index in kept.items()]
    assert max((left - 0.5) / whole for left, whole in rounded) <= min((left + 0.5) / whole for left,
                                                                       whole in rounded)


def test_random_channels_are_drawn_by_the_generator_and_at_least_one_stays():
    model = build_model("convnet_w16", 5, 32)
    first, again, other = half(model), half(model), half(model, 1)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)
    assert all(torch.equal(index, index.unique()) for index in first.values())
    assert [len(index) for index in random_channels(model, 0.0, torch.Generator()).values()] == [1, 1, 1]
    assert [len(index) for index in random_channels(model, 1.0, torch.Generator()).values()] == [16, 16, 16]


# By BatchNorm scales

def uneven(name):
    """`lively`, with scales of both signs that differ from layer to layer."""
    model = lively(name)
    for i, scale in enumerate(channel_scales(model).values()):
        nn.init.normal_(scale, std=1 + i % 3)
    return model


@pytest.mark.parametrize("name", ("vgg11_bn", "resnet18", "wrn16_2", "mobilenetv2_05"))
def test_a_network_slimmed_by_its_scales_is_the_one_with_those_scales_and_shifts_at_zero(name):
    model = uneven(name)
    kept, layers = largest_scales(model, 0.5), dict(model.named_modules())
    norms = {layer: prunable(model)[layer][0][0] for layer in kept}
    masked = deepcopy(model)
    for layer, norm in norms.items():
        alive = torch.zeros(layers[layer].out_channels, dtype=torch.float64).index_fill_(0, kept[layer], 1)
        norm = masked.get_submodule(norm)
        norm.weight.data *= alive
        norm.bias.data *= alive
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    slim = shrink(deepcopy(model), kept)
    assert_near(slim(images), masked(images), 1e-11)
    assert (masked(images) - model(images)).abs().max() > 1e-3 * model(images).abs().max()
    assert parameters(slim) < parameters(model)


@pytest.mark.parametrize("name", ("vgg11_bn", "wrn16_2"))
@pytest.mark.parametrize("sparsity", (0, 0.3, 0.99))
@pytest.mark.parametrize("least", (0, 0.1, 0.5))
def test_one_threshold_takes_the_channels_of_smallest_scale_but_of_no_layer_nearly_all(name, sparsity, least):
    model = uneven(name)
    scales, kept = channel_scales(model), largest_scales(model, sparsity, least)
    assert kept.keys() == scales.keys()
    expected, rest = {}, []                                          # the slow loop
    for layer, scale in scales.items():
        ranked = sorted(((abs(value), layer, i) for i, value in enumerate(scale.tolist())), reverse=True)
        own = max(1, math.ceil(least * len(scale)))
        expected[layer], rest = [i for _, _, i in ranked[:own]], rest + ranked[own:]
    total = sum(map(len, scales.values()))
    for _, layer, i in sorted(rest)[int(sparsity * total):]:
        expected[layer].append(i)
    for layer, channels in expected.items():
        assert kept[layer].tolist() == sorted(channels)


def test_only_channels_with_a_batchnorm_of_their_own_have_a_scale():
    assert not channel_scales(build_model("convnet_w8", 5,
                                          32)) and not channel_scales(build_model("squeezenet", 5, 32))
    with torch.device("meta"):
        vgg = build_model("vgg11_bn", 5, 32)
    assert [len(scale) for scale in channel_scales(vgg).values()] == [64, 128, 256, 256, 512, 512, 512, 512]
    assert all(scale is vgg.features[int(name.split(".")[1]) + 1].weight for name,
               scale in channel_scales(vgg).items())
