"""What is drawn has the published distributions; applying it equals torchvision, or a loop over samples."""
import colorsys

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck
from torchvision.transforms import RandomResizedCrop
from torchvision.transforms.functional import resized_crop
from torchvision.transforms.v2 import functional as v2

from tests.helpers import assert_near
from utils.augment import (apply_colour, apply_epoch, apply_flip, apply_resized_crop, apply_shift, apply_view,
                           draw_beta,
                           draw_colour, draw_cutmix_box, draw_epoch, draw_flip, draw_resized_crop, draw_shift,
                           draw_view, normalize, to_uint8, turn_hue)

UNITS = [  # mean and standard deviation of CIFAR-10, of ImageNet, and none
    ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)), ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))]


pytestmark = pytest.mark.usefixtures("seed")


@pytest.fixture
def draw():
    return torch.Generator().manual_seed(0)


def assert_same_mean(sample, other):
    """Both are samples, or `other` is the exact mean: they agree within four standard errors."""
    sample, other = sample.double(), torch.as_tensor(other).double()
    error = sample.var() / len(sample) + (other.var() / len(other) if other.dim() else 0)
    assert (sample.mean() - other.mean()).abs() <= 4 * error.sqrt() + 1e-12


# Crops, flips and shifts

@pytest.mark.parametrize("antialias", (True, False))
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.float64, 1e-12)])
@pytest.mark.parametrize("side", (32, 9, 1))
def test_a_crop_equals_torchvisions(side, dtype, tolerance, antialias, draw):
    images = torch.rand(40, 3, side, side, dtype=dtype)
    boxes = draw_resized_crop(40, side, draw)
    boxes[0] = torch.tensor([0, 0, side, side])
    crops = apply_resized_crop(images, boxes)
    for image, box, crop in zip(images, boxes.tolist(), crops, strict=True):
        expected = resized_crop(image[None], *box, [side, side], antialias=antialias)[0]
        assert crop.shape == expected.shape and (crop - expected).abs().max() <= tolerance


def test_crops_and_shifts_are_differentiable(draw):
    images = torch.randn(3, 2, 6, 6, dtype=torch.float64, requires_grad=True)
    boxes, shift = draw_resized_crop(3, 6, draw), draw_shift(3, -2, 2, draw)
    assert gradcheck(lambda x: apply_resized_crop(x, boxes), images)
    for wrap in False, True:
        assert gradcheck(lambda x: apply_shift(x, shift, wrap), images)
    assert gradcheck(lambda x: apply_flip(x, torch.tensor([True, False, True])), images)


@pytest.mark.parametrize("side, scale, ratio", [
    (32, (0.08, 1.0), (3 / 4, 4 / 3)), (64, (0.3, 0.9), (3 / 4, 4 / 3)), (7, (0.08, 1.0), (1 / 3, 3.0))])
def test_crops_are_distributed_as_torchvisions(side, scale, ratio, draw):
    ours = draw_resized_crop(20_000, side, draw, scale, ratio)
    image = torch.empty(1, side, side)
    theirs = torch.tensor([RandomResizedCrop.get_params(image, scale, ratio) for _ in range(5_000)])
    assert ours.dtype == torch.int64 and ours.shape == (20_000, 4)
    assert (ours[:, :2] >= 0).all() and (ours[:, 2:] >= 1).all() and (ours[:, :2] + ours[:, 2:] <= side).all()
    describe = {
        "area": lambda t, l, h, w: h * w, "area squared": lambda t, l, h, w: (h * w) ** 2,
        "aspect": lambda t, l, h, w: (w / h).log(), "spread of the aspect": lambda t, l, h,
        w: (w / h).log() ** 2,
        "top": lambda t, l, h, w: t, "left": lambda t, l, h, w: l, "spread of the top": lambda t, l, h,
        w: t ** 2, "bottom": lambda t, l, h, w: t + h == side, "right": lambda t, l, h, w: l + w == side,
        "whole": lambda t, l, h, w: h * w == side ** 2, "diagonal": lambda t, l, h, w: t * l}
    for function in describe.values():
        assert_same_mean(*(function(*boxes.double().unbind(1)) for boxes in (ours, theirs)))


def test_a_crop_that_never_fits_is_the_whole_image(draw):
    assert draw_resized_crop(50, 8, draw, scale=(1.5, 2.0)).tolist() == [[0, 0, 8, 8]] * 50


def test_flips_mirror_the_chosen_half(draw):
    flip = draw_flip(4_000, draw)
    assert flip.dtype == torch.bool
    assert_same_mean(flip, 0.5)
    images, chosen = torch.rand(4, 3, 5, 5), torch.tensor([True, False, False, True])
    for image, mirrored, flipped in zip(images, chosen, apply_flip(images, chosen)):
        assert torch.equal(flipped, image[:, :, [4, 3, 2, 1, 0]] if mirrored else image)


def test_shifts_are_uniform_on_both_axes_including_their_bounds(draw):
    shift = draw_shift(20_000, -3, 5, draw)
    assert shift.shape == (20_000, 2)
    for a in range(-3, 6):
        for b in range(-3, 6):
            assert_same_mean((shift == torch.tensor([a, b])).all(1), 1 / 81)
    assert shift.min() == -3 and shift.max() == 5


def test_a_shift_is_a_crop_of_the_padded_image_or_with_wrap_a_roll():
    shift = torch.cartesian_prod(torch.arange(-9, 10), torch.arange(-9, 10))  # up to more than the image
    images = torch.rand(len(shift), 2, 7, 7)
    padded = F.pad(images, [9] * 4)
    for i, (moved, rolled) in enumerate(zip(apply_shift(images, shift),
                                            apply_shift(images, shift, wrap=True))):
        down, right = shift[i].tolist()
        assert torch.equal(moved, padded[i, :, 9 - down:16 - down, 9 - right:16 - right])
        assert torch.equal(rolled, images[i].roll((down, right), (1, 2)))


@pytest.mark.parametrize("crop", ("none", "resized", "pad4", "pad8"))
@pytest.mark.parametrize("flip", (False, True))
@pytest.mark.parametrize("roll", (0, 32))
def test_a_view_is_a_crop_then_a_flip_then_a_roll(crop, flip, roll, draw):
    images = torch.rand(200, 3, 16, 16, dtype=torch.float64)
    view = draw_view(200, 16, crop, flip, roll, draw)
    kind = {"none": set(), "resized": {"crop"}}.get(crop, {"shift"})
    assert view.keys() == kind | ({"flip"} if flip else set()) | ({"roll"} if roll else set())
    assert all(len(rows) == 200 for rows in view.values())
    expected = []
    for i, image in enumerate(images):
        if crop == "resized":
            image = resized_crop(image, *view["crop"][i].tolist(), [16, 16])
        elif crop != "none":
            pad = int(crop.removeprefix("pad"))
            down, right = view["shift"][i].tolist()
            assert max(abs(down), abs(right)) <= pad
            image = F.pad(image, [pad] * 4)[:, pad - down:pad - down + 16, pad - right:pad - right + 16]
        if flip and view["flip"][i]:
            image = image.flip(-1)
        if roll:
            image = image.roll(view["roll"][i].tolist(), (1, 2))
        expected.append(image)
    assert_near(apply_view(images, view), torch.stack(expected), 1e-12)
    if crop.startswith("pad"):
        assert view["shift"].min() == -pad and view["shift"].max() == pad
    if roll:
        assert view["roll"].min() == 0 and view["roll"].max() == 32


# Mixing

@pytest.mark.parametrize("alpha", (1.0, 0.8))
def test_draw_beta_has_mean_and_variance_of_the_beta_distribution(alpha, draw):
    sample = torch.tensor([draw_beta(alpha, draw) for _ in range(5_000)], dtype=torch.float64)
    assert 0 <= sample.min() < 0.01 and 0.99 < sample.max() <= 1
    assert_same_mean(sample, 0.5)
    assert_same_mean((sample - 0.5) ** 2, 1 / (4 * (2 * alpha + 1)))
    assert_same_mean((sample < 0.1), torch.distributions.Beta(alpha, alpha).sample((100_000,)) < 0.1)


def test_cutmix_boxes_have_the_published_distribution(draw):
    """lambda uniform, side = floor(S sqrt(1 - lambda)), uniform centre, clipped: every mean is a sum over
    sides."""
    S = 12
    boxes = torch.stack([draw_cutmix_box(S, draw) for _ in range(5_000)])
    assert boxes.shape == (5_000, 4) and (boxes >= 0).all() and (boxes[:, :2] + boxes[:, 2:] <= S).all()
    area = start = 0.0
    for side in range(S):
        spans = [(max(c - side // 2, 0), min(c - side // 2 + side, S)) for c in range(S)]
        length = sum(end - low for low, end in spans) / S
        share = ((side + 1) ** 2 - side ** 2) / S ** 2
        area, start = area + share * length ** 2, start + share * sum(low for low, _ in spans) / S
    assert_same_mean(boxes[:, 2] * boxes[:, 3], area)
    assert_same_mean(boxes[:, 0], start)
    assert_same_mean(boxes[:, 1], start)
    top, left, height, width = boxes.unbind(1)
    inside = (top > 0) & (left > 0) & (top + height < S) & (left + width < S)
    assert inside.sum() > 500 and torch.equal(height[inside], width[inside])  # squares unless clipped


@pytest.mark.parametrize("mix", ("cutmix", "mixup", "none"))
def test_an_epoch_mixes_each_batch_with_itself_and_alike(mix, draw):
    n, S = 50, 16
    epoch = draw_epoch(n, S, 16, mix, draw, scale=(0.5, 1.0))
    assert epoch["order"].sort().values.tolist() == list(range(n))
    assert epoch["order"].tolist() != list(range(n))
    assert (epoch["crop"][:, 2:].prod(1) / S ** 2).min() > 0.4 and len(epoch["crop"].unique(dim=0)) > 10
    assert len(epoch["flip"].unique()) == 2
    ratios = []
    for batch in epoch["order"].split(16):
        partner, box, ratio = (epoch[key][batch] for key in ("partner", "box", "ratio"))
        assert partner.sort().values.tolist() == batch.sort().values.tolist()
        assert len(box.unique(dim=0)) == len(ratio.unique()) == 1
        top, left, height, width = box[0].tolist()
        mask = torch.ones(S, S)
        mask[top:top + height, left:left + width] = 0  # pixels of the base image
        ratios.append(ratio[0].item())
        if mix == "mixup":
            assert not box.any() and 0 < ratio[0] < 1
        else:
            assert ratio[0].item() == pytest.approx(mask.mean().item(), abs=1e-7)
    if mix == "none":
        assert torch.equal(epoch["partner"], torch.arange(n)) and not epoch["box"].any() and (epoch["ratio"]
                                                                                              == 1).all()
    else:
        assert len(set(ratios)) == 4 and (epoch["partner"] != torch.arange(n)).sum() > 30


def test_an_epoch_depends_on_its_generator_alone():
    def epoch(seed):
        return draw_epoch(20, 16, 8, "cutmix", torch.Generator().manual_seed(seed))

    first, again, other = epoch(1), epoch(1), epoch(2)
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert all(not torch.equal(first[key], other[key]) for key in first)


def test_mixup_ratios_are_of_beta_0_8(draw):
    ratios = torch.cat([draw_epoch(500, 1, 1, "mixup", draw)["ratio"] for _ in range(10)])
    assert_same_mean((ratios - 0.5) ** 2, 1 / (4 * 2.6))


def test_the_default_crops_of_an_epoch_are_those_of_the_paper(draw):
    areas = draw_epoch(2_000, 64, 100, "none", draw)["crop"][:, 2:].prod(1) / 64 ** 2
    assert 0.07 < areas.min() < 0.1 and areas.max() > 0.95


@pytest.mark.parametrize("mix", ("cutmix", "mixup", "none"))
def test_replaying_an_epoch_equals_a_loop_over_samples(mix, draw):
    images = torch.rand(30, 3, 16, 16, dtype=torch.float64)
    epoch = draw_epoch(30, 16, 8, mix, draw)

    def augmented(i):
        crop = resized_crop(images[i], *epoch["crop"][i].tolist(), [16, 16])
        return crop.flip(-1) if epoch["flip"][i] else crop

    index = torch.randperm(30)[:20]
    mixed = apply_epoch(images, epoch, index, mix)
    for sample, i in zip(mixed, index.tolist(), strict=True):
        expected, partner = augmented(i), augmented(epoch["partner"][i])
        if mix == "mixup":
            ratio = epoch["ratio"][i].double()
            expected = ratio * expected + (1 - ratio) * partner
        elif mix == "cutmix":
            top, left, height, width = epoch["box"][i].tolist()
            expected[:, top:top + height, left:left + width] = partner[:, top:top + height, left:left + width]
        assert_near(sample, expected, 1e-12)


@pytest.mark.parametrize("mix", ("cutmix", "mixup", "none"))
def test_the_bytes_of_a_replayed_sample_do_not_depend_on_its_batch(mix, draw):
    images = torch.randn(40, 3, 32, 32)
    epoch = draw_epoch(40, 32, 16, mix, draw)
    whole = apply_epoch(images, epoch, torch.arange(40), mix)
    assert whole.dtype == torch.float32
    for index in epoch["order"].split(7):
        assert torch.equal(apply_epoch(images, epoch, index, mix), whole[index])
    for i in range(40):
        assert torch.equal(apply_epoch(images, epoch, torch.tensor([i]), mix)[0], whole[i])


@pytest.mark.parametrize("mix", ("cutmix", "mixup", "none"))
def test_images_of_bytes_are_replayed_as_normalised_ones(mix, draw):
    images, (mean, std) = torch.randint(256, (40, 3, 32, 32), dtype=torch.uint8), UNITS[0]
    epoch = draw_epoch(40, 32, 16, mix, draw)
    for index in epoch["order"].split(7):
        for units in (mean, std), torch.tensor([mean, std]):
            mixed = apply_epoch(images, epoch, index, mix, units)
            assert torch.equal(mixed, apply_epoch(normalize(images, mean, std), epoch, index, mix))


@pytest.mark.parametrize("mix", ("cutmix", "mixup", "none"))
def test_replaying_takes_nothing_back_from_the_device(mix, draw):
    """On the device `meta` there are no values, so whatever waited for one, or mixed devices, would fail."""
    epoch = {key: rows.to("meta") for key, rows in draw_epoch(40, 32, 16, mix, draw).items()}
    images, units = torch.empty(40, 3, 32, 32, dtype=torch.uint8, device="meta"), torch.empty(2, 3,
                                                                                              device="meta")
    mixed = apply_epoch(images, epoch, epoch["order"][:16], mix, units)
    assert mixed.is_meta and mixed.shape == (16, 3, 32, 32)
    for crop in "resized", "pad4":
        view = {key: rows.to("meta") for key, rows in draw_view(16, 32, crop, True, 8, draw).items()}
        assert apply_view(mixed, view).is_meta


# Units

@pytest.mark.parametrize("mean, std", UNITS)
def test_all_256_values_survive_normalisation(mean, std):
    images = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(2, 3, -1, -1)
    normal = normalize(images, mean, std)
    assert normal.dtype == torch.float32
    for channel in range(3):
        expected = (torch.arange(256, dtype=torch.float64) / 255 - mean[channel]) / std[channel]
        assert (normal[1, channel].flatten() - expected).abs().max() < 1e-6
    assert torch.equal(to_uint8(normal.requires_grad_(), mean, std), images)


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
def test_to_uint8_rounds_and_clamps(dtype):
    pixels = torch.tensor([-5.0, 0.4, 0.6, 99.4, 99.6, 254.6, 255.4, 300.0], dtype=dtype)
    mean, std = UNITS[0]
    images = torch.stack([(pixels / 255 - m) / s for m, s in zip(mean, std)])[None, :, None]
    assert to_uint8(images, mean, std)[0, :, 0].tolist() == [[0, 0, 1, 99, 100, 255, 255, 255]] * 3


# Colour

ADJUST = v2.adjust_brightness, v2.adjust_contrast, v2.adjust_saturation, v2.adjust_hue


@pytest.mark.parametrize("size", [16, 1])
def test_colours_change_as_torchvisions_image_by_image(size, draw):
    images = torch.rand(200, 3, size, size, dtype=torch.float64)
    images[:40] = images[:40].round()                                # pure colours, black and white
    images[40:60] = images[40:60, :1]                                # grey ones
    colour = draw_colour(200, draw)
    assert all(colour[key].any() and not colour[key].all() for key in ("jitter", "gray"))
    changed = apply_colour(images, colour)
    for number, image in enumerate(images):
        for operation in colour["order"][number].tolist() if colour["jitter"][number] else ():
            image = ADJUST[operation](image, colour["factor"][number, operation].item())
        if colour["gray"][number]:
            image = v2.rgb_to_grayscale(image, num_output_channels=3)
        assert (changed[number] - image).abs().max() <= 5e-6         # torchvision turns hues in float32
    assert changed.min() >= 0 and changed.max() <= 1


def test_a_turned_hue_is_that_of_hsv():
    images, turns = torch.rand(20, 3, 4, 4, dtype=torch.float64), torch.rand(20, 1, 1, 1,
                                                                             dtype=torch.float64) - 0.5
    images[:10] = images[:10].round()
    for before, turn, after in zip(images, turns, turn_hue(images, turns)):
        for old, new in zip(before.flatten(1).T.tolist(), after.flatten(1).T):
            hue, saturation, value = colorsys.rgb_to_hsv(*old)
            assert_near(new, colorsys.hsv_to_rgb((hue + turn.item()) % 1, saturation, value), 1e-12)


def test_colours_are_drawn_as_moco_does(draw):
    colour = draw_colour(20_000, draw)
    for key, share in ("jitter", 0.8), ("gray", 0.2):
        assert_same_mean(colour[key], share)
    for operation, (low, high) in enumerate([(0.6, 1.4)] * 3 + [(-0.1, 0.1)]):
        factor = colour["factor"][:, operation]
        assert low <= factor.min() < low + 1e-3 and high - 1e-3 < factor.max() <= high
        assert_same_mean(factor, (low + high) / 2)
        assert_same_mean((factor - (low + high) / 2) ** 2, (high - low) ** 2 / 12)
    places = colour["order"].argsort(1)
    assert (colour["order"].sort(1)[0] == torch.arange(4)).all()
    orders, counts = places.unique(dim=0, return_counts=True)
    assert len(orders) == 24 and ((counts - 20_000 / 24).abs() < 5 * (20_000 / 24) ** 0.5).all()
    assert_same_mean((colour["jitter"] & colour["gray"]), 0.16)
