"""Collect statistics: the data set's moments at every convolution (phase 2 of 5).
G-VBSM, arXiv:2311.17950, Eq. 9.

One pass over the training images, augmented as for squeeze.py (the paper does not say) and without gradients,
through each backbone in eval mode. At the input of every Conv2d: mean and biased variance of each channel
and of each patch of the map. Eq. 9 averages them over batches (here by their size: a last one may be
smaller). A variance is thus the mean of the batches' variances (Eq. 10 compares it with that of a batch),
smaller than that of the data set by the variance of the batches' means. --class-statistics adds the moments
of each class alone, there and at the input of every BatchNorm2d (after Teddy's Eq. 11).

reads   data/<dataset>/...                                           the training images
        runs/<dataset>/teachers/<teachers>/<backbone>.pt             squeeze.py
writes  runs/<dataset>/teachers/<teachers>/<backbone>.stats.pt       four vectors of each convolution
        runs/<dataset>/teachers/<teachers>/collect_stats.json        arguments, costs

python collect_stats.py --dataset cifar100                             # paper setting: patches of 4x4 pixels
python collect_stats.py --dataset cifar100 --teachers e20              # of other weights
python collect_stats.py --dataset shapes                               # smoke run: seconds, no download
"""
import argparse
import json
import math
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from utils import fail
from utils.augment import apply_view, draw_view, normalize
from utils.checkpoint import Checkpoint, load_finished, save_torch
from utils.cli import identity_flags, parse_args
from utils.closed_form import conv_stats
from utils.data import Split
from utils.parser import Parser, crop_name, number
from utils.processes import barrier, rank, shard, world_size
from utils.provenance import fingerprint, fingerprints, relevant
from utils.run import Progress, Run, begin, generator, peak_memory, script, send
from utils.stats import layer_inputs, matched_layers, require_eval, whole_patches
from utils.teachers import costs, load_teachers, training_split
from utils.train import channels_last


@torch.inference_mode()
def sum_statistics(model: nn.Module, batches: Iterable[tuple], patch: int, classes: int = 0,
                   state: dict | None = None) -> Iterator[dict]:
    """The sums of Eq. 9 over batches of images [B, C, H, W] and labels [B]; with `classes` also by class.
    state: one to continue from, by default `new_sums`
    -> yields after every batch {"sums": {convolution: [channel_mean, channel_var, patch_mean, patch_var]},
    "seen": images, "batches", "class_sums": {layer: moments [classes, n] of `image_moments`}, "class_seen":
    [classes]}; sums in float64"""
    require_eval(model)
    layers = matched_layers(model)
    convolutions = [name for name, layer in layers.items() if isinstance(layer, nn.Conv2d)]
    state = state or new_sums(classes)
    for images, labels in batches:
        with layer_inputs(model, layers if classes else convolutions) as inputs:
            model(images)
        sums, measured = {}, {}
        for name in convolutions:
            x = inputs[name]
            if id(x) not in measured:                                # layers may share an input
                vectors = conv_stats(x.float(), patch)
                measured[id(x)] = [vector[0].double() * len(images) for vector in vectors]
            sums[name] = measured[id(x)]
        state = state | {"sums": add_up(state["sums"], sums), "seen": state["seen"] + len(images),
                         "batches": state["batches"] + 1}
        if classes:
            members = F.one_hot(send(labels, images.device), classes).double()
            moments = {name: image_moments(x, patch if name in convolutions else 0)
                       for name, x in inputs.items()}
            sums = {name: [members.T @ moment.double() for moment in each] for name, each in moments.items()}
            state["class_sums"] = add_up(state["class_sums"], sums)
            state["class_seen"] = state["class_seen"].to(members) + members.sum(0)
        yield state


def new_sums(classes: int = 0) -> dict:
    """The state of `sum_statistics` before the first batch."""
    return {"sums": {}, "seen": 0, "batches": 0, "class_sums": {}, "class_seen": torch.zeros(classes)}


def image_moments(x: Tensor, patch: int = 0) -> list[Tensor]:
    """Mean and mean square of each image of x [B, C, H, W]: of its channels over (H, W), [B, C], and with
    `patch` of its patches over (C, h, w), [B, patches].   -> list: mean, mean square, of patches the same"""
    x = x.float()
    moments = [x.mean((2, 3)), x.square().mean((2, 3))]
    if patch:
        whole = whole_patches(x, patch)
        moments += [F.avg_pool2d(power.mean(1), patch).flatten(1) for power in (whole, whole.square())]
    return moments


def add_up(*sums: dict[str, list[Tensor]]) -> dict[str, list[Tensor]]:
    """The total of sums, layer by layer; an empty dict counts as 0."""
    first, *others = [part for part in sums if part] or [{}]
    return {name: [sum(vectors) for vectors in zip(first[name], *(part[name] for part in others))]
            for name in first}


def dataset_statistics(states: list[dict]) -> dict[str, list[Tensor]]:
    """Eq. 9, of states of `sum_statistics`, each over a part of the data set.
    -> {convolution: [channel_mean, channel_var, patch_mean, patch_var]}, float32"""
    seen = sum(state["seen"] for state in states)
    return {name: [(total / seen).float().cpu() for total in vectors]
            for name, vectors in add_up(*(state["sums"] for state in states)).items()}


def class_statistics(states: list[dict]) -> dict[str, list[Tensor]]:
    """Mean and biased variance of each class from the same states, in float64: unlike Eq. 9's over all images
    at once.
    -> {layer: [channel_mean, channel_var], of a convolution also patch_mean, patch_var, each [classes, n]}"""
    seen = sum(state["class_seen"] for state in states)[:, None]
    moments = {name: [total.cpu() / seen for total in vectors]
               for name, vectors in add_up(*(state["class_sums"] for state in states)).items()}
    return {name: [value for mean, square in zip(pairs[::2], pairs[1::2])
                   for value in (mean, square - mean.square())] for name, pairs in moments.items()}


def training_views(split: Split, kept: Tensor, data: dict, *, crop: str, seed: int, batch_size: int,
                   device: torch.device, done: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
    """The training images `kept` once, augmented and normalised, and their labels, in batches: this
    process's, without the first `done`.   data: mean, std and image_size of `describe`"""
    rng, mean_std = generator("collect_stats", seed), torch.tensor([data["mean"], data["std"]], device=device)
    # shuffled: a batch of one class has too small a variance, and Eq. 9 averages those of batches
    order = kept[torch.randperm(len(kept), generator=rng)]
    batches = order.split(batch_size)
    views = [draw_view(len(batch), data["image_size"], crop, True, 0, rng)
             for batch in batches if not split.streamed]
    todo = shard(range(len(batches)))[done:]
    for i, (images, labels) in zip(todo, split.batches([batches[i] for i in todo], crop_seed=seed)):
        images = send(images, device)
        if not split.streamed:
            images = apply_view(images.float(), send(views[i], device))
        yield normalize(images, *mean_std), labels


def stored_backbones(args: argparse.Namespace, folder: Path, records: dict[str, dict],
                     settings: dict) -> list[str]:
    """The backbones whose statistics exist, are of these weights and settings, and complete."""
    found = []
    for name, record in records.items():
        path = folder / f"{name}.stats.pt"
        if stored := load_finished(path, args, settings=settings, keys=["checkpoint"]):
            if stored["checkpoint"] != record["fingerprint"]:
                fail(f"{path} belongs to other weights than {name}.pt; collect again with --overwrite")
            if args.class_statistics and "class_statistics" not in stored:
                fail(f"{path} holds no statistics of single classes; collect again with --overwrite")
            found.append(name)
    return found


def get_parser():    # its defaults hold where utils/presets.py has none
    parser = identity_flags(Parser(__doc__))
    add = parser.add_argument_group("method").add_argument
    add("--patch", type=number(int, 1),
        help="pixels a side of a patch, 4 up to images of 64 pixels, 16 above [N^p]")
    add("--crop", type=crop_name, default="pad4", help="beside flips: none, resized, pad<pixels>")
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
    found = stored_backbones(args, paths.teachers, records, settings)
    todo, made, piece = [name for name in models if name not in found], {}, f"{rank()} of {world_size()}"
    if not todo and run.unchanged(settings | {"backbones": args.backbones}, made_from=run.inputs):
        return None
    if todo:
        split = training_split(args, paths.teachers, data, records).to(device)
        split.check_crop(args.crop)
    classes = len(data["classes"]) if args.class_statistics else 0
    for name in todo:
        path, kept = paths.teachers / f"{name}.stats.pt", records[name].get("kept", torch.arange(len(split)))
        inputs = fingerprints({name: records[name]}) | {"data": fingerprint(json.dumps([data, len(split)]))}
        with Checkpoint(path, args, inputs, settings | {"class_statistics": classes > 0}) as checkpoint:
            state = send(checkpoint.read(piece), device) or new_sums(classes)
            progress = Progress(f"collect_stats {name}", math.ceil(len(kept) / world_size()), "images")
            progress.skip(state["seen"])
            views = training_views(split, kept, data, crop=args.crop, seed=args.seed, device=device,
                                   batch_size=args.batch_size, done=state["batches"])
            for state in sum_statistics(channels_last(models[name]), views, args.patch, classes, state):
                progress.step(count=state["seen"] - progress.done)
                checkpoint.save_if_due(lambda: state, piece)
            checkpoint.save(state, piece)
            barrier()
            if rank() == 0:
                states = [checkpoint.read(f"{other} of {world_size()}") for other in range(world_size())]
                statistics = dataset_statistics(states)
                check_finite(statistics, path)
                more = {"class_statistics": class_statistics(states)} if classes else {}
                save_torch(path, more | {
                    "statistics": statistics, "patch": args.patch, "classes": data["classes"],
                    "checkpoint": records[name]["fingerprint"], "args": relevant(args)})
            made[name] = {"seconds": round(checkpoint.seconds(), 1), "peak_memory": peak_memory()}
    convolutions = {name: sum(isinstance(module, nn.Conv2d) for module in model.modules())
                    for name, model in models.items()}
    spent = costs(run.result) | made
    return run.finish({"convolutions": convolutions, "costs": spent}, f"statistics of {' '.join(models)}",
                      {"squeeze": {name: record["args"] for name, record in records.items()}},
                      sum(spent[name]["seconds"] for name in args.backbones if name in spent))


def check_finite(statistics: dict[str, list[Tensor]], path: Path) -> None:
    for layer, vectors in statistics.items():
        if not all(vector.isfinite().all() for vector in vectors):
            fail(f"{path} would hold statistics of {layer} that are not finite; train the backbone again")


if __name__ == "__main__":
    script(main)
