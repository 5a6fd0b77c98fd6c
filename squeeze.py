"""Squeeze: train the backbones on the whole data set (phase 1 of 5).   G-VBSM, arXiv:2311.17950, Sec. 2, Tables 7-9.

Plain supervised training, the last epoch is kept; BatchNorm's running mean and variance become the statistics of Eq. 1.
On ImageNet-1k torchvision's pretrained weights take its place (--pretrained). --objective moco is SC-DD's squeeze instead
(arXiv:2404.07976, Sec. 2.4): MoCo, which sees no labels, and then a linear probe as the classifier.

reads   data/<dataset>/...                                      the training and test images
writes  runs/<dataset>/teachers/<teachers>/<backbone>.pt        weights, classes, test accuracy, arguments
        runs/<dataset>/teachers/<teachers>/<backbone>@<epoch>.pt, <backbone>@pruned<i>.pt    weak teachers, when asked for
        runs/<dataset>/teachers/<teachers>/scores.pt            losses of the training images, with --prune-ratio
        runs/<dataset>/teachers/<teachers>/squeeze.json         the RESULT line

python squeeze.py --dataset cifar100                                       # paper setting, Table 9
python squeeze.py --dataset cifar10 --epochs 20 --teachers e20             # ablation, Table 11
python squeeze.py --dataset shapes                                         # smoke run: a minute, no download
"""
import argparse
import json
import os
from collections import defaultdict
from functools import cache, partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from models import build_model, pretrained_weights
from models.pruning import prunable, random_channels, shrink, widths
from utils import fail
from utils.augment import apply_colour, apply_view, draw_colour, draw_view, normalize
from utils.checkpoint import Checkpoint, load_finished, load_torch, reason, save_torch
from utils.cli import Parser, crop_name, epoch_range, identity_flags, number, parse_args
from utils.data import describe, load_split, preset_column
from utils.moco import MoCo, Probe, as_encoder, join_norms, knn_top1
from utils.processes import barrier, print_rank0, rank, rank0_first, shard, world_size
from utils.provenance import AGAIN, check_classes, fingerprint, relevant
from utils.run import (Finite, Graphed, Progress, Run, accuracy, begin, channels_last, check_training,
                       generator, peak_memory, script, send, with_precision)
from utils.selection import count_forgetting, drop_largest, last_epoch_weights
from utils.teachers import TEACHER, check_models, costs

MOCO = ["objective", "queue", "key_momentum", "moco_temperature", "probe_epochs", "probe_lr"]
SCORES = ["score_trials", "score_epochs", "score_lr", "score_batch_size"]


def train(model, split, kept, data, args, device, progress, load=lambda: None, keep=lambda state: None,
          after=lambda epoch: None, lr_flag="--lr"):
    """Train the model in place for --epochs epochs of cross-entropy on the images `kept` [N] of the split.   keep: takes,
    after every step, a function that gives the state; load: gives a state to go on from, or None; after: called at the
    end of every epoch with its number, from 1.   -> forgetting events and whether ever learned, of each image of the split"""
    optimizer = torch.optim.SGD(model.parameters(), lr=args.lr, momentum=args.momentum, weight_decay=args.weight_decay,
                                fused=device.type == "cuda")
    units = torch.tensor([data["mean"], data["std"]], device=device)
    schedule = learning_rates(optimizer, args)
    trained, finite, epoch, done = (model, optimizer, schedule), Finite(["loss"], device), 0, 0
    right, before, learned = torch.zeros(3, len(split), dtype=torch.bool, device=device)
    events = torch.zeros(len(split), dtype=torch.int16, device=device)
    if start := load():
        epoch, done = start["epoch"], start["done"]
        for part, saved in zip(trained, start["trained"]):
            part.load_state_dict(saved)
        right, before, learned, events = send(start["forgetting"], device)
        progress.skip(epoch * len(kept) + min(done * args.batch_size, len(kept)))
    network = in_parallel(model, device)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def loss_and_gradients(images, labels, *drawn):
        """-> loss, whether each image is told right, gradients of the parameters; of `batch` and its `view` as drawn"""
        images = apply_view(images.float(), dict(zip(view, drawn)))
        logits = network(normalize(images, *units))
        loss = F.cross_entropy(logits, labels) * share_weight(len(images), len(batch))
        optimizer.zero_grad()
        loss.backward()                                              # autograd.grad would not ask the other processes
        return loss.detach(), logits.argmax(1) == labels, *(parameter.grad for parameter in parameters)

    graphed = defaultdict(partial(Graphed, loss_and_gradients))      # by the size of a batch: the last may be short

    def state():
        check_training(finite, model, progress.what, lr_flag)
        return {"epoch": epoch, "done": done, "draw": draw.get_state(), "trained": [part.state_dict() for part in trained],
                "forgetting": [right, before, learned, events]}

    for epoch in range(epoch, args.epochs):
        draw = generator("squeeze", args.seed, epoch)
        batches = kept[torch.randperm(len(kept), generator=draw)].split(args.batch_size)
        if done:
            draw.set_state(start["draw"])
        model.train()
        todo = batches[done:]
        for batch, (images, labels) in zip(todo, split.batches([share(batch) for batch in todo], crop_seed=epoch)):
            view = {} if split.streamed else draw_view(len(batch), data["image_size"], args.crop, True, 0, draw)
            step = graphed[len(batch)] if args.cuda_graphs else loss_and_gradients
            loss, hits, *gradients = step(*send([images, labels, *map(share, view.values())], device))
            right[send(batch, device)] = gathered(hits, len(batch))
            for parameter, gradient in zip(parameters, gradients):
                parameter.grad = gradient                            # a graph fills it without being told of .grad
            optimizer.step()
            done += 1
            finite.see(epoch * len(batches) + done, loss)
            keep(state)
            progress.step(lambda: f"epoch {epoch + 1}  loss {loss.item():.3f}", len(batch))
        schedule.step()
        done = 0
        check_training(finite, model, progress.what, lr_flag)
        events, learned = count_forgetting(events, learned, before, right)
        before, right = right, torch.zeros_like(right)
        after(epoch + 1)
    return {"events": events.cpu(), "learned": learned.cpu()}


def learning_rates(optimizer, args):
    """The schedule per epoch of --schedule, behind --warmup-epochs that climb from a hundredth."""
    rates, rest = torch.optim.lr_scheduler, args.epochs - args.warmup_epochs
    schedule = (rates.CosineAnnealingLR(optimizer, rest) if args.schedule == "cosine" else
                rates.StepLR(optimizer, args.step_epochs) if args.schedule == "step" else rates.ConstantLR(optimizer, 1))
    if not args.warmup_epochs:
        return schedule
    warmup = rates.LinearLR(optimizer, 0.01, total_iters=args.warmup_epochs)
    return rates.SequentialLR(optimizer, [warmup, schedule], [args.warmup_epochs])


def score_images(split, data, args, device, trials, load, keep):
    """BiLP, supplement Sec. 6.4: the loss of every training image for a small ConvNet, smoothed along the epochs of a
    training; the sum over trainings `trials`.   -> [N]   It does not say: SGD with momentum 0.9, no augmentation, and an
    image's loss is the one it is trained with."""
    units, weights = torch.tensor([data["mean"], data["std"]], device=device), last_epoch_weights(args.score_epochs)
    scores, progress = torch.zeros(len(split), device=device), Progress("squeeze scores", len(trials) * args.score_epochs)
    first = {"trial": 0, "epoch": 0, "done": 0}
    if start := load():
        first, scores = start, send(start["scores"], device)
        progress.skip(first["trial"] * args.score_epochs + first["epoch"])
    for trial in range(first["trial"], len(trials)):
        torch.manual_seed(generator("score", args.seed, trials[trial]).initial_seed())
        model = build_model("convnet_w128", len(split.classes), split.image_size).to(device).train()
        optimizer = torch.optim.SGD(model.parameters(), lr=args.score_lr, momentum=0.9, fused=device.type == "cuda")
        if start:
            model.load_state_dict(start["model"])
            optimizer.load_state_dict(start["optimizer"])
        for epoch in range(first["epoch"], args.score_epochs):
            order = torch.randperm(len(split), generator=generator("score", args.seed, trials[trial], epoch))
            batches, done = order.split(args.score_batch_size), first["done"]
            for batch, (images, labels) in zip(batches[done:], split.batches(batches[done:])):
                logits = model(normalize(send(images, device), *units))
                losses = F.cross_entropy(logits, send(labels, device), reduction="none")
                scores[send(batch, device)] += weights[epoch].item() * losses.detach()
                optimizer.zero_grad()
                losses.mean().backward()
                optimizer.step()
                done += 1
                keep(lambda: {"trial": trial, "epoch": epoch, "done": done, "scores": scores, "model": model.state_dict(),
                              "optimizer": optimizer.state_dict()})
            first["done"] = 0
            progress.step()
        first, start = {"trial": 0, "epoch": 0, "done": 0}, None
    return scores


def kept_images(split, data, args, device, paths, seen, later):
    """Which training images are trained on: of every class all but the --prune-ratio of largest losses.   -> sorted [n]
    later: files that are made from them"""
    if not args.prune_ratio:
        return torch.arange(len(split))
    path, own = paths.teachers / "scores.pt", {key: relevant(args)[key] for key in ("seed", *SCORES)}
    if stored := load_finished(path, args, seen, own, ("scores",)):
        if len(scores := stored["scores"]) != len(split):
            fail(f"{path} holds {len(scores)} losses, of {len(split)} training images; {AGAIN}")
    else:
        with Checkpoint(path, args, seen, own, later) as work:
            piece = f"{rank()} of {world_size()}"
            mine = score_images(split, data, args, device, shard(list(range(args.score_trials))), partial(work.load, piece),
                                partial(work.save_if_due, piece=piece))
            work.save({"scores": mine, "trial": args.score_trials, "epoch": 0, "done": 0}, piece)
            barrier()
            scores = sum(work.read(f"{other} of {world_size()}")["scores"] for other in range(world_size())).cpu() / args.score_trials
            barrier()                                           # before the pieces go
            if not scores.isfinite().all():
                fail(f"{path} would hold losses that are not finite; use a smaller --score-lr, and --overwrite")
            if rank() == 0:
                save_torch(path, {"scores": scores, "args": own, "made_from": seen})
    kept = drop_largest(scores, split.labels.cpu(), args.prune_ratio)
    print_rank0(f"squeeze trains on {len(kept)} of {len(split)} images, those of smaller loss")
    return kept


def train_moco(moco, splits, kept, data, args, device, progress, load, keep):
    """Train the encoders in place for --epochs epochs of whole batches, without labels; these serve the nearest neighbours
    that are told about ten times.   splits: {"train", "test"}; the rest as in `train`"""
    split, units = splits["train"], torch.tensor([data["mean"], data["std"]], device=device)
    optimizer = torch.optim.SGD(moco.query.parameters(), lr=args.lr, momentum=args.momentum, weight_decay=args.weight_decay,
                                fused=device.type == "cuda")
    schedule = learning_rates(optimizer, args)
    schedule.step()                                                  # MoCo counts epochs from 1
    trained, finite, epoch, done = (moco, optimizer, schedule), Finite(["loss"], device), 0, 0
    steps = len(kept) // args.batch_size
    if start := load():
        epoch, done = start["epoch"], start["done"]
        for part, saved in zip(trained, start["trained"]):
            part.load_state_dict(saved)
        progress.skip((epoch * steps + done) * args.batch_size)

    def state():
        check_training(finite, moco, progress.what)
        return {"epoch": epoch, "done": done, "draw": draw.get_state(), "trained": [part.state_dict() for part in trained]}

    def view(images):
        crop = draw_view(len(images), data["image_size"], "resized", True, 0, draw)
        colour = draw_colour(len(images), draw)
        images = apply_view(images.float() / 255, send(crop, device))
        return normalize(255 * apply_colour(images, send(colour, device)), *units)

    for epoch in range(epoch, args.epochs):
        draw = generator("moco", args.seed, epoch)
        batches = kept[torch.randperm(len(kept), generator=draw)].split(args.batch_size)[:steps]
        if done:
            draw.set_state(start["draw"])
        moco.train()
        for images, _ in split.batches(batches[done:]):
            images = send(images, device)
            query, key = view(images), view(images)
            loss = moco(query, key, send(torch.randperm(len(images), generator=draw), device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            done += 1
            finite.see(epoch * steps + done, loss.detach())
            keep(state)
            progress.step(lambda: f"epoch {epoch + 1}  loss {loss.item():.3f}", len(images))
        schedule.step()
        done = 0
        check_training(finite, moco, progress.what)
        if (epoch + 1) % max(1, args.epochs // 10) == 0 or epoch + 1 == args.epochs:
            bank = outputs(moco.query, split, kept, units, device)
            queries = outputs(moco.query, splits["test"], torch.arange(len(splits["test"])), units, device)
            print_rank0(f"{progress.what}  epoch {epoch + 1}: {knn_top1(*bank, *queries, len(data['classes'])):.2f} % of the test "
                "images by their nearest neighbours")


@torch.inference_mode()
def outputs(model, split, index, units, device):
    """What the model in eval mode gives for the images of a split at index [n], never augmented, and their labels."""
    model.eval()
    found = [(model(normalize(send(images, device), *units)), send(labels, device))
             for images, labels in split.batches(index.split(500))]
    return [torch.cat(parts) for parts in zip(*found)]


def train_without_labels(model, key, splits, kept, data, args, device, work):
    """Make the model a classifier whose last layer alone has seen labels (SC-DD), in place: MoCo with `key`, another model
    of its kind, then a linear probe. Either goes on from what `work` has kept."""
    name, count = work.result.stem, len(kept)
    if work.read() is None:                                          # of the probe, which holds the features too
        moco = MoCo(as_encoder(model), as_encoder(key), size=args.queue, momentum=args.key_momentum,
                    temperature=args.moco_temperature).to(device)
        train_moco(moco, splits, kept, data, args, device,
                   Progress(f"moco {name}", args.epochs * (count - count % args.batch_size)),
                   lambda: work.load("moco"), lambda state: work.save_if_due(state, "moco"))
        join_norms(model)
    settings = dict(epochs=args.probe_epochs, lr=args.probe_lr, momentum=0.9, weight_decay=0.0, schedule="cosine",
                    warmup_epochs=0, batch_size=256, crop="resized")
    probe = Probe(model, len(data["classes"]))
    train(probe, splits["train"], kept, data, argparse.Namespace(**vars(args) | settings), device,
          Progress(f"probe {name}", args.probe_epochs * count), work.load, work.save_if_due, lr_flag="--probe-lr")
    return probe.classifier()


def check_moco(args):
    """Stop where MoCo cannot be trained, whatever the data."""
    if args.pretrained:
        fail("--objective moco trains the weights that --pretrained would take from torchvision; add --no-pretrained")
    if saved_epochs(args) or args.pruned:
        fail("--objective moco makes no weak teachers; leave out --save-epochs and --pruned")
    if args.epochs < 2:
        fail(f"--epochs {args.epochs}: MoCo counts its cosine's epochs from 1, so that the last has the rate 0; use at least 2")
    if world_size() > 1:
        fail("--objective moco trains in one process; run it without torchrun")
    if args.batch_size % 8 or args.batch_size < 16:
        fail(f"--batch-size {args.batch_size}: MoCo normalises 8 parts of a batch, each of at least 2 images; "
             "use a multiple of 8 from 16 on")
    for name in args.backbones:
        with torch.device("meta"):
            if not any(isinstance(layer, nn.Linear) for layer in build_model(name, 10, 224).modules()):
                fail(f"--backbones {name}: MoCo's outputs take the place of a linear layer, and it has none; name others")


def check_moco_data(split, kept, args):
    """The same, for these training images."""
    if split.streamed:
        fail(f"--objective moco is for images in memory, which those of {split.image_size} pixels are not; "
             "use a smaller --image-size")
    if len(kept) < args.batch_size:
        fail(f"--batch-size {args.batch_size} is more than the {len(kept)} training images, and MoCo takes whole batches "
             "alone; use a smaller one")


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
    if world_size() == 1:
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
    return shard(rows) if len(rows) >= world_size() else rows


def gathered(mine, count):
    """Bools of this process's `share` of a batch of `count` -> of the whole batch."""
    if world_size() == 1:
        return mine
    whole = torch.zeros(count, dtype=torch.uint8, device=mine.device)
    share(whole).copy_(mine)
    dist.all_reduce(whole, dist.ReduceOp.MAX, nccl() if mine.is_cuda else None)
    return whole.bool()


def share_weight(mine, whole):
    """By which the mean loss of this process counts, so that the mean over processes is that of the batch."""
    return mine * world_size() / whole if whole >= world_size() else 1.0


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
    method.add_argument("--objective", choices=["supervised", "moco"], default="supervised",
                        help="moco trains without labels, and a linear probe with them [SC-DD]")
    moco = parser.add_argument_group("MoCo [SC-DD]")
    moco.add_argument("--queue", type=number(int, 1), default=4096, help="keys that MoCo contrasts with [K]")
    moco.add_argument("--key-momentum", type=number(float, 0, 1), default=0.99,
                      help="of MoCo's key encoder, 0 = a copy of the query encoder [m]")
    moco.add_argument("--moco-temperature", type=number(float, 1e-6), default=0.1, help="of MoCo's softmax")
    moco.add_argument("--probe-epochs", type=number(int, 1), default=100, help="of MoCo's linear probe")
    moco.add_argument("--probe-lr", type=number(float, 0), default=30.0, help="SGD learning rate of the probe, cosine")
    pool = parser.add_argument_group("weak teachers [Teddy]")
    pool.add_argument("--save-epochs", type=epoch_range, default="none", metavar="FIRST:LAST:STEP",
                      help="also keep the weights after these epochs, as <backbone>@<epoch>, or none")
    pool.add_argument("--pruned", type=number(int, 0, 1000), default=0,
                      help="also make so many, <backbone>@pruned<i>: without random channels, fine-tuned a little")
    pool.add_argument("--pruned-share", type=number(float, 0.05, 1), default=0.66, help="of the parameters they keep")
    pool.add_argument("--pruned-epochs", type=number(int, 0), default=2,
                      help="of fine-tuning for the last of them, 0 for the first")
    pool.add_argument("--pruned-lr", type=number(float, 0), default=0.1, help="of fine-tuning, a tenth after every epoch")
    pruning = parser.add_argument_group("pruning of the training images [BiLP]")
    pruning.add_argument("--prune-ratio", type=number(float, 0, 0.999), default=0.0,
                         help="of each class's images, those of largest loss, not trained on [alpha]")
    pruning.add_argument("--score-trials", type=number(int, 1), default=50, help="trainings that an image's loss is averaged over")
    pruning.add_argument("--score-epochs", type=number(int, 1), default=100, help="of each")
    pruning.add_argument("--score-lr", type=number(float, 0), default=3e-3, help="SGD learning rate of each")
    pruning.add_argument("--score-batch-size", type=number(int, 1), default=512, help="images per step of each")
    optimization = parser.add_argument_group("optimization")
    optimization.add_argument("--epochs", type=number(int, 1), default=50, help="passes over the training images")
    optimization.add_argument("--batch-size", type=number(int, 1), default=64, help="images per step")
    optimization.add_argument("--lr", type=number(float, 0), default=0.05, help="SGD learning rate")
    optimization.add_argument("--momentum", type=number(float, 0, 1), default=0.9, help="SGD momentum, 0 = off")
    optimization.add_argument("--weight-decay", type=number(float, 0), default=0.0, help="SGD weight decay, 0 = off")
    optimization.add_argument("--schedule", choices=["constant", "cosine", "step"], default="constant",
                              help="of the learning rate")
    optimization.add_argument("--step-epochs", type=number(int, 1), default=30, help="of step: a tenth after so many epochs")
    optimization.add_argument("--warmup-epochs", type=number(int, 0), default=0, help="of a rising learning rate first, 0 = off")
    optimization.add_argument("--cuda-graphs", action=argparse.BooleanOptionalAction, default=False,
                              help="replay a step of supervised training as one launch; for GPUs that wait for the host")
    return parser


def main(argv=None):
    args = parse_args(get_parser(), "squeeze", argv, preset_column)
    device, paths = begin(args)
    if device.type == "cuda" and (gpus := torch.cuda.device_count()) < int(os.environ.get("LOCAL_WORLD_SIZE", 1)):
        fail(f"--nproc-per-node is more than the {gpus} GPUs of this machine; squeeze.py takes one for each process")
    if args.cuda_graphs and (device.type != "cuda" or world_size() > 1):
        fail("--cuda-graphs needs a GPU (--device cuda) and a single process; leave it out")
    check_backbones(args)
    names, result = [one for name in args.backbones for one in teachers_of(name, args)], paths.teachers / "squeeze.json"
    run = Run("squeeze", args, result)
    accuracies, variances = already_there(names, args, paths)
    todo = [name for name in names if name not in accuracies]
    if not todo and run.unchanged(settings(args) | {"backbones": args.backbones}, top1=accuracies):
        return None
    made = make(todo, args, device, paths, accuracies, variances) if todo else {}
    spent = costs(result) | made                                     # now, for it may be another process's too
    told = ", ".join(f"{name} {accuracies[name]:.1f} %" for name in names)
    return run.finish({"top1": {name: accuracies[name] for name in names},
                       "first_bn_variance": {name: variances[name] for name in names}, "costs": spent},
                      f"{told} of the test images", seconds=sum(spent[name]["seconds"] for name in names if name in spent))


def load_data(args, device):
    """-> {split: images}, what teachers remember of the data (`describe`)"""
    with rank0_first():
        splits = {split: load_split(args.dataset, args.data_dir, split, args.image_size, args.workers,
                                    args.download, args.holdout).to(device) for split in ("train", "test")}
    data = describe(args.dataset, args.data_dir, args.image_size, args.workers)
    check_classes(splits["test"].classes, data["classes"], "the test split", "the training split")
    if args.objective == "supervised":
        splits["train"].check_crop(args.crop)
    check_models("--backbones", args.backbones, build_model, len(data["classes"]), data["image_size"])
    return splits, data


def make(todo, args, device, paths, accuracies, variances):
    """Train teachers, test them and write their checkpoints; what they reach goes to accuracies and variances, {name: value}.
    -> {name: what it took}"""
    splits, data = load_data(args, device)
    seen, files = {"data": fingerprint(json.dumps([data, len(splits["train"])]))}, [paths.teachers / f"{name}.pt" for name in todo]
    kept = kept_images(splits["train"], data, args, device, paths, seen, files)
    if args.objective == "moco":
        check_moco_data(splits["train"], kept, args)

    def new(backbone):
        return build_model(backbone, len(data["classes"]), data["image_size"])

    def place(model):
        return with_precision(channels_last(model.to(device)), device, args.precision)

    def save(name, model, **more):
        """Test a model and write its checkpoint."""
        units, test = torch.tensor([data["mean"], data["std"]], device=device), splits["test"]
        accuracies[name] = accuracy(model, ((normalize(send(x, device), *units), y) for x, y in test.batches(
            shard(torch.arange(len(test)).split(500)))), jointly=True)
        print_rank0(f"{name}: {accuracies[name]:.2f} % of the test images")
        variances[name] = first_bn_variance(name, model.state_dict())
        if rank() == 0:
            save_torch(paths.teachers / f"{name}.pt",
                       {"backbone": name.partition("@")[0], "data": data, "top1": accuracies[name], "tested": len(test),
                        "trained": len(splits["train"]),
                        "weights": {key: value.cpu() for key, value in model.state_dict().items()},
                        "args": relevant(args), **more})

    made = {}
    for i, name in enumerate(todo):
        backbone, _, kind = name.partition("@")
        if kind.isdigit():
            continue                                                 # saved while its backbone was trained
        how, more = args, {"kept": kept} if args.prune_ratio else {}
        torch.manual_seed(generator("weights", args.seed, backbone).initial_seed())
        model = new(backbone)
        if kind:
            how, more["widths"] = post_generation(name, model, args, paths)
        model = place(model)
        if args.pretrained and not kind:
            with rank0_first():
                load_pretrained(name, model, args.download)
        identity = settings(args, name) | {"objective": args.objective, "backbone": name, "save_epochs": args.save_epochs}
        with Checkpoint(files[i], args, seen, identity, files[i + 1:]) as work:
            if args.objective == "moco":
                train_without_labels(model, place(new(backbone)), splits, kept, data, args, device, work)
            elif kind or not args.pretrained:
                forgetting = train(
                    model, splits["train"], kept, data, how, device, Progress(f"squeeze {name}", how.epochs * len(kept)),
                    work.load, work.save_if_due if rank() == 0 else lambda state: None,         # the state is everybody's
                    lambda epoch: save(f"{name}@{epoch}", model, **more) if epoch in saved_epochs(args) and not kind else None,
                    "--pruned-lr" if kind else "--lr")
                more |= {} if kind else {"forgetting": forgetting}
            save(name, model, **more)
            made[name] = {"seconds": round(work.seconds(), 1), "peak_memory": peak_memory()}
    return made


def already_there(names, args, paths):
    """Of the teachers that need not be made.   -> {name: top-1}, {name: `first_bn_variance`}"""
    accuracies, variances = {}, {}
    for name in names:
        path = paths.teachers / f"{name}.pt"
        own = settings(args, name) | {"objective": args.objective}
        if record := load_finished(path, args, settings=own, keys=TEACHER):
            accuracies[name], variances[name] = record["top1"], first_bn_variance(name, record["weights"])
    for name in names:
        backbone, _, kind = name.partition("@")
        if name not in accuracies and kind.isdigit() and backbone in accuracies:
            fail(f"{paths.teachers / name}.pt is missing, and could be saved while {backbone}.pt was trained alone; {AGAIN}, "
                 "or name another --teachers")
    return accuracies, variances


def check_backbones(args):
    """Stop where those that are asked for cannot be made, whatever the data."""
    if weak := [name for name in args.backbones if "@" in name]:
        fail(f"--backbones {weak[0]}: squeeze.py makes it of {weak[0].partition('@')[0]}; name that, and --save-epochs or --pruned")
    check_models("--backbones", args.backbones, build_model)
    if args.objective == "moco":
        check_moco(args)
    if max(saved_epochs(args), default=1) > args.epochs:
        fail(f"--epochs {args.epochs} is too few for --save-epochs {args.save_epochs}; use more")
    if args.warmup_epochs >= args.epochs:
        fail(f"--epochs {args.epochs} is too few for --warmup-epochs {args.warmup_epochs}; use more")
    if args.pretrained and saved_epochs(args):
        fail(f"--save-epochs {args.save_epochs}: pretrained weights have no epochs; use --save-epochs none or --no-pretrained")
    for name in args.backbones if args.pruned else ():
        with torch.device("meta"):
            if not prunable(build_model(name, 10, 224)):
                fail(f"--pruned {args.pruned}: {name} has no channels that can be removed alone; name other --backbones")


def teachers_of(name, args):
    """The names of a backbone and of the weak teachers made with it."""
    return [name, *(f"{name}@{epoch}" for epoch in saved_epochs(args)), *(f"{name}@pruned{i + 1}" for i in range(args.pruned))]


def saved_epochs(args):
    """Those of --save-epochs."""
    first, last, step = map(int, (args.save_epochs if args.save_epochs != "none" else "1:0:1").split(":"))
    return range(first, last + 1, step)


def post_generation(name, model, args, paths):
    """Teddy, supplement Sec. D.1: remove random channels of a trained model, in place.   -> how to fine-tune it, for 0 to
    --pruned-epochs epochs, more from one to the next; channels left, {layer: number}"""
    backbone, _, number = name.partition("@pruned")
    barrier()                                                   # until it is written
    try:
        model.load_state_dict(load_torch(path := paths.teachers / f"{backbone}.pt", AGAIN, TEACHER)["weights"])
    except RuntimeError as error:
        fail(f"{path} does not hold weights of {backbone} ({reason(error)}); {AGAIN}")
    chosen = random_channels(model, args.pruned_share, generator("pruned", args.seed, name))
    shrink(model, chosen)
    epochs = (int(number) - 1) * (args.pruned_epochs + 1) // args.pruned
    tuning = {"epochs": epochs, "lr": args.pruned_lr, "batch_size": 32, "schedule": "step", "step_epochs": 1,
              "warmup_epochs": 0, "weight_decay": 1e-4, "momentum": 0.9}
    return argparse.Namespace(**vars(args) | tuning), widths(model, chosen)


def first_bn_variance(name, weights):
    """Variance over the channels of the first BatchNorm's running means (SC-DD, Table 2: the larger, the more a squeezed
    backbone tells), of a state_dict; None without BatchNorm. It is told."""
    means = next((value for key, value in weights.items() if key.endswith("running_mean")), None)
    variance = None if means is None else means.float().var(correction=0).item()
    if means is not None:
        print_rank0(f"{name}: the running means of its first BatchNorm vary by {variance:.5f} over the channels")
    return variance


def settings(args, name=""):
    """The arguments that decide a backbone's weights."""
    names = ["dataset", "holdout", "image_size", "seed", "precision", "pretrained", "prune_ratio", *SCORES * (args.prune_ratio > 0)]
    if not args.pretrained:
        names += ["epochs", "batch_size", "lr", "momentum", "weight_decay", "schedule", "step_epochs", "warmup_epochs"]
        names += MOCO if args.objective == "moco" else ["crop"]
    if "@pruned" in name:
        names += ["crop", "pruned", "pruned_share", "pruned_epochs", "pruned_lr"]
    return {name: relevant(args)[name] for name in names}


if __name__ == "__main__":
    script(main)
