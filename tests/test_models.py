"""The networks: sizes, names, agreement with torchvision, and what reading the inputs of their layers relies
on."""
from collections import namedtuple

import pytest
import torch
import torchvision
from torch import nn

from models import NAMES, PRETRAINED, build_model, is_model_name, pretrained_weights
from models.convnet import Halve

PAPER = {  # parameters with (10 classes, 32 px), (100, 32), (200, 64); convolutions, BatchNorms, GroupNorms
    "resnet18": (11_173_962, 11_220_132, 11_271_432, 20, 20, 0),
    "convnet_w128": (320_010, 504_420, 1_938_120, 3, 0, 3),
    "mobilenetv2_05": (697_546, 812_836, 940_936, 53, 53, 0),
    "wrn16_2": (691_674, 703_284, 716_184, 16, 13, 0),
    "shufflenetv2_05": (351_466, 443_716, 546_216, 56, 56, 0),
    "resnet50": (23_520_842, 23_705_252, 23_910_152, 53, 53, 0),
    "convnet_w128_d1": (331_530, 3_280_740, 26_218_440, 1, 0, 1),
    "convnet_w128_d2": (233_610, 970_980, 6_705_480, 2, 0, 2),
    "convnet_w32": (24_714, 70_884, 429_384, 3, 0, 3),
}
HOOKED = nn.Conv2d, nn.BatchNorm2d
# inputs: (module, its input, a copy of it from before it ran)
Run = namedtuple("Run", "name net images logits inputs")


def skeleton(name, num_classes=10, image_size=32):
    """The network without memory for its weights."""
    with torch.device("meta"):
        return build_model(name, num_classes, image_size)


def shapes(net):
    return {name: tuple(tensor.shape) for name, tensor in net.state_dict().items()}


def forward(name, net, images):
    """The Run of one forward pass in eval mode, with the inputs of all convolutions and BatchNorms."""
    inputs = []

    def save(module, args):
        inputs.append((module, args[0], args[0].detach().clone()))

    hooks = [module.register_forward_pre_hook(save) for module in net.modules() if isinstance(module, HOOKED)]
    logits = net.eval()(images)
    for hook in hooks:
        hook.remove()
    return Run(name, net, images, logits, inputs)


@pytest.fixture(scope="module", params=NAMES)
def run32(request):
    torch.manual_seed(0)
    net = build_model(request.param, 7, 32)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    # fitting running statistics: with the initial ones some logits hardly vary
    net.train()(torch.randn(4, 3, 32, 32))
    return forward(request.param, net, torch.randn(2, 3, 32, 32, requires_grad=True))


def count(net, kind):
    return sum(isinstance(module, kind) for module in net.modules())


@pytest.mark.parametrize("name", PAPER)
def test_parameters_and_layers_are_those_of_the_papers_networks(name):
    for parameters, num_classes, image_size in zip(PAPER[name], (10, 100, 200), (32, 32, 64)):
        net = skeleton(name, num_classes, image_size)
        assert sum(p.numel() for p in net.parameters()) == parameters
        assert (count(net, nn.Conv2d), count(net, nn.BatchNorm2d),
                count(net, nn.GroupNorm)) == PAPER[name][3:]


@pytest.mark.parametrize("name, parameters", [
    ("deit_tiny", 5_717_416), ("regnet_x_8gf", 39_572_648), ("squeezenet", 1_248_424)])
def test_students_at_224_pixels_have_the_published_number_of_parameters(name, parameters):
    assert sum(p.numel() for p in skeleton(name, 1000, 224).parameters()) == parameters


@pytest.mark.parametrize("name, normalised", [
    ("convnet_w128", nn.GroupNorm), ("swin_t", nn.LayerNorm), ("deit_tiny", nn.LayerNorm),
    ("squeezenet", ())])
def test_students_without_batchnorm(name, normalised):
    norms = {type(layer) for layer in skeleton(name).modules() if "Norm" in type(layer).__name__}
    assert all(issubclass(norm, normalised) for norm in norms) and bool(norms) == (name != "squeezenet")


@pytest.mark.parametrize("name", PRETRAINED)
def test_torchvisions_weights_fit_above_64_pixels(name):
    reference = PRETRAINED[name]
    with torch.device("cpu" if name == "regnet_x_8gf" else "meta"):  # whose widths are tensors' values
        expected = shapes(torchvision.models.get_model(reference))
    for image_size in 68, 224:
        assert shapes(skeleton(name, 1000, image_size)) == expected
    weights = pretrained_weights(name)
    assert weights.name == "IMAGENET1K_V1" and weights in torchvision.models.get_model_weights(reference)


@pytest.mark.parametrize("name, small, large", [  # kernel and stride of the first convolution
    ("resnet18", (3, 1), (7, 2)), ("resnet50", (3, 1), (7, 2)), ("resnet101", (3, 1), (7, 2)),
    ("shufflenetv2_05", (1, 1), (3, 2)), ("efficientnet_b0", (3, 1), (3, 2)), ("swin_t", (2, 2), (4, 4)),
    ("regnet_x_8gf", (3, 1), (3, 2)), ("squeezenet", (7, 1), (7, 2)),
    ("deit_tiny", (4, 4), (16, 16))])
def test_the_small_stem_ends_at_64_pixels(name, small, large):
    for image_size in 32, 64, 96:
        conv = next(module for module in skeleton(name, 10, image_size).modules()
                    if isinstance(module, nn.Conv2d))
        assert (conv.kernel_size[0], conv.stride[0]) == (small if image_size <= 64 else large)


@pytest.mark.parametrize("name, small, large", [
    ("resnet18", 8, 32), ("shufflenetv2_05", 8, 32), ("mobilenetv2_05", 16, 32), ("mobilenetv2", 16, 32),
    ("efficientnet_b0", 16, 32), ("regnet_x_8gf", 16, 32)])
def test_the_last_map_is_narrower_than_the_image_by_the_documented_factor(name, small, large):
    for image_size in 32, 64, 96:
        run = forward(name, skeleton(name, 10, image_size),
                      torch.empty(1, 3, image_size, image_size, device="meta"))
        last = [x for module, x, _ in run.inputs if isinstance(module, nn.BatchNorm2d)][-1]
        assert image_size / last.shape[-1] == (small if image_size <= 64 else large)


def test_vgg_has_one_linear_layer_up_to_64_pixels():
    assert [count(skeleton("vgg11_bn", 10, image_size), nn.Linear) for image_size in (32, 64, 96)] == [1, 1,
                                                                                                       3]


@pytest.mark.parametrize("name, sizes", [
    ("resnet18", (32, 16, 8, 4)), ("convnet_w128", (32, 16, 8)), ("mobilenetv2_05", (32, 16, 8, 4, 2)),
    ("wrn16_2", (32, 16, 8)), ("shufflenetv2_05", (32, 16, 8, 4))])
def test_the_maps_of_the_small_backbones_have_the_papers_resolutions(name, sizes):
    for scale in 1, 2:
        side = 32 * scale
        inputs = forward(name, skeleton(name, 10, side), torch.empty(1, 3, side, side, device="meta")).inputs
        assert {tuple(x.shape[2:]) for _, x, _ in inputs} == {(s * scale, s * scale) for s in sizes}


@pytest.mark.parametrize("image_size", (64, 224))
@pytest.mark.parametrize("name", NAMES)
def test_every_network_runs_and_leaves_the_inputs_of_its_layers_intact(name, image_size):
    with torch.inference_mode():
        run = forward(name, build_model(name, 7, image_size), torch.randn(1, 3, image_size, image_size))
    assert run.logits.shape == (1, 7) and run.logits.isfinite().all()
    assert all(torch.equal(x, before) for _, x, before in run.inputs)


def test_at_32_pixels_every_layers_input_is_intact_and_differentiable(run32):
    assert run32.logits.shape == (2, 7)
    assert len({module for module, _, _ in run32.inputs}) == len(run32.inputs) == count(run32.net, HOOKED)
    assert run32.inputs[0][1] is run32.images
    assert all(torch.equal(x, before) for _, x, before in run32.inputs)
    loss = sum(x.mean((0, 2, 3)).norm() for _, x, _ in run32.inputs)
    assert torch.autograd.grad(loss, run32.images, retain_graph=True)[0].abs().sum() > 0


def test_the_logits_of_an_image_do_not_depend_on_its_batch(run32):
    with torch.inference_mode():
        alone = run32.net(run32.images[:1])[0]
        first, second = run32.logits
    difference = (first - second).abs().max()
    assert difference > 0.01 * first.abs().max() and (first - alone).abs().max() < 1e-3 * difference


@pytest.mark.parametrize("name", sorted({*NAMES} - {"resnet101", "vgg11_bn"}))  # those two are slow
def test_the_global_seed_decides_the_weights(name):
    def weights(seed):
        torch.manual_seed(seed)
        return torch.cat([p.detach().flatten() for p in build_model(name, 7, 32).parameters()])
    first = weights(0)
    assert torch.equal(first, weights(0)) and not torch.equal(first, weights(1))


def test_wrn_and_mobilenet_start_with_the_papers_variances():
    for name in "wrn16_2", "mobilenetv2_05":
        for module in build_model(name, 100, 32).modules():
            if isinstance(module, nn.Conv2d) and module.weight.numel() > 10_000:
                fan_out = module.out_channels * module.kernel_size[0] ** 2
                assert module.weight.std().item() == pytest.approx((2 / fan_out) ** 0.5, rel=0.05)
    # the classifier
    assert module.in_features == 1280 and module.weight.std().item() == pytest.approx(0.01, rel=0.05)


def test_mobilenet_for_small_images_has_no_relu6_and_no_active_dropout():
    for name in "mobilenetv2_05", "mobilenetv2":
        for module in skeleton(name).modules():
            assert not isinstance(module, nn.ReLU6) and getattr(module, "p", 0) == 0


@pytest.mark.parametrize("name", (
    "", "resnet19", "ResNet18", "convnet", "convnet_w0", "convnet_w128_d", "convnet_w128_d0", "wrn16"))
def test_an_unknown_name_is_refused_with_the_known_ones(name):
    assert not is_model_name(name)
    with pytest.raises(ValueError, match=rf"'{name}'.*resnet18.*convnet_w<width>"):
        build_model(name, 10, 32)


def test_names_are_model_names_and_patterns_take_other_numbers():
    assert all(map(is_model_name, (*NAMES, *PAPER, "convnet_w256_d4", "wrn40_1")))
    # the first group does not widen: no shortcut
    assert count(skeleton("wrn40_1"), nn.Conv2d) == 1 + 3 * 6 * 2 + 2


@pytest.mark.parametrize("name, image_size, match", [
    ("convnet_w128", 7, "needs at least 8 pixels, not 7"),
    ("convnet_w32_d6", 32, "needs at least 64 pixels, not 32"),
    ("vgg11_bn", 28, "needs at least 32 pixels, not 28"), ("wrn17_2", 32, "6n [+] 4.*not 17"),
    ("swin_t", 33, "2x2 pixels.* 33x33"), ("swin_t", 90, "4x4 pixels.* 90x90"),
    ("squeezenet", 13, "needs at least 14 pixels, not 13"),
    ("deit_tiny", 30, "4x4 pixels.* 30x30"), ("deit_tiny", 100, "16x16 pixels.* 100x100")])
def test_a_size_that_does_not_fit_is_refused_in_a_sentence(name, image_size, match):
    with pytest.raises(ValueError, match=match):
        build_model(name, 10, image_size)


@pytest.mark.parametrize("name", ("convnet_w128", "wrn16_2", "deit_tiny", "mobilenetv2_05", "alexnet"))
def test_networks_without_published_weights_say_so(name):
    with pytest.raises(ValueError, match=f"no ImageNet weights for '{name}'.*resnet18"):
        pretrained_weights(name)


@pytest.mark.parametrize("name, smallest", [("squeezenet", 14), ("regnet_x_8gf", 8)])
def test_the_smallest_images_that_are_taken_make_logits(name, smallest):
    for image_size in smallest, smallest + 1, 65:
        assert skeleton(name, 7, image_size).eval()(torch.empty(1, 3, image_size, image_size,
                                                                device="meta")).shape == (1, 7)


def test_the_convnets_pooling_is_the_mean_of_four_pixels():
    last = torch.randn(2, 3, 8, 6).contiguous(memory_format=torch.channels_last)
    double = torch.randn(2, 3, 8, 6, dtype=torch.float64)
    for x in torch.randn(2, 3, 8, 6), last, torch.randn(2, 3, 7, 5), double:
        x.requires_grad_()
        upstream = torch.randn(2, 3, x.shape[2] // 2, x.shape[3] // 2, dtype=x.dtype)
        (mine, slope), (expected, theirs) = ((pool(x), torch.autograd.grad((upstream * pool(x)).sum(), x)[0])
                                             for pool in (Halve(), nn.AvgPool2d(2)))
        assert mine.dtype == x.dtype and torch.allclose(mine, expected, atol=1e-6)
        assert torch.allclose(slope, theirs, atol=1e-6)
    x = torch.randn(2, 3, 8, 6, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(Halve()(x), nn.AvgPool2d(2)(x.float()).bfloat16())


def test_the_shufflenet_is_torchvisions_in_both_layouts():
    torch.manual_seed(0)
    mine = build_model("shufflenetv2_05", 10, 224).eval()
    theirs = torchvision.models.shufflenet_v2_x0_5(num_classes=10).eval()
    theirs.load_state_dict(mine.state_dict())
    x = torch.randn(2, 3, 96, 96)
    expected = theirs(x)
    for layout in torch.contiguous_format, torch.channels_last:
        assert torch.allclose(mine.to(memory_format=layout)(x), expected, atol=1e-6)
