"""Collect statistics: the data set's moments at every convolution (phase 2 of 5).   G-VBSM, arXiv:2311.17950, Eq. 9.

One pass over the training images, with the training augmentation and without gradients, through each backbone in eval
mode. At the input of every Conv2d: mean and biased variance of each channel, and of each cell of a grid of patches. The
value for the data set is the average over batches, weighted by their size: the mean of the batches' variances, which is
smaller than the variance over the data set by the variance between batches. So Eq. 9 has it, and so has Eq. 10.

reads   data/<dataset>/...                                           the training images
        runs/<dataset>/teachers/<teachers>/<backbone>.pt             squeeze.py
writes  runs/<dataset>/teachers/<teachers>/<backbone>.stats.pt       four vectors a convolution, the weights' fingerprint
        runs/<dataset>/teachers/<teachers>/collect_stats.json        the RESULT line

python collect_stats.py --dataset cifar100                             # paper setting: patches of 4x4 pixels
python collect_stats.py --dataset cifar100 --teachers e20              # of other weights
python collect_stats.py --dataset shapes                               # smoke run: seconds, no download
"""
import time

import torch
from torch import nn

from models import build_model
from utils import fail
from utils.augment import apply_view, draw_view, normalize
from utils.data import load_split, preset_column
from utils.presets import Parser, crop_name, identity_flags, number, parse_args
from utils.run import (Progress, channels_last, check_classes, check_same, finish, generator, load_json, load_teachers,
                       load_torch, pick_device, relevant, repeat, run_paths, save_torch, send)
from utils.stats import conv_stats, layer_inputs, matched_layers


@torch.inference_mode()
def dataset_statistics(model, batches, patch):
    """Eq. 9.   batches: an iterable of images [B, C, H, W].
    -> {convolution: [channel_mean, channel_var, patch_mean, patch_var]}, float32"""
    convolutions = [name for name, layer in matched_layers(model).items() if isinstance(layer, nn.Conv2d)]
    sums, seen = {}, 0
    for images in batches:
        with layer_inputs(model, convolutions) as inputs:
            model(images)
        shared = {id(x): conv_stats(x.float(), patch) for x in {id(x): x for x in inputs.values()}.values()}
        for name, x in inputs.items():
            batch = [vector[0].double() * len(images) for vector in shared[id(x)]]
            sums[name] = [total + part for total, part in zip(sums[name], batch)] if name in sums else batch
        seen += len(images)
    return {name: [(total / seen).float().cpu() for total in vectors] for name, vectors in sums.items()}


def training_views(split, data, args, device, progress):
    """The training images once, augmented and normalised, in batches."""
    draw, units = generator("collect_stats", args.seed), torch.tensor([data["mean"], data["std"]], device=device)
    order = torch.randperm(len(split), generator=draw)       # batches of mixed classes: their variances are averaged
    for images, _ in split.batches(args.batch_size, order, crop_seed=args.seed):
        images = send(images, device)
        if not split.streamed:
            view = draw_view(len(images), data["image_size"], args.crop, True, 0, draw)
            images = apply_view(images.float(), send(view, device))
        yield normalize(images, *units)
        progress.step(count=len(images))


def get_parser():
    parser = identity_flags(Parser(__doc__))
    method = parser.add_argument_group("method")
    method.add_argument("--patch", type=number(int, 1),
                        help="pixels a side of a patch, 4 up to images of 64 pixels, 16 above [N^p]")
    method.add_argument("--crop", type=crop_name, default="pad4",
                        help="augmentation beside flips: none, resized, pad<pixels>")
    method.add_argument("--batch-size", type=number(int, 2), default=64, help="images of one term of Eq. 9")
    return parser


def main(argv=None):
    args, started = parse_args(get_parser(), "collect_stats", argv, preset_column), time.time()
    device, paths = pick_device(args.device, args.precision), run_paths(args)
    models, records, data = load_teachers(args, paths.teachers, build_model, device)
    args.patch = args.patch or data["patch"]
    result, split, remedy = paths.teachers / "collect_stats.json", None, "start again with --overwrite"
    for name, model in models.items():
        path = paths.teachers / f"{name}.stats.pt"
        if path.exists() and not args.overwrite:
            stored = load_torch(path, remedy, ("checkpoint", "args"))
            if stored["checkpoint"] != records[name]["fingerprint"]:
                fail(f"{path} belongs to other weights than {name}.pt; collect again with --overwrite")
            check_same({key: stored["args"][key] for key in ("patch", "crop", "batch_size", "seed")}, args, path)
            continue
        if split is None:
            split = load_split(args.dataset, args.data_dir, "train", data["image_size"], args.workers).to(device)
            check_classes(split.classes, data["classes"], f"--dataset {args.dataset}", f"the teachers in {paths.teachers}")
            if split.streamed and args.crop != "resized":
                fail(f"--crop {args.crop} is for images of at most 64 pixels; use --crop resized")
        views = training_views(split, data, args, device, Progress(f"collect_stats {name}", len(split)))
        save_torch(path, {"statistics": dataset_statistics(channels_last(model), views, args.patch), "patch": args.patch,
                          "checkpoint": records[name]["fingerprint"], "classes": data["classes"], "args": relevant(args)})
    if split is None and result.exists() and load_json(result, remedy)["args"]["backbones"] == args.backbones:
        return repeat(result)
    upstream = {"squeeze": {name: record["args"] for name, record in records.items()}}
    return finish(result, "collect_stats", args,
                  {"convolutions": {name: len([m for m in model.modules() if isinstance(m, nn.Conv2d)])
                                    for name, model in models.items()}}, started, upstream)


if __name__ == "__main__":
    main()
