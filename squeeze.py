"""Squeeze: train the backbones on the whole data set (phase 1 of 5).
G-VBSM, arXiv:2311.17950, Sec. 2, Tables 7-9.

Plain supervised training, the last epoch is kept; BatchNorm's running mean and variance become the statistics
of Eq. 1. torchvision's weights (--pretrained, ImageNet-1k) or any classifier's (--weights FILE) replace it.
--objective moco is SC-DD's squeeze (arXiv:2404.07976, Sec. 2.4): MoCo, which sees no labels, and then a
linear probe as the classifier; --objective probe trains that probe alone, on the encoder of --weights FILE.

reads   data/<dataset>/...                                      the training and test images
writes  runs/<dataset>/teachers/<teachers>/<backbone>.pt        weights, classes, test accuracy, arguments
        .../<backbone>@<epoch>.pt, <backbone>@pruned<i>.pt      weak teachers, when asked for
        .../scores.pt                                           losses of the training images [--prune-ratio]
        .../squeeze.json                                        the RESULT line

python squeeze.py --dataset cifar100                                       # paper setting, Table 9
python squeeze.py --dataset cifar10 --epochs 20 --teachers e20             # ablation, Table 11
python squeeze.py --dataset shapes                                         # smoke run: a minute, no download
"""
import argparse
import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models import build_model
from utils import fail
from utils.adopt import adopt, check_weights, has_large_stem, load_pretrained
from utils.augment import apply_view, draw_view, normalize
from utils.checkpoint import Checkpoint, load_finished, save_torch
from utils.cli import identity_flags, parse_args
from utils.data import Split, describe, load_split
from utils.ddp import gathered, in_parallel, share, share_weight
from utils.device import peak_memory
from utils.moco import Probe, check_moco_data, check_objective, train_moco
from utils.parser import Parser, crop_name, epoch_range, number
from utils.pool import check_pool, fine_tuning, prune_teacher, saved_epochs, teachers_of
from utils.presets import SELECTIONS
from utils.processes import print_rank0, rank, rank0_first, world_size
from utils.provenance import AGAIN, check_data, data_hash, fingerprint, relevant
from utils.run import Run, begin, generator, script, send
from utils.scores import SCORES, kept_rows
from utils.selection import class_indices, count_forgetting
from utils.teachers import TEACHER, check_models, first_bn_variance, warn_of_backbones
from utils.train import (Record, Training, channels_last, fit, make_step, shuffled, split_accuracy,
                         with_precision)

PROBE = ["probe_epochs", "probe_lr", "probe_weight_decay"]


def train(model: nn.Module, split: Split, rows: Tensor, mean_std: Tensor, training: Training,
          checkpoint: Checkpoint) -> Iterator[tuple[int, Record]]:
    """Supervised training in place on the images `rows` [N] of a split, while iterated: cross-entropy on
    random crops and flips; streamed images arrive cropped and flipped.   mean_std [2, 3] on the device
    -> yields after each epoch its number, and the record that training goes on with: of each image of the
    split "events" and "learned" (`count_forgetting`), by which --method forgetting selects"""
    count, device = len(split), mean_std.device
    flags = {key: torch.zeros(count, dtype=torch.bool, device=device)
             for key in ("learned", "correct", "prev_correct")}
    record = Record(device, events=torch.zeros(count, dtype=torch.int16, device=device), **flags)
    optimizer, schedule = training.optimizer(model)
    parallel = in_parallel(model, device)
    batch, view = (), {}                 # train_epoch sets them: a CUDA graph gives loss_of tensors alone

    def loss_of(images, labels, *params):
        """On this process's share of `batch`.   -> loss, whether each image is classified correctly"""
        images = apply_view(images.float(), dict(zip(view, params)))
        logits = parallel(normalize(images, *mean_std))
        loss = F.cross_entropy(logits, labels) * share_weight(len(images), len(batch))
        return loss, logits.argmax(1) == labels

    step = make_step(optimizer, loss_of, training.cuda_graphs)

    def train_epoch(epoch, batches, rng):
        nonlocal batch, view
        shares = split.batches([share(whole) for whole in batches], crop_seed=training.seed * 10 ** 6 + epoch)
        for batch, (images, labels) in zip(batches, shares):
            if not split.streamed:
                view = draw_view(len(batch), split.image_size, training.crop, True, 0, rng)
            loss, correct = step(*send([images, labels, *map(share, view.values())], device))
            record["correct"][send(batch, device)] = gathered(correct, len(batch))
            yield loss

    for epoch in fit((model, optimizer, schedule, record),
                     shuffled(rows, training.batch_size, partial(generator, "squeeze", training.seed)),
                     train_epoch, epochs=training.epochs, name=f"{training.name} {checkpoint.result.stem}",
                     remedy=training.remedy, resume=checkpoint.load(),
                     save=checkpoint.save_if_due if rank() == 0 else None):    # all processes have one state
        before, correct = record["prev_correct"], record["correct"]
        record["events"], record["learned"] = count_forgetting(record["events"], record["learned"], before,
                                                               correct)
        record["prev_correct"], record["correct"] = correct, torch.zeros_like(correct)
        yield epoch, record


def initial_model(name: str, args: argparse.Namespace, data: dict,
                  folder: Path) -> tuple[nn.Module, str, dict]:
    """A network as its training begins, or with weights from elsewhere, or pruned.
    -> model, its name, {convolution: channels left by pruning}"""
    backbone, _, weak = name.partition("@")
    torch.manual_seed(generator("weights", args.seed, backbone).initial_seed())
    what = len(data["classes"]), data["image_size"]
    if args.weights and has_large_stem(build_model(backbone, *what), args.weights_file):
        backbone += "_stem7"
    model = build_model(backbone, *what)
    if args.weights:
        adopt(model, args.weights_file, encoder=args.objective == "probe")
    elif args.pretrained:
        with rank0_first():
            load_pretrained(backbone, model, args.download)
    return model, backbone, prune_teacher(name, model, folder, args.seed) if weak else {}


def settings(args: argparse.Namespace, name: str = "") -> dict:
    """The arguments that decide a backbone's weights."""
    names = ["dataset", "holdout", "imbalance", "image_size", "seed", "precision", "pretrained", "weights",
             "prune_ratio"]
    names += SCORES * (args.prune_ratio > 0) + ["objective"]
    if args.objective == "probe":
        names += PROBE
    elif not (args.pretrained or args.weights):
        names += ["epochs", "batch_size", "lr", "momentum", "weight_decay", "schedule", "warmup_epochs"]
        names += ["queue", *PROBE] if args.objective == "moco" else ["crop"]
    if "@pruned" in name:
        names += ["crop", "pruned"]
    return {key: relevant(args)[key] for key in names}


def save_teacher(path: Path, model: nn.Module, test: Split, mean_std: Tensor, about: dict) -> dict:
    """Test a model and write its checkpoint, with more `about` it.   -> {"top1": %, "first_bn_variance": only
    reported (SC-DD, Table 2)}"""
    top1, _ = split_accuracy(model, test, mean_std, jointly=True)
    print_rank0(f"{path.stem}: {top1:.2f} % of the test images")
    weights = {key: value.cpu() for key, value in model.state_dict().items()}
    variance = first_bn_variance(path.stem, weights)
    about = about | {"top1": top1, "tested": len(test)}
    if "@" not in path.stem:                                         # those with @ are weak on purpose
        warn_of_backbones({path.stem: about}, len(test.classes))
    if rank() == 0:
        save_torch(path, about | {"weights": weights})
    return {"top1": top1, "first_bn_variance": variance}


def load_data(args: argparse.Namespace, device: torch.device) -> tuple[dict[str, Split], dict]:
    """-> {split: images}, what teachers remember of the data (`describe`)"""
    with rank0_first():
        splits = {split: load_split(args.dataset, args.data_dir, split, args.image_size, args.workers,
                                    args.download, args.holdout, args.imbalance).to(device)
                  for split in ("train", "test")}
    data = describe(args.dataset, args.data_dir, args.image_size, args.workers, args.data_set["fingerprint"])
    if args.objective == "supervised" and not args.weights:
        splits["train"].check_crop(args.crop)
    check_models("--backbones", args.backbones, len(data["classes"]), data["image_size"])
    if args.method in SELECTIONS:                                    # stops where a class has too few images
        class_indices(splits["train"], torch.arange(len(splits["train"])), data["classes"], args.ipc)
    if splits["test"].streamed and not args.pretrained:              # a damaged one is told before training
        for _ in splits["test"].batches(500):
            pass
    return splits, data


def make_teachers(todo: list[str], args: argparse.Namespace, device: torch.device, folder: Path,
                  found: dict[str, dict]) -> dict[str, dict]:
    """Train teachers, test them and write their checkpoints.   found: what `save_teacher` returns is added
    -> {name: its seconds and peak_memory}"""
    splits, data = load_data(args, device)
    mean_std, split = torch.tensor([data["mean"], data["std"]], device=device), splits["train"]
    hashes = data_hash(data, len(split))
    files, made = [folder / f"{name}.pt" for name in todo], {}
    rows = kept_rows(split, mean_std, args, folder / "scores.pt", hashes, files)
    if args.objective == "moco":
        check_moco_data(split, len(rows), args.batch_size)
    shared = dict(seed=args.seed, cuda_graphs=args.cuda_graphs)
    for i, name in enumerate(todo):
        if (weak := name.partition("@")[2]).isdigit():               # an epoch, or "pruned<i>"
            continue                                                 # saved while its backbone was trained
        model, backbone, widths = initial_model(name, args, data, folder)
        model = with_precision(channels_last(model.to(device)), device, args.precision)
        training = fine_tuning(name, args.pruned, crop=args.crop, **shared) if weak else Training(
            "squeeze", args.epochs, args.batch_size, args.lr, args.weight_decay, args.momentum,
            args.schedule, args.warmup_epochs, crop=args.crop, **shared)
        about = {"backbone": backbone, "data": data, "trained": len(split), "args": relevant(args)}
        about |= {"kept": rows} if args.prune_ratio else {}
        identity = settings(args, name) | {"backbone": name, "save_epochs": args.save_epochs}
        with Checkpoint(files[i], args, hashes, identity, files[i + 1:]) as checkpoint:
            if args.objective == "moco" and checkpoint.read() is None:     # else the probe had begun
                twin = build_model(backbone, len(data["classes"]), data["image_size"]).to(device)
                twin = with_precision(channels_last(twin), device, args.precision)
                train_moco(model, twin, splits, rows, mean_std, training, args.queue, checkpoint)
            if args.objective != "supervised":       # a new last layer on frozen features (SC-DD, Table 16)
                probe = Probe(model, len(split.classes))
                training = Training("probe", args.probe_epochs, 256, args.probe_lr, args.probe_weight_decay,
                                    remedy="use a smaller --probe-lr", **shared)
                for _ in train(probe, split, rows, mean_std, training, checkpoint):
                    pass
                probe.classifier()
            elif weak or not (args.pretrained or args.weights):
                for epoch, forgetting in train(model, split, rows, mean_std, training, checkpoint):
                    if epoch in saved_epochs(args.save_epochs) and not weak:
                        path = folder / f"{name}@{epoch}.pt"
                        found[path.stem] = save_teacher(path, model, splits["test"], mean_std, about)
                about |= {"widths": widths} if weak else {
                    "forgetting": {key: forgetting[key].cpu() for key in ("events", "learned")}}
            found[name] = save_teacher(files[i], model, splits["test"], mean_std, about)
            made[name] = {"seconds": round(checkpoint.seconds(), 1), "peak_memory": peak_memory()}
    return made


def check_flags(args: argparse.Namespace, device: torch.device) -> None:
    """Stop where what is asked for cannot be made, whatever the data."""
    gpus = torch.cuda.device_count()
    if device.type == "cuda" and gpus < int(os.environ.get("LOCAL_WORLD_SIZE", 1)):
        fail(f"--nproc-per-node is more than the {gpus} GPUs of this machine; squeeze.py takes one for each "
             "process")
    if args.cuda_graphs and (device.type != "cuda" or world_size() > 1):
        fail("--cuda-graphs needs a GPU (--device cuda) and a single process; leave it out")
    if weak := next((name for name in args.backbones if "@" in name), None):
        fail(f"--backbones {weak}: squeeze.py makes it of {weak.partition('@')[0]}; name that, and "
             "--save-epochs or --pruned")
    check_models("--backbones", args.backbones)
    check_pool(args)
    check_weights(args)
    if args.objective != "supervised":
        check_objective(args)
    if args.warmup_epochs >= args.epochs:
        fail(f"--epochs {args.epochs} is too few for --warmup-epochs {args.warmup_epochs}; use more")


def get_parser():    # its defaults hold where utils/presets.py has none
    parser = identity_flags(Parser(__doc__))
    rate, positive = number(float, 0), number(int, 1)
    switch = dict(action=argparse.BooleanOptionalAction, default=False)
    add = parser.add_argument_group("method").add_argument
    add("--pretrained", **switch, help="torchvision's ImageNet weights instead of training")
    add("--crop", type=crop_name, default="pad4", help="none, resized, pad<pixels>; flips come with it")
    add("--download", action="store_true", help="fetch a named data set or pretrained weights when missing")
    add("--weights", type=Path, metavar="FILE",
        help="a state dict for the one --backbones: a classifier's, or with --objective probe an encoder's")
    add("--objective", choices=["supervised", "moco", "probe"], default="supervised",
        help="moco trains without labels, then a linear probe with them; probe: that alone [SC-DD]")
    add = parser.add_argument_group("MoCo [SC-DD]").add_argument
    add("--queue", type=positive, default=4096, help="keys that MoCo contrasts with [K]")
    add("--probe-epochs", type=positive, default=100, help="of the linear probe")
    add("--probe-lr", type=rate, default=30.0, help="SGD learning rate of the probe, cosine")
    add("--probe-weight-decay", type=rate, default=0.0, help="of the probe, 0 = off")
    add = parser.add_argument_group("weak teachers [Teddy]").add_argument
    add("--save-epochs", type=epoch_range, default="none", metavar="FIRST:LAST:STEP",
        help="also keep the weights after these epochs, as <backbone>@<epoch>, or none")
    add("--pruned", type=number(int, 0, 1000), default=0,
        help="also make so many, <backbone>@pruned<i>: without random channels, fine-tuned a little")
    add = parser.add_argument_group("pruning of the training images [BiLP]").add_argument
    add("--prune-ratio", type=number(float, 0, 0.999), default=0.0,
        help="of each class's images, those of largest loss, not trained on [alpha]")
    add("--score-trials", type=positive, default=50, help="trainings that an image's loss is averaged over")
    add("--score-epochs", type=positive, default=100, help="of each")
    add("--score-lr", type=rate, default=3e-3, help="SGD learning rate of each")
    add("--score-batch-size", type=positive, default=512, help="images per step of each")
    add = parser.add_argument_group("optimization").add_argument
    add("--epochs", type=positive, default=50, help="passes over the training images")
    add("--batch-size", type=positive, default=64,
        help="images per step; a last batch of one image joins the batch before")
    add("--lr", type=rate, default=0.05, help="SGD learning rate")
    add("--momentum", type=number(float, 0, 1), default=0.9, help="SGD momentum, 0 = off")
    add("--weight-decay", type=rate, default=0.0, help="SGD weight decay, 0 = off")
    add("--schedule", choices=["constant", "cosine", "step"], default="constant", help="of the learning rate")
    add("--warmup-epochs", type=number(int, 0), default=0, help="of a rising learning rate first, 0 = off")
    add("--cuda-graphs", **switch, help="replay a step as one launch; for GPUs that wait for the host")
    return parser


def main(argv=None):
    args = parse_args(get_parser(), "squeeze", argv)
    args.weights_file = args.weights         # --weights becomes a hash: results compare contents, not paths
    if args.weights:
        if not args.weights.is_file():
            fail(f"--weights {args.weights.absolute()}: no such file; name a checkpoint")
        args.weights, args.pretrained = f"sha256:{fingerprint(args.weights)[:16]}", False
    device, paths = begin(args)
    check_flags(args, device)
    names = [one for name in args.backbones for one in teachers_of(name, args.save_epochs, args.pruned)]
    found, todo = {}, []                                             # {name: what `save_teacher` returns}
    for name in names:                                               # a backbone before its weak teachers
        path, (backbone, _, weak) = paths.teachers / f"{name}.pt", name.partition("@")
        if record := load_finished(path, args, settings=settings(args, name), keys=TEACHER):
            check_data(record["data"].get("fingerprint"), args, path)
            found[name] = {"top1": record["top1"],
                           "first_bn_variance": first_bn_variance(name, record["weights"])}
        elif weak.isdigit() and backbone in found:
            fail(f"{path} is missing; it can only be saved while {backbone}.pt is trained; {AGAIN}, or name "
                 "another --teachers")
        else:
            todo.append(name)
    run = Run("squeeze", args, paths.teachers / "squeeze.json")
    if not todo and run.unchanged(settings(args) | {"backbones": args.backbones},
                                  top1={name: one["top1"] for name, one in found.items()}):
        return None
    run.costs()                          # where it is damaged, stop before the work
    made = make_teachers(todo, args, device, paths.teachers, found) if todo else {}
    spent = run.costs() | made  # read now: another process may have added to it
    metrics = {key: {name: found[name][key] for name in names} for key in ("top1", "first_bn_variance")}
    summary = ", ".join(f"{name} {top1:.1f} %" for name, top1 in metrics["top1"].items())
    return run.finish({**metrics, "costs": spent},
                      f"{summary} of the test images (chance {100 / args.data_set['classes']:.1f} %)",
                      seconds=sum(spent[name]["seconds"] for name in names if name in spent))


if __name__ == "__main__":
    script(main)
