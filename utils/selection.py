"""Which images of the original data to keep: coresets, forgetting, loss scores, crops.

recover.py calls `real_images`. Those that choose look at the images of one class, but for `count_forgetting`
and `drop_largest`; of equal images they take the first.
"""
import argparse
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from utils import fail
from utils.augment import apply_resized_crop, draw_resized_crop, normalize
from utils.data import Split
from utils.presets import SELECTIONS, UNMATCHED
from utils.provenance import data_hash
from utils.run import generator, send
from utils.teachers import training_split


def _require(count, images):
    if not 0 < count <= images:
        raise ValueError(f"cannot select {count} of {images} images")


def herding(features: Tensor, count: int) -> Tensor:
    """Herding (Welling, ICML 2009): greedily the image that brings the mean of the chosen closest to the mean
    of all, argmin || mu - (sum of the chosen + f) / (k + 1) ||_2.
    features [n, d] -> distinct indices [count], in the order of choice. ValueError unless 0 < count <= n"""
    _require(count, len(features))
    mean, total, chosen = features.mean(0), torch.zeros_like(features[0]), []
    while len(chosen) < count:
        distance = torch.linalg.vector_norm(mean - (total + features) / (len(chosen) + 1), dim=1)
        distance[chosen] = torch.inf
        chosen.append(int(distance.argmin()))
        total = total + features[chosen[-1]]
    return torch.tensor(chosen, device=features.device)


def k_center(features: Tensor, count: int) -> Tensor:
    """Greedy k-center (Sener & Savarese, ICLR 2018): first the image nearest to the mean, then always the one
    farthest from its nearest chosen.   As `herding`."""
    _require(count, len(features))
    chosen = [int(torch.linalg.vector_norm(features - features.mean(0), dim=1).argmin())]
    distance = torch.full_like(features[:, 0], torch.inf)
    while len(chosen) < count:
        distance = distance.minimum(torch.linalg.vector_norm(features - features[chosen[-1]], dim=1))
        distance[chosen[-1]] = -1                           # behind a copy of a chosen image, which is at 0
        chosen.append(int(distance.argmax()))
    return torch.tensor(chosen, device=features.device)


def count_forgetting(events: Tensor, learned: Tensor, before: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """One epoch of forgetting events (Toneva et al., ICLR 2019): an image right the last time and wrong now.
    events [N] integers, learned [N] whether the image was ever right; before, right [N]: right the last time,
    now. All start from 0 and False.   -> new events, new learned"""
    return events + (before & ~right), learned | right


def most_forgotten(events: Tensor, learned: Tensor, count: int) -> Tensor:
    """The most events first, an image that was never learned before all others, as if forgotten infinitely
    often.   events, learned [n], see `count_forgetting` -> indices [count]"""
    _require(count, len(events))
    return torch.where(learned, events, events.max() + 1).argsort(descending=True, stable=True)[:count]


def last_epoch_weights(epochs: int, sigma: float = 3.0) -> Tensor:
    """BiLP (arXiv:2305.18381), Suppl. 6.4: weights [epochs], float64, such that (weights * losses).sum() is
    the last value of the loss curve smoothed by a Gaussian of `sigma` epochs. The filter ends at 4 sigma and
    the curve goes on mirrored (d c b a | a b c d | d c b a), scipy's defaults. With sigma 3 the last 8 epochs
    have 99 % of the weight."""
    radius = int(4 * sigma + 0.5)
    offset = torch.arange(-radius, radius + 1)
    kernel = (-0.5 * (offset.double() / sigma).square()).softmax(0)
    epoch = (epochs - 1 + offset) % (2 * epochs)
    return kernel.new_zeros(epochs).index_add_(0, epoch.minimum(2 * epochs - 1 - epoch), kernel)


def drop_largest(scores: Tensor, labels: Tensor, ratio: float) -> Tensor:
    """BiLP's preemptive pruning: of every class of n images the int(ratio * n) of largest score are dropped.
    scores, labels [N] -> sorted indices of the kept"""
    kept = []
    for label in labels.unique():
        members = (labels == label).nonzero().squeeze(1)
        order = scores[members].argsort(descending=True, stable=True)
        kept.append(members[order[int(ratio * len(members)):]])
    return torch.cat(kept).sort().values


def mosaic(images: Tensor, factor: int) -> Tensor:
    """RDED (arXiv:2312.03526): factor² images, each as small as 1/factor, are the tiles of one; tile k, row
    by row, of image n is images[k N + n].   images [factor² N, 3, S, S], S a multiple of factor -> [N, 3, S,
    S]"""
    size = images.shape[-1] // factor
    tiles = F.avg_pool2d(images, factor).view(factor, factor, -1, 3, size, size)
    return tiles.permute(2, 3, 0, 4, 1, 5).reshape(-1, 3, factor * size, factor * size)


def lowest_loss_crops(losses: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """RDED (arXiv:2312.03526): of each image its crop of least loss, and of these the `count` of least loss,
    in ascending order.   losses [images, crops] -> images [count], crops [count]"""
    _require(count, len(losses))
    images = losses.amin(1).argsort(stable=True)[:count]
    return images, losses.argmin(1)[images]


def class_indices(split: Split, kept: Tensor, classes: list[str], ipc: int, tiles: int = 1) -> list[Tensor]:
    """The images `kept` of each class of a split. Stops where a class has too few for ipc * tiles."""
    labels = split.labels.cpu()
    members = [kept[labels[kept] == label] for label in range(len(classes))]
    fewest = min(range(len(classes)), key=lambda label: len(members[label]))
    if (found := len(members[fewest])) < ipc * tiles:
        used = f" with --mosaic {round(tiles ** 0.5)} takes {ipc * tiles}, which" * (tiles > 1)
        fail(f"--ipc {ipc}{used} is more than the {found} training images in use of class {classes[fewest]}; "
             f"use at most {found // tiles}")
    return members


def real_images(args: argparse.Namespace, paths: SimpleNamespace, data: dict, models: dict[str, nn.Module],
                records: dict[str, dict], device: torch.device) -> "RealImages | SimpleNamespace":
    """`RealImages` for a method or an --init that takes some, else an object that starts from noise."""
    tiled = args.mosaic > 1 and args.method not in SELECTIONS
    if tiled and args.init == "noise":
        fail(f"--mosaic {args.mosaic} is of real images; name an --init for them, or --mosaic 1")
    if args.stay and args.init == "noise" and args.method not in UNMATCHED:
        fail(f"--stay {args.stay:g} is of real images; name an --init for them, or --stay 0")
    if tiled and data["image_size"] % args.mosaic:
        fail(f"--mosaic {args.mosaic}: use a divisor of the images' {data['image_size']} pixels")
    if args.method in UNMATCHED or args.init != "noise":
        return RealImages(args, paths, data, models, records, device)
    return SimpleNamespace(starts={}, fingerprint=None)


class RealImages:
    """The training images that a method or an --init of recover.py takes: those that the first backbone was
    trained on.   split: the data set; members: [LongTensor], those of each class; fingerprint: of the data;
    chosen: [LongTensor [ipc]], those of each class that a selection writes; starts: {(class, index): [3, S,
    S]}, normalised, of --init, {} for noise"""

    def __init__(self, args, paths, data, models, records, device):
        self.data, self.seed, self.device, self.first = data, args.seed, device, args.backbones[0]
        self.model, self.record = models.get(self.first), records.get(self.first, {})
        self.split = training_split(args, paths.teachers, data, records)
        selects, tiles = args.method in SELECTIONS, args.mosaic ** 2
        kept = self.record.get("kept", torch.arange(len(self.split)))
        self.members = class_indices(self.split, kept, data["classes"], args.ipc, 1 if selects else tiles)
        self.fingerprint = data_hash(data, len(self.split))
        self.chosen = self.select(args.method, args.ipc) if selects else []
        starts = not selects and args.init != "noise"
        self.starts = self.select_starts(args.init, args.ipc, tiles) if starts else {}

    def select(self, method: str, count: int) -> list[Tensor]:
        """Which `count` images of each class a method takes: random, herding, kcenter, forgetting."""
        if method == "random":
            return [pool[torch.randperm(len(pool), generator=generator("random", self.seed, label))[:count]]
                    for label, pool in enumerate(self.members)]
        if method == "forgetting":
            if "forgetting" not in self.record:
                fail(f"--backbones {self.first}: squeeze.py counts what a backbone forgets, but not of "
                     "pretrained and weak ones, nor with --objective moco; name another first")
            events, learned = self.record["forgetting"]["events"], self.record["forgetting"]["learned"]
            return [pool[most_forgotten(events[pool], learned[pool], count)] for pool in self.members]
        known, choose = self.features(), {"herding": herding, "kcenter": k_center}[method]
        return [pool[choose(known[pool], count)] for pool in self.members]

    def features(self) -> Tensor:
        """What the last linear layer of the first backbone is given for every training image.   -> [N, d]"""
        linear, found = [layer for layer in self.model.modules() if isinstance(layer, nn.Linear)], []
        if not linear:
            fail(f"--backbones {self.first}: features are the input of a linear layer, and it has none; name "
                 "another first")
        hook = linear[-1].register_forward_pre_hook(lambda _, inputs: found.append(inputs[0].float().cpu()))
        with torch.inference_mode():
            for images, _ in self.split.batches(500):
                self.model(normalize(send(images, self.device), self.data["mean"], self.data["std"]))
        hook.remove()
        return torch.cat(found)

    @torch.no_grad()
    def select_starts(self, init: str, ipc: int, tiles: int) -> dict[tuple[int, int], Tensor]:
        """init real, herding, kcenter: training images of each class, random or chosen; crops: the
        `best_crops` of 300 random ones, or more where needed. tiles: images in each start, see `mosaic`
        -> {(class, index): [3, S, S]}"""
        starts, count = {}, ipc * tiles
        selected = self.select(init, count) if init in ("herding", "kcenter") else None
        for label, pool in enumerate(self.members):
            rng = generator("init", self.seed, label)
            several = max(300, count) if init == "crops" else count
            random = pool[torch.randperm(len(pool), generator=rng)[:several]]
            images = self.split.read(selected[label] if selected else random).to(self.device)
            images = normalize(images, self.data["mean"], self.data["std"])
            if init == "crops":
                images = best_crops(self.model, images, label, count, rng)
            starts |= {(label, index): image
                       for index, image in enumerate(mosaic(images, round(tiles ** 0.5)).cpu())}
        return starts


def best_crops(model: nn.Module, images: Tensor, label: int, count: int, rng: torch.Generator,
               crops: int = 5) -> Tensor:
    """RDED (arXiv:2312.03526): of `crops` random square crops of each image [n, 3, S, S] of a class the one
    of least loss, and of these the `count` of least loss.   -> [count, 3, S, S]"""
    boxes = draw_resized_crop(len(images) * crops, images.shape[-1], rng, ratio=(1.0, 1.0))
    boxes = boxes.view(len(images), crops, 4).to(images.device)
    losses = []
    for part, box in zip(images.split(100), boxes.split(100)):
        labels = torch.full((len(part),), label, device=images.device)
        losses.append(torch.stack([F.cross_entropy(model(apply_resized_crop(part, one)), labels,
                                                   reduction="none") for one in box.unbind(1)], dim=1))
    image, crop = lowest_loss_crops(torch.cat(losses), count)
    return apply_resized_crop(images[image], boxes[image, crop])
