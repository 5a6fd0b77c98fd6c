"""Squeeze: train the backbones on the whole data set (phase 1 of 5).   G-VBSM, arXiv:2311.17950, Sec. 2, Tables 7-9.

Plain supervised training, the last epoch is kept; BatchNorm's running mean and variance become the statistics of Eq. 1.
On ImageNet-1k torchvision's pretrained weights take its place (--pretrained).

reads   data/<dataset>/...                                      the training and test images
writes  runs/<dataset>/teachers/<teachers>/<backbone>.pt        weights, classes, test accuracy, arguments
        runs/<dataset>/teachers/<teachers>/squeeze.json         the RESULT line

python squeeze.py --dataset cifar100                                       # paper setting, Table 9
python squeeze.py --dataset cifar10 --epochs 20 --teachers e20             # ablation, Table 11
python squeeze.py --dataset shapes                                         # smoke run: a minute, no download
"""
import argparse
import json
from functools import cache
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from models import build_model, pretrained_weights
from utils import fail
from utils.augment import apply_view, draw_view, normalize
from utils.data import describe, load_split, preset_column
from utils.presets import Parser, crop_name, identity_flags, number, parse_args
from utils.run import (AGAIN, TEACHER, Finite, Progress, Work, accuracy, begin, channels_last, check_classes, check_models,
                       check_same, check_training, dealt, fingerprint, finish, finished_before, generator, is_there,
                       load_torch, one_first, rank, reason, relevant, save_torch, say, script, send, with_precision, world)


def train(model, split, data, args, device, progress, load=lambda: None, keep=lambda state: None):
    """Train the model in place for --epochs epochs of cross-entropy.   keep: takes, after every step, a function that gives
    the state; load: gives a state to go on from, or None."""
    optimizer = torch.optim.SGD(model.parameters(), lr=args.lr, momentum=args.momentum, weight_decay=args.weight_decay,
                                fused=device.type == "cuda")
    units = torch.tensor([data["mean"], data["std"]], device=device)
    schedule = (torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.epochs) if args.schedule == "cosine" else
                torch.optim.lr_scheduler.ConstantLR(optimizer, 1))
    trained, finite, epoch, done = (model, optimizer, schedule), Finite(["loss"], device), 0, 0
    if start := load():
        epoch, done = start["epoch"], start["done"]
        for part, saved in zip(trained, start["trained"]):
            part.load_state_dict(saved)
        progress.skip(epoch * len(split) + min(done * args.batch_size, len(split)))
    network = in_parallel(model, device)

    def state():
        check_training(finite, model, progress.what)
        return {"epoch": epoch, "done": done, "draw": draw.get_state(), "trained": [part.state_dict() for part in trained]}

    for epoch in range(epoch, args.epochs):
        draw = generator("squeeze", args.seed, epoch)
        batches = torch.randperm(len(split), generator=draw).split(args.batch_size)
        if done:
            draw.set_state(start["draw"])
        model.train()
        todo = batches[done:]
        for batch, (images, labels) in zip(todo, split.batches([share(batch) for batch in todo], crop_seed=epoch)):
            images, labels = send(images, device), send(labels, device)
            if not split.streamed:
                view = draw_view(len(batch), data["image_size"], args.crop, True, 0, draw)
                view = {key: share(rows) for key, rows in view.items()}
                images = apply_view(images.float(), send(view, device))
            loss = F.cross_entropy(network(normalize(images, *units)), labels) * share_weight(len(images), len(batch))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            done += 1
            finite.see(epoch * len(batches) + done, loss.detach())
            keep(state)
            progress.step(lambda: f"epoch {epoch + 1}  loss {loss.item():.3f}", len(batch))
        schedule.step()
        done = 0
        check_training(finite, model, progress.what)


class JointSum(torch.autograd.Function):
    """Of a tensor over all processes; its gradient comes from all of them too."""

    @staticmethod
    def forward(ctx, x):
        total = x.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx, gradient):
        return JointSum.apply(gradient.contiguous())


class JointBatchNorm2d(nn.BatchNorm2d):
    """BatchNorm2d over the batches of all processes together; what nn.SyncBatchNorm is on GPUs, on CPUs too."""

    def forward(self, x):
        if not self.training:
            return super().forward(x)
        precise = x.to(self.running_mean.dtype)                      # of what autocast narrowed
        mine = precise.new_tensor(x.numel() // x.shape[1])
        count = JointSum.apply(mine)
        mean = JointSum.apply(precise.mean((0, 2, 3)) * mine / count)
        centred = precise - mean[:, None, None]
        var = JointSum.apply(centred.square().mean((0, 2, 3)) * mine / count)
        with torch.no_grad():
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(var * count / (count - 1), self.momentum)
        return (centred * (torch.rsqrt(var + self.eps) * self.weight)[:, None, None] + self.bias[:, None, None]).to(x.dtype)


def in_parallel(model, device):
    """The model to be trained by all processes of torchrun together as one would alone, each on its `share` of a batch."""
    if world() == 1:
        return model
    group = nccl() if device.type == "cuda" else None
    if group:
        nn.SyncBatchNorm.convert_sync_batchnorm(model, group)
    else:
        for layer in model.modules():
            if isinstance(layer, nn.BatchNorm2d):
                layer.__class__ = JointBatchNorm2d
    return nn.parallel.DistributedDataParallel(model, process_group=group)


@cache
def nccl():
    """The group of all processes for GPUs; never destroyed, for that would wait for a process that has failed."""
    return dist.new_group(backend="nccl")


def share(rows):
    """This process's part of a batch; of a batch too small for all, the whole of it."""
    return dealt(rows) if len(rows) >= world() else rows


def share_weight(mine, whole):
    """By which the mean loss of this process counts, so that the mean over processes is that of the batch."""
    return mine * world() / whole if whole >= world() else 1.0


def load_pretrained(name, model, download):
    """torchvision's IMAGENET1K_V1 weights, from its cache unless a download is allowed."""
    try:
        weights = pretrained_weights(name)
    except ValueError as error:
        fail(f"--pretrained: {error}; name other --backbones or use --no-pretrained")
    cached = Path(torch.hub.get_dir()) / "checkpoints" / Path(weights.url).name
    remedy = "put torchvision's file there, or remove it and pass --download"
    if not cached.exists() and download:
        weights.get_state_dict(progress=False, check_hash=True, weights_only=True)
    try:
        model.load_state_dict(load_torch(cached, remedy))
    except RuntimeError as error:
        fail(f"{cached} does not hold weights of {name} ({reason(error)}); {remedy}")


def get_parser():
    parser = identity_flags(Parser(__doc__))
    method = parser.add_argument_group("method")
    method.add_argument("--pretrained", action=argparse.BooleanOptionalAction, default=False,
                        help="torchvision's ImageNet weights instead of training")
    method.add_argument("--crop", type=crop_name, default="pad4",
                        help="augmentation beside flips: none, resized, pad<pixels>")
    method.add_argument("--download", action="store_true",
                        help="fetch a named data set or pretrained weights when missing")
    optimization = parser.add_argument_group("optimization")
    optimization.add_argument("--epochs", type=number(int, 1), default=50, help="passes over the training images")
    optimization.add_argument("--batch-size", type=number(int, 1), default=64, help="images per step")
    optimization.add_argument("--lr", type=number(float, 0), default=0.05, help="SGD learning rate")
    optimization.add_argument("--momentum", type=number(float, 0, 1), default=0.9, help="SGD momentum, 0 = off")
    optimization.add_argument("--weight-decay", type=number(float, 0), default=0.0, help="SGD weight decay, 0 = off")
    optimization.add_argument("--schedule", choices=["constant", "cosine"], default="constant",
                              help="of the learning rate")
    return parser


def main(argv=None):
    args = parse_args(get_parser(), "squeeze", argv, preset_column)
    device, paths = begin(args)
    check_models("--backbones", args.backbones, build_model)
    accuracies, todo, seconds = {}, [], 0
    for name in args.backbones:
        path = paths.teachers / f"{name}.pt"
        if is_there(path, args):
            record = load_torch(path, AGAIN, TEACHER)
            check_same(record["args"], settings(args), path)
            accuracies[name] = record["top1"]
        else:
            todo.append(name)
    result = paths.teachers / "squeeze.json"
    if not todo and finished_before(result, settings(args) | {"backbones": args.backbones}, top1=accuracies):
        return None
    if todo:
        with one_first():
            splits = {split: load_split(args.dataset, args.data_dir, split, args.image_size, args.workers,
                                        args.download).to(device) for split in ("train", "test")}
        data = describe(args.dataset, args.data_dir, args.image_size, args.workers)
        check_classes(splits["test"].classes, data["classes"], "the test split", "the training split")
        splits["train"].check_crop(args.crop)
        check_models("--backbones", todo, build_model, len(data["classes"]), data["image_size"])
    for name in todo:
        torch.manual_seed(generator("weights", args.seed, name).initial_seed())
        model = build_model(name, len(data["classes"]), data["image_size"]).to(device)
        model = with_precision(channels_last(model), device, args.precision)
        if args.pretrained:
            with one_first():
                load_pretrained(name, model, args.download)
        seen = {"data": fingerprint(json.dumps([data, len(splits["train"])]))}
        with Work(paths.teachers / f"{name}.pt", args, seen, settings(args) | {"backbone": name}) as work:
            if not args.pretrained:
                train(model, splits["train"], data, args, device,
                      Progress(f"squeeze {name}", args.epochs * len(splits["train"])), work.load,
                      work.keep if rank() == 0 else lambda state: None)                  # the state is everybody's
            units, test = torch.tensor([data["mean"], data["std"]], device=device), splits["test"]
            accuracies[name] = accuracy(model, ((normalize(send(x, device), *units), y) for x, y in test.batches(
                dealt(torch.arange(len(test)).split(500)))), jointly=True)
            say(f"{name}: {accuracies[name]:.2f} % of the test images")
            if rank() == 0:
                save_torch(paths.teachers / f"{name}.pt",
                           {"backbone": name, "weights": {key: value.cpu() for key, value in model.state_dict().items()},
                            "data": data, "top1": accuracies[name], "tested": len(test), "args": relevant(args)})
            seconds += work.seconds()
    return finish(result, "squeeze", args, {"top1": accuracies}, seconds)


def settings(args):
    """The arguments that decide a backbone's weights."""
    names = ["dataset", "image_size", "seed", "precision", "pretrained"]
    if not args.pretrained:
        names += ["crop", "epochs", "batch_size", "lr", "momentum", "weight_decay", "schedule"]
    return {name: relevant(args)[name] for name in names}


if __name__ == "__main__":
    script(main)
