"""Which images of the original data to keep: coresets, forgetting, loss scores, crops.

recover.py calls `training_images`, `select` and `real_starts`. Of the others, everything but
`count_forgetting`, `drop_largest` and `rank_correlation` looks at the images of one class.
"""
import json

import torch
import torch.nn.functional as F
from torch import nn

from utils import fail
from utils.augment import apply_resized_crop, draw_resized_crop, normalize
from utils.data import load_split
from utils.presets import SELECTIONS
from utils.provenance import check_classes, check_trained, fingerprint
from utils.run import generator, send


def _require(count, images):
    if not 0 < count <= images:
        raise ValueError(f"cannot select {count} of {images} images")


def herding(features, count):
    """Herding (Welling, ICML 2009): greedily the image that brings the mean of the chosen closest to the mean
    of all, argmin || mu - (sum of the chosen + f) / (k + 1) ||_2; of equals the first.

    features [n, d] -> distinct indices [count], in the order of choice. ValueError unless 0 < count <= n, as
    below.
    """
    _require(count, len(features))
    mean, total, chosen = features.mean(0), torch.zeros_like(features[0]), []
    while len(chosen) < count:
        distance = torch.linalg.vector_norm(mean - (total + features) / (len(chosen) + 1), dim=1)
        distance[chosen] = torch.inf
        chosen.append(int(distance.argmin()))
        total = total + features[chosen[-1]]
    return torch.tensor(chosen, device=features.device)


def k_center(features, count):
    """Greedy k-center (Sener & Savarese, ICLR 2018): first the image nearest to the mean, then always the one
    farthest from its nearest chosen; of equals the first.   features [n, d] -> distinct indices [count], in
    the order of choice"""
    _require(count, len(features))
    chosen = [int(torch.linalg.vector_norm(features - features.mean(0), dim=1).argmin())]
    distance = torch.full_like(features[:, 0], torch.inf)
    while len(chosen) < count:
        distance = distance.minimum(torch.linalg.vector_norm(features - features[chosen[-1]], dim=1))
        distance[chosen[-1]] = -1                           # behind a copy of a chosen image, which is at 0
        chosen.append(int(distance.argmax()))
    return torch.tensor(chosen, device=features.device)


def count_forgetting(events, learned, before, right):
    """One epoch of forgetting events (Toneva et al., ICLR 2019): an image right the last time and wrong now.

    events [N] integers, learned [N] whether the image was ever right; before, right [N]: right the last time,
    now. All start from 0 and False.   -> new events, new learned
    """
    return events + (before & ~right), learned | right


def most_forgotten(events, learned, count):
    """The most events first, an image that was never learned before all others, as if forgotten infinitely
    often; of equals the first.   events, learned [n], see `count_forgetting` -> indices [count]"""
    _require(count, len(events))
    return torch.where(learned, events, events.max() + 1).argsort(descending=True, stable=True)[:count]


def last_epoch_weights(epochs, sigma=3.0):
    """BiLP (arXiv:2305.18381), Suppl. 6.4: weights [epochs], float64, such that (weights * losses).sum() is
    the last value of the loss curve smoothed by a Gaussian of `sigma` epochs. The filter ends at 4 sigma and
    the curve goes on mirrored (d c b a | a b c d | d c b a), scipy's defaults. With sigma 3 the last 8 epochs
    have 99 % of the weight."""
    radius = int(4 * sigma + 0.5)
    offset = torch.arange(-radius, radius + 1)
    kernel = (-0.5 * (offset.double() / sigma).square()).softmax(0)
    epoch = (epochs - 1 + offset) % (2 * epochs)
    return kernel.new_zeros(epochs).index_add_(0, epoch.minimum(2 * epochs - 1 - epoch), kernel)


def drop_largest(scores, labels, ratio):
    """BiLP's preemptive pruning: of every class of n images the int(ratio * n) of largest score are dropped;
    of equals the lower index first.   scores, labels [N] -> sorted indices of the kept"""
    kept = []
    for label in labels.unique():
        members = (labels == label).nonzero().squeeze(1)
        order = scores[members].argsort(descending=True, stable=True)
        kept.append(members[order[int(ratio * len(members)):]])
    return torch.cat(kept).sort().values


def _ranks(x):
    """x [n] -> ranks [n] from 1, float64; equals share the mean of theirs."""
    _, inverse, counts = x.unique(return_inverse=True, return_counts=True)
    return (counts.cumsum(0) - (counts.double() - 1) / 2)[inverse]


def rank_correlation(a, b):
    """Spearman's: the correlation of the ranks of a and b, both [n], as a float; nan where one of them is
    constant."""
    return torch.corrcoef(torch.stack([_ranks(a), _ranks(b)]))[0, 1].item()


def mosaic(images, factor):
    """RDED (arXiv:2312.03526): factor² images, each as small as 1/factor, are the tiles of one; tile k, row
    by row, of image n is images[k N + n].   images [factor² N, 3, S, S], S a multiple of factor -> [N, 3, S,
    S]"""
    size = images.shape[-1] // factor
    tiles = F.avg_pool2d(images, factor).view(factor, factor, -1, 3, size, size)
    return tiles.permute(2, 3, 0, 4, 1, 5).reshape(-1, 3, factor * size, factor * size)


def lowest_loss_crops(losses, count):
    """RDED (arXiv:2312.03526): of each image its crop of least loss, and of these the `count` of least loss,
    in ascending order; of equals the first.   losses [images, crops] -> images [count], crops [count]"""
    _require(count, len(losses))
    crop = losses.argmin(1)
    images = losses.amin(1).argsort(stable=True)[:count]
    return images, crop[images]


def class_indices(split, kept, classes, ipc, tiles=1):
    """The images `kept` of each class of a split.   -> [LongTensor]   Stops where a class has too few for ipc
    * tiles."""
    labels = split.labels.cpu()
    members = [kept[labels[kept] == label] for label in range(len(classes))]
    fewest = min(range(len(classes)), key=lambda label: len(members[label]))
    if (found := len(members[fewest])) < ipc * tiles:
        used = f" with --mosaic {round(tiles ** 0.5)} takes {ipc * tiles}, which" * (tiles > 1)
        fail(f"--ipc {ipc}{used} is more than the {found} training images of class {classes[fewest]}; use at "
             f"most "
             f"{found // tiles}")
    return members


def training_images(args, paths, data, records):
    """The training images that a method or an --init takes: those that the first backbone was trained on.
    -> split, members [LongTensor] of each class, fingerprint of both"""
    if data["image_size"] % args.mosaic:
        fail(f"--mosaic {args.mosaic} does not divide the {data['image_size']} pixels of an image; use a "
             "number that does")
    split = load_split(args.dataset, args.data_dir, "train", data["image_size"], args.workers,
                       holdout=args.holdout, imbalance=args.imbalance)
    check_classes(split.classes, data["classes"], f"--dataset {args.dataset}",
                  f"the teachers in {paths.teachers}")
    check_trained(split, records, paths)
    kept = records.get(args.backbones[0], {}).get("kept", torch.arange(len(split)))
    tiles = 1 if args.method in SELECTIONS else args.mosaic ** 2
    members = class_indices(split, kept, data["classes"], args.ipc, tiles)
    return split, members, {"data": fingerprint(json.dumps([data, len(split)]))}


def features(model, split, data, device):
    """What the last linear layer of a backbone is given for every training image.   -> [N, d]"""
    linear, found = [layer for layer in model.modules() if isinstance(layer, nn.Linear)], []
    hook = linear[-1].register_forward_pre_hook(lambda layer, inputs: found.append(inputs[0].float().cpu()))
    with torch.inference_mode():
        for images, _ in split.batches(500):
            model(normalize(send(images, device), data["mean"], data["std"]))
    hook.remove()
    return torch.cat(found)


def select(method, count, members, split, *, first, data, seed, device):
    """Which `count` images of each class a method takes: random, herding, kcenter, forgetting.
    members: [LongTensor], those of each class; first: (name, model, record) of the backbone that chooses, but
    for random
    -> [LongTensor [count]]"""
    if method == "random":
        return [pool[torch.randperm(len(pool), generator=generator("random", seed, label))[:count]]
                for label, pool in enumerate(members)]
    name, model, record = first
    if method == "forgetting":
        if "forgetting" not in record:
            fail(f"--backbones {name}: squeeze.py counts what a backbone forgets, but not of pretrained and "
                 f"weak ones, nor with "
                 "--objective moco; name another first")
        events, learned = record["forgetting"]["events"], record["forgetting"]["learned"]
        return [pool[most_forgotten(events[pool], learned[pool], count)] for pool in members]
    if not any(isinstance(layer, nn.Linear) for layer in model.modules()):
        fail(f"--backbones {name}: {method} takes the input of a linear layer as features, and it has none; "
             f"name another first")
    known, choose = features(model, split, data, device), {"herding": herding, "kcenter": k_center}[method]
    return [pool[choose(known[pool], count)] for pool in members]


@torch.no_grad()
def real_starts(init, count, members, split, *, first, data, seed, device, looked_at=300, tiles=1):
    """--init real, herding, kcenter: `count` training images of each class, random or chosen. crops (RDED,
    arXiv:2312.03526): of `looked_at` random ones (more where more are needed) the crop of least loss of five
    random square ones each, of these those of least loss. tiles: images in each, see `mosaic`.
    -> {(class, index): [3, S, S]}"""
    starts = {}
    selected = init in ("herding", "kcenter") and select(
        init, count * tiles, members, split, first=first, data=data, seed=seed, device=device)
    for label, pool in enumerate(members):
        rng = generator("init", seed, label)
        several = max(looked_at, count * tiles) if init == "crops" else count * tiles
        random = pool[torch.randperm(len(pool), generator=rng)[:several]]
        images = normalize(split.read(selected[label] if selected else random).to(device), data["mean"],
                           data["std"])
        if init == "crops":
            images = best_crops(first[1], images, label, count * tiles, rng)
        starts |= {(label, index): image for index,
                   image in enumerate(mosaic(images, round(tiles ** 0.5)).cpu())}
    return starts


def best_crops(model, images, label, count, rng, crops=5):
    """Of each image [n, 3, S, S] of a class the random square crop of least loss, and of these the `count` of
    least loss.
    -> [count, 3, S, S]"""
    boxes = draw_resized_crop(len(images) * crops, images.shape[-1], rng, ratio=(1.0, 1.0))
    boxes = boxes.view(len(images), crops, 4).to(images.device)
    losses = torch.stack([torch.cat([F.cross_entropy(model(views), labels, reduction="none") for views,
                                     labels in (
        (apply_resized_crop(part, box), torch.full((len(part),), label, device=images.device))
        for part, box in zip(images.split(100), boxes[:, i].split(100)))]) for i in range(crops)], dim=1)
    image, crop = lowest_loss_crops(losses, count)
    return apply_resized_crop(images[image], boxes[image, crop])
