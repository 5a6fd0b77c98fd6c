"""Collect statistics: the data set's moments at every convolution (phase 2 of 5).
G-VBSM, arXiv:2311.17950, Eq. 9.

One pass over the training images, augmented as squeeze.py does by default (the paper does not say), through
each backbone in eval mode. At the input of every Conv2d: mean and biased variance of each channel and of each
patch of the map. Eq. 9 averages them over batches (here by their size: a last one may be smaller). A variance
is thus the mean of the batches' variances (Eq. 10 compares it with that of a batch), smaller than that of the
data set by the variance of the batches' means. --class-statistics adds the moments of each class alone, there
and at the input of every BatchNorm2d (after Teddy's Eq. 11).

reads   data/<dataset>/...                                           the training images
        runs/<dataset>/teachers/<teachers>/<backbone>.pt             squeeze.py
writes  runs/<dataset>/teachers/<teachers>/<backbone>.stats.pt       four vectors of each convolution
        runs/<dataset>/teachers/<teachers>/collect_stats.json        arguments, costs

python collect_stats.py --dataset cifar100                             # paper setting: patches of 4x4 pixels
python collect_stats.py --dataset cifar100 --teachers e20              # of other weights
python collect_stats.py --dataset shapes                               # smoke run: seconds, no download
"""
import argparse
import math
from collections.abc import Iterable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from utils import fail
from utils.augment import apply_view, draw_view, normalize
from utils.checkpoint import Checkpoint, load_finished, save_torch
from utils.cli import identity_flags, parse_args
from utils.closed_form import conv_stats
from utils.data import Split
from utils.device import peak_memory
from utils.parser import Parser, crop_name, number
from utils.processes import barrier, rank, shard, world_size
from utils.provenance import data_hash, fingerprints, relevant
from utils.run import Progress, Run, begin, generator, script, send
from utils.stats import layer_inputs, matched_layers, require_eval, whole_patches
from utils.teachers import check_statistics, load_teachers, training_split
from utils.train import channels_last

EMPTY = {"sums": {}, "class_sums": {}, "seen": 0, "batches": 0}      # `sum_statistics` before the first batch


@torch.inference_mode()
def sum_statistics(model: nn.Module, batches: Iterable[tuple], patch: int, classes: int = 0,
                   state: dict = EMPTY) -> Iterator[dict]:
    """The sums of Eq. 9 over batches of images [B, C, H, W] and labels [B]; with `classes` also by class.
    state: one to continue from
    -> yields after every batch {"sums": {convolution: [channel_mean, channel_var, patch_mean, patch_var]},
    "class_sums": {layer: images [classes], moments [classes, n] of `image_moments`}, "seen": images,
    "batches"}; float64 sums of float32 moments"""
    require_eval(model)
    layers = matched_layers(model)
    convolutions = [name for name, layer in layers.items() if isinstance(layer, nn.Conv2d)]
    for images, labels in batches:
        with layer_inputs(model, layers if classes else convolutions) as inputs:
            model(images)
        sums, class_sums = {}, {}
        for name in convolutions:
            vectors = conv_stats(inputs[name].float(), patch)
            sums[name] = [vector[0].double() * len(images) for vector in vectors]
        if classes:
            members = F.one_hot(send(labels, images.device), classes).double()
            for name, x in inputs.items():
                moments = image_moments(x, patch if name in convolutions else 0)
                class_sums[name] = [members.sum(0), *(members.T @ moment.double() for moment in moments)]
        state = {"sums": add_up(state["sums"], sums), "class_sums": add_up(state["class_sums"], class_sums),
                 "seen": state["seen"] + len(images), "batches": state["batches"] + 1}
        yield state


def add_up(*parts: dict[str, list[Tensor]]) -> dict[str, list[Tensor]]:
    """The sums of parts of the data set together, layer by layer; {} of no images."""
    parts = [part for part in parts if part] or [{}]
    return {name: [sum(vectors) for vectors in zip(*(part[name] for part in parts))] for name in parts[0]}


def image_moments(x: Tensor, patch: int = 0) -> list[Tensor]:
    """Mean and mean square of each image of x [B, C, H, W]: of its channels over (H, W), [B, C], and with
    `patch` of its patches over (C, h, w), [B, patches].   -> list: mean, mean square, of patches the same"""
    x = x.float()
    moments = [x.mean((2, 3)), x.square().mean((2, 3))]
    if patch:
        whole = whole_patches(x, patch)
        moments += [F.avg_pool2d(power.mean(1), patch).flatten(1) for power in (whole, whole.square())]
    return moments


def dataset_statistics(states: list[dict]) -> dict[str, list[Tensor]]:
    """Eq. 9, of states of `sum_statistics`, each over a part of the data set.
    -> {convolution: [channel_mean, channel_var, patch_mean, patch_var]}, float32"""
    seen = sum(state["seen"] for state in states)
    return {name: [(total / seen).float() for total in totals]
            for name, totals in add_up(*(state["sums"] for state in states)).items()}


def class_statistics(states: list[dict]) -> dict[str, list[Tensor]]:
    """Mean and biased variance of each class from the same states, in float64: over all of its images, where
    Eq. 9 averages the variances of batches.
    -> {layer: [channel_mean, channel_var], of a convolution also patch_mean, patch_var, each [classes, n]}"""
    found = {}
    for name, (seen, *totals) in add_up(*(state["class_sums"] for state in states)).items():
        moments = [total / seen[:, None] for total in totals]
        found[name] = [value for mean, square in zip(moments[::2], moments[1::2])
                       for value in (mean, square - mean.square())]
    return found


def training_views(split: Split, kept: Tensor, mean_std: Tensor, *, crop: str, seed: int, batch_size: int,
                   done: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
    """The training images `kept` once, augmented and normalised, and their labels, in batches: this
    process's, without the first `done`.   mean_std [2, 3] on the device"""
    rng = generator("collect_stats", seed)
    # shuffled: a batch of one class has too small a variance, and Eq. 9 averages those of batches
    batches = kept[torch.randperm(len(kept), generator=rng)].split(batch_size)
    views = [{} if split.streamed else draw_view(len(batch), split.image_size, crop, True, 0, rng)
             for batch in batches]
    todo = shard(range(len(batches)))[done:]
    for i, (images, labels) in zip(todo, split.batches([batches[i] for i in todo], crop_seed=seed)):
        images = send(images, mean_std.device).float()
        yield normalize(apply_view(images, send(views[i], mean_std.device)), *mean_std), labels


def get_parser():    # its defaults hold where utils/presets.py has none
    parser = identity_flags(Parser(__doc__))
    add = parser.add_argument_group("method").add_argument
    add("--patch", type=number(int, 1),
        help="pixels a side of a patch, 4 up to images of 64 pixels, 16 above [N^p]")
    add("--crop", type=crop_name, default="pad4", help="none, resized, pad<pixels>; flips come with it")
    add("--batch-size", type=number(int, 2), default=64, help="images of one term of Eq. 9")
    add("--class-statistics", action=argparse.BooleanOptionalAction, default=False,
        help="also those of each class alone, for recover.py --class-statistics")
    return parser


def main(argv=None):
    args = parse_args(get_parser(), "collect_stats", argv)
    device, paths = begin(args)
    models, records, data = load_teachers(args, paths.teachers, device)
    args.patch = args.patch or data["patch"]
    if args.patch > data["image_size"]:
        fail(f"--patch {args.patch} is larger than the images, {data['image_size']} pixels a side; use at "
             "most that")
    settings = {key: relevant(args)[key] for key in ("patch", "crop", "batch_size", "seed", "precision")}
    run = Run("collect_stats", args, paths.teachers / "collect_stats.json", fingerprints(records))
    todo, made, piece = [], {}, f"{rank()} of {world_size()}"
    for name in models:
        path = paths.teachers / f"{name}.stats.pt"
        if stored := load_finished(path, args, settings=settings, keys=["checkpoint"]):
            check_statistics(stored, path, records[name], args.class_statistics)
        else:
            todo.append(name)
    if not todo and run.unchanged(settings | {"backbones": args.backbones}, made_from=run.inputs):
        return None
    run.costs()                          # where it is damaged, stop before the work
    if todo:
        split = training_split(args, paths.teachers, data, records).to(device)
        split.check_crop(args.crop)
        mean_std = torch.tensor([data["mean"], data["std"]], device=device)
    classes = len(data["classes"]) if args.class_statistics else 0
    for name in todo:
        path, kept = paths.teachers / f"{name}.stats.pt", records[name].get("kept", torch.arange(len(split)))
        inputs = fingerprints({name: records[name]}) | data_hash(data, len(split))
        with Checkpoint(path, args, inputs, settings | {"class_statistics": classes > 0}) as checkpoint:
            state = send(checkpoint.read(piece), device) or EMPTY
            progress = Progress(f"collect_stats {name}", math.ceil(len(kept) / world_size()), "images")
            progress.skip(state["seen"])
            views = training_views(split, kept, mean_std, crop=args.crop, seed=args.seed,
                                   batch_size=args.batch_size, done=state["batches"])
            for state in sum_statistics(channels_last(models[name]), views, args.patch, classes, state):
                progress.step(count=state["seen"] - progress.done)
                checkpoint.save_if_due(lambda: state, piece)
            checkpoint.save(state, piece)
            barrier()
            if rank() == 0:
                states = [checkpoint.read(f"{other} of {world_size()}") for other in range(world_size())]
                statistics = dataset_statistics(states)
                more = {"class_statistics": class_statistics(states)} if classes else {}
                for vectors in [*statistics.values(), *more.get("class_statistics", {}).values()]:
                    if not all(vector.isfinite().all() for vector in vectors):
                        fail(f"{path} would hold statistics that are not finite; train the backbone again")
                save_torch(path, more | {
                    "statistics": statistics, "patch": args.patch, "classes": data["classes"],
                    "checkpoint": records[name]["fingerprint"], "args": relevant(args)})
            made[name] = {"seconds": round(checkpoint.seconds(), 1), "peak_memory": peak_memory()}
    convolutions = {name: sum(isinstance(module, nn.Conv2d) for module in model.modules())
                    for name, model in models.items()}
    spent = run.costs() | made
    return run.finish({"convolutions": convolutions, "costs": spent}, f"statistics of {' '.join(models)}",
                      {"squeeze": {name: record["args"] for name, record in records.items()}},
                      sum(spent[name]["seconds"] for name in args.backbones if name in spent))


if __name__ == "__main__":
    script(main)
