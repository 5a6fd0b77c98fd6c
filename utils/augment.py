"""Augmentation in two steps: `draw_*` takes what is random from a generator, `apply_*` uses it on tensors.

Needs torch alone. A draw is a tensor or a dict of tensors, most with one row a sample, so it can be stored,
cut and replayed. Images are [N, C, S, S], square; crops are [N, 4] integers: top, left, height, width.
"""
import math

import torch
import torch.nn.functional as F
from torch import Tensor


def draw_resized_crop(n: int, size: int, generator: torch.Generator, scale: tuple = (0.08, 1.0),
                      ratio: tuple[float, float] = (3 / 4, 4 / 3)) -> Tensor:
    """n boxes of random area and aspect ratio in a square of `size` pixels, distributed as torchvision's
    RandomResizedCrop: ten attempts, then the whole image.   -> [n, 4]
    scale: smallest share of the area, a number or [n, 1], and largest; ratio: least and most, around 1"""
    def uniform(low, high, attempts):
        return torch.empty(n, attempts).uniform_(low, high, generator=generator)

    low, high = scale
    share = uniform(0, 1, 10) * (high - low) + low if torch.is_tensor(low) else uniform(low, high, 10)
    area, aspect = share * size * size, uniform(*torch.tensor(ratio).log().tolist(), 10).exp()
    place = uniform(0, 1, 2)
    height, width = (area / aspect).sqrt().round(), (area * aspect).sqrt().round()
    fits = (height.minimum(width) >= 1) & (height.maximum(width) <= size)
    first = fits.int().argmax(1, keepdim=True)                       # the first attempt that fits
    sides = torch.cat([height.gather(1, first), width.gather(1, first)], 1)
    sides = torch.where(fits.any(1, keepdim=True), sides, torch.tensor(float(size)))
    corner = (place * (size - sides + 1)).floor().minimum(size - sides)
    return torch.cat([corner, sides], 1).long()


def apply_resized_crop(images: Tensor, boxes: Tensor) -> Tensor:
    """Each box, resized bilinearly to the size of the images as by torchvision's resized_crop,
    differentiably; nothing outside the box is seen."""
    S = images.shape[-1]
    top, left, height, width = boxes.to(images).unbind(1)
    centres = (torch.arange(S, device=images.device, dtype=images.dtype) + 0.5) / S

    def coordinates(start, length):  # of the pixels to read, -1 .. 1 over the image
        pixel = (centres * length[:, None] - 0.5).clamp_(min=0).minimum(length[:, None] - 1) + start[:, None]
        return (2 * pixel + 1) / S - 1

    rows, columns = coordinates(top, height)[:, :, None], coordinates(left, width)[:, None, :]
    grid = torch.stack([columns.expand(-1, S, -1), rows.expand(-1, -1, S)], dim=-1)
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False)


def draw_flip(n: int, generator: torch.Generator) -> Tensor:
    """-> [n] booleans, true with probability 1/2."""
    return torch.rand(n, generator=generator) < 0.5


def apply_flip(images: Tensor, flip: Tensor) -> Tensor:
    """Mirror the images where flip [N] is true."""
    return torch.where(flip.to(images.device)[:, None, None, None], images.flip(-1), images)


def draw_shift(n: int, low: int, high: int, generator: torch.Generator) -> Tensor:
    """n vertical and horizontal shifts of low .. high pixels.   -> [n, 2]"""
    return torch.randint(low, high + 1, (n, 2), generator=generator)


def apply_shift(images: Tensor, shift: Tensor, wrap: bool = False) -> Tensor:
    """Move each image down and right by shift [N, 2] pixels. Pixels that enter are 0 (RandomCrop with
    padding), or with `wrap` those that left on the opposite side (circular)."""
    H, W = images.shape[2:]
    down, right = shift.to(images.device).unbind(1)
    rows = (torch.arange(H, device=images.device) - down[:, None])[:, None, :, None]       # to read from
    columns = (torch.arange(W, device=images.device) - right[:, None])[:, None, None, :]
    moved = images.take_along_dim(rows % H, 2).take_along_dim(columns % W, 3)
    inside = (rows == rows % H) & (columns == columns % W)
    return moved if wrap else moved * inside.to(moved.dtype)


def crop_floor(crop: str, n: int, floor: float = 0.08) -> float | Tensor:
    """The smallest share of the area that each of n crops takes: `floor`, or by CDA's curriculum (Sec. 3.2)
    floor + (1 - floor) f in iteration t of n, f = 1 - t/n (linear) or (1 + cos(pi t/n)) / 2 (cosine).
    -> number, or [n, 1]"""
    if crop == "resized":
        return floor
    done = torch.arange(n)[:, None] / n
    return floor + (1 - floor) * ((1 + torch.cos(math.pi * done)) / 2 if crop == "cosine" else 1 - done)


def draw_view(n: int, size: int, crop: str, flip: bool, roll: int, generator: torch.Generator) -> dict:
    """n views, of n images or of a batch in n iterations: crop none, pad<pixels> (RandomCrop with padding),
    resized (RandomResizedCrop), or in iterations linear, cosine (resized by `crop_floor`); then flip
    (bool: with probability 1/2); then roll (a circular shift of 0 .. roll pixels on both axes)."""
    draw = {}
    if crop in ("resized", "linear", "cosine"):
        draw["crop"] = draw_resized_crop(n, size, generator, (crop_floor(crop, n), 1.0))
    elif crop != "none":
        if not crop[3:].isdecimal() or crop[:3] != "pad":
            raise ValueError(f"crop {crop!r} is none of 'none', 'resized', 'linear', 'cosine', 'pad<pixels>'")
        draw["shift"] = draw_shift(n, -int(crop[3:]), int(crop[3:]), generator)
    if flip:
        draw["flip"] = draw_flip(n, generator)
    if roll:
        draw["roll"] = draw_shift(n, 0, roll, generator)
    return draw


def apply_view(images: Tensor, draw: dict[str, Tensor]) -> Tensor:
    """Images [N, C, S, S] under a draw of `draw_view`, differentiably."""
    if "crop" in draw:
        images = apply_resized_crop(images, draw["crop"])
    if "shift" in draw:
        images = apply_shift(images, draw["shift"])
    if "flip" in draw:
        images = apply_flip(images, draw["flip"])
    if "roll" in draw:
        images = apply_shift(images, draw["roll"], wrap=True)
    return images


def draw_beta(alpha: float, generator: torch.Generator) -> float:
    """One number of Beta(alpha, alpha), by Johnk's rejection."""
    while True:
        x, y = (torch.rand(2, generator=generator, dtype=torch.float64) ** (1 / alpha)).tolist()
        if 0 < x + y <= 1:
            return x / (x + y)


def draw_cutmix_box(size: int, generator: torch.Generator) -> Tensor:
    """The box [4] of CutMix: sides size * sqrt(1 - lambda), lambda of Beta(1, 1), uniform centre, clipped."""
    side = int(size * (1 - draw_beta(1.0, generator)) ** 0.5)
    centre = torch.randint(size, (2,), generator=generator)
    low, high = (centre - side // 2).clamp(min=0), (centre - side // 2 + side).clamp(max=size)
    return torch.cat([low, high - low])


def draw_epoch(n: int, size: int, batch_size: int, mix: str, generator: torch.Generator,
               scale: tuple[float, float] = (0.08, 1.0), flip: bool = True) -> dict[str, Tensor]:
    """What is random in one pass over n images of `size` pixels: crop, flip, and the mixing of batches of
    `batch_size` in random order; partners are a permutation of the batch, lambda or box one for the batch.
    mix: cutmix, mixup (lambda of Beta(0.8, 0.8)) or none; flip: whether to mirror, which changes nothing else
    -> a row for each *mixed sample*, named by its base image: crop [n, 4], flip [n], partner [n], box [n, 4]
    (0 but for cutmix), ratio [n] (the share of the base image); order [n], the images batch by batch"""
    if mix not in ("cutmix", "mixup", "none"):
        raise ValueError(f"mix {mix!r} is none of 'cutmix', 'mixup', 'none'")
    draw = {"crop": draw_resized_crop(n, size, generator, scale), "flip": draw_flip(n, generator) & flip,
            "order": torch.randperm(n, generator=generator), "partner": torch.arange(n),
            "box": torch.zeros(n, 4, dtype=torch.long), "ratio": torch.ones(n)}
    for batch in draw["order"].split(batch_size) if mix != "none" else ():
        draw["partner"][batch] = batch[torch.randperm(len(batch), generator=generator)]
        if mix == "cutmix":
            box = draw_cutmix_box(size, generator)
            draw["box"][batch], draw["ratio"][batch] = box, 1 - box[2:].prod().item() / size ** 2
        else:
            draw["ratio"][batch] = draw_beta(0.8, generator)
    return draw


def apply_epoch(images: Tensor, draw: dict[str, Tensor], index: Tensor, mix: str,
                mean_std: Tensor | None = None) -> Tensor:
    """The mixed samples `index` [B] of a draw of `draw_epoch` for all images [N, C, S, S], normalised floats,
    or uint8 with mean_std [2, 3].   -> [B, C, S, S].  A sample is bit for bit the same in any batch."""
    def augmented(chosen):
        view = images[chosen] if mean_std is None else normalize(images[chosen], *mean_std)
        return apply_flip(apply_resized_crop(view, draw["crop"][chosen]), draw["flip"][chosen])

    base = augmented(index)
    if mix == "none":
        return base
    partner = augmented(draw["partner"][index])
    if mix == "mixup":
        ratio = draw["ratio"][index].to(base)[:, None, None, None]
        return ratio * base + (1 - ratio) * partner
    pixel = torch.arange(images.shape[-1], device=images.device)
    top, left, height, width = draw["box"][index].to(images.device)[:, :, None].unbind(1)
    rows, columns = (pixel >= top) & (pixel < top + height), (pixel >= left) & (pixel < left + width)
    return torch.where(rows[:, None, :, None] & columns[:, None, None, :], partner, base)


def draw_colour(n: int, generator: torch.Generator) -> dict[str, Tensor]:
    """MoCo's change of colours for each of n images: with probability 0.8 torchvision's ColorJitter(0.4, 0.4,
    0.4, 0.1), then with 0.2 its Grayscale.   -> jitter, gray [n] booleans; order [n, 4] of the operations;
    factor [n, 4]: of brightness, contrast, saturation (0.6 .. 1.4), and the turn of the hue (-0.1 .. 0.1)"""
    jitter, gray = torch.rand(2, n, generator=generator)
    spread = (2 * torch.rand(n, 4, generator=generator) - 1) * torch.tensor([0.4, 0.4, 0.4, 0.1])
    return {"jitter": jitter < 0.8, "gray": gray < 0.2,
            "order": torch.rand(n, 4, generator=generator).argsort(1),
            "factor": torch.tensor([1.0, 1.0, 1.0, 0.0]) + spread}


def apply_colour(images: Tensor, draw: dict[str, Tensor]) -> Tensor:
    """RGB images [N, 3, H, W] of 0 .. 1 under a draw of `draw_colour`."""
    draw = {key: rows.to(images.device) for key, rows in draw.items()}
    changed = images
    for operation in draw["order"][:, :, None, None, None].unbind(1):
        factor = draw["factor"].gather(1, operation[:, :, 0, 0]).to(images)[:, :, None, None]
        grey = luma(changed)
        # blended with: black (0, brightness), the mean grey (1, contrast), grey (2, saturation)
        other = torch.where(operation == 1, grey.mean((2, 3), keepdim=True), grey * (operation == 2))
        blend = (factor * changed + (1 - factor) * other).clamp(0, 1)
        changed = torch.where(operation == 3, turn_hue(changed, factor), blend)
    changed = torch.where(draw["jitter"][:, None, None, None], changed, images)
    return torch.where(draw["gray"][:, None, None, None], luma(changed), changed)


def luma(images: Tensor) -> Tensor:
    """Grey of RGB images, ITU-R 601.   -> [N, 1, H, W]"""
    red, green, blue = images.split(1, 1)
    return 0.2989 * red + 0.587 * green + 0.114 * blue


def turn_hue(images: Tensor, turn: Tensor) -> Tensor:
    """Turn the hue of RGB images of 0 .. 1 by `turn` [N, 1, 1, 1] of the circle; value and chroma stay."""
    red, green, blue = images.split(1, 1)
    value = images.amax(1, keepdim=True)
    chroma = value - images.amin(1, keepdim=True)
    safe = torch.where(chroma == 0, 1, chroma)
    sixths = torch.where(value == red, (green - blue) / safe,
                         torch.where(value == green, 2 + (blue - red) / safe, 4 + (red - green) / safe))
    channels = torch.tensor([5, 3, 1], device=images.device)[:, None, None]
    place = (channels + sixths + 6 * turn) % 6
    return value - chroma * place.minimum(4 - place).clamp(0, 1)


def normalize(images: Tensor, mean, std) -> Tensor:
    """Images [N, 3, S, S] of 0 .. 255 -> float32, normalised.   mean, std: three numbers each, of pixels 0 ..
    1; as tensors on the images' device they cost no transfer"""
    return (images.float() / 255 - _channel(mean, images)) / _channel(std, images)


def to_uint8(images: Tensor, mean, std) -> Tensor:
    """The inverse of `normalize`, clamped to 0 .. 255 and rounded (the release truncates)."""
    images = images.detach().float() * _channel(std, images) + _channel(mean, images)
    return (images * 255).clamp(0, 255).round().to(torch.uint8)


def pixel_bounds(mean, std) -> list[Tensor]:
    """Black and white, normalised.   mean, std: as of `normalize`   -> low, high, each [3, 1, 1]"""
    return [(torch.tensor([value - m for m in mean]) / torch.tensor(std))[:, None, None] for value in (0, 1)]


def _channel(values, images):
    return torch.as_tensor(values, dtype=torch.float32, device=images.device)[:, None, None]


SIAMESE = "colour", "crop", "cutout", "flip", "scale", "rotate"


def draw_siamese(size: int, generator: torch.Generator) -> dict[str, Tensor]:
    """One family of differentiable siamese augmentation (DSA, arXiv:2102.08259), with parameters for all
    images alike at the strengths of the authors' code: brightness 1, saturation 2, contrast 0.5, crop 1/8,
    cutout 1/2, flip 1/2, scale 1.2, rotate 15 degrees.   -> {family: parameters}"""
    family = SIAMESE[torch.randint(len(SIAMESE), (), generator=generator)]
    u = torch.rand(3, generator=generator)
    if family == "colour":
        draw = torch.stack([u[0] - 0.5, 2 * u[1], u[2] + 0.5])     # added; factors of saturation, contrast
    elif family == "crop":
        draw = draw_shift(1, -int(size / 8 + 0.5), int(size / 8 + 0.5), generator)
    elif family == "cutout":                                         # the box may reach over the border
        side = int(size / 2 + 0.5)
        low = torch.randint(size + 1 - side % 2, (2,), generator=generator) - side // 2
        draw = torch.cat([low.clamp(min=0), (low + side).clamp(max=size)])       # top, left, bottom, right
    elif family == "flip":
        draw = u[:1] < 0.5
    elif family == "scale":
        draw = torch.diag(1 / 1.2 + (1.2 - 1 / 1.2) * u[:2])
    else:
        angle = torch.deg2rad(15 * (2 * u[0] - 1))
        draw = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()]).view(2, 2)
    return {family: draw}


def apply_siamese(images: Tensor, draw: dict[str, Tensor]) -> Tensor:
    """Images [N, C, S, S] in normalised units, all with the parameters of a draw of `draw_siamese`;
    differentiable twice. What enters is 0, the mean."""
    (family, draw), = draw.items()
    if family == "crop":
        return apply_shift(images, draw)
    if family == "flip":
        return apply_flip(images, draw)
    if family == "cutout":
        top, left, bottom, right = draw.tolist()
        kept = torch.ones_like(images[0, 0])
        kept[top:bottom, left:right] = 0
        return images * kept
    if family == "colour":
        shift, saturation, contrast = draw.to(images)
        images = images + shift
        grey = images.mean(1, keepdim=True)
        images = grey + saturation * (images - grey)
        mean = images.mean((1, 2, 3), keepdim=True)
        return mean + contrast * (images - mean)
    return apply_linear_map(images, draw)


def apply_linear_map(images: Tensor, matrix: Tensor) -> Tensor:
    """Each pixel reads, bilinearly and 0 outside, at matrix [2, 2] times its place (x, y) from the centre: as
    grid_sample on affine_grid's grid, which has no second derivative."""
    S = images.shape[-1]
    place = torch.arange(S, device=images.device, dtype=images.dtype) - (S - 1) / 2
    grid = torch.stack(torch.meshgrid(place, place, indexing="xy"))  # x, y: [2, S, S]
    columns, rows = torch.einsum("ij,jyx->iyx", matrix.to(images), grid) + (S - 1) / 2
    moved = torch.zeros_like(images)
    for row in rows.floor(), rows.floor() + 1:
        for column in columns.floor(), columns.floor() + 1:
            inside = (row >= 0) & (row < S) & (column >= 0) & (column < S)
            weight = (1 - (rows - row).abs()) * (1 - (columns - column).abs()) * inside
            moved = moved + weight * images[:, :, row.clamp(0, S - 1).long(), column.clamp(0, S - 1).long()]
    return moved
