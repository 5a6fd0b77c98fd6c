"""Train and evaluate: students from scratch on the distilled images (phase 5 of 5).
G-VBSM, arXiv:2311.17950, Eqs. 3, 11.

Accuracy of the last epoch is the result; the best of the evaluated epochs stands beside it under its own
name. Compare with --method random, real images under the same recipe, and with --labels hard.

reads   data/<dataset>/...                                       the test images
        runs/<dataset>/<run>/images/<class>/<id>.png             recover.py, or any ImageFolder (--images)
        runs/<dataset>/<run>/labels/...                          relabel.py; not with --labels online or hard
        runs/<dataset>/teachers/<teachers>/<backbone>.pt         squeeze.py; --labels online, --protocol prune
writes  runs/<dataset>/<run>/eval/<student>[-online|-hard].json  top1 of the last epoch, per seed, mean, std
        .../<student>...-continual<steps>.json, ...-prune<percent>.json      of the other protocols

python train_eval.py --dataset cifar100 --ipc 10                                  # paper setting, Table 9
python train_eval.py --dataset cifar100 --ipc 10 --labels hard                      # without soft labels
python train_eval.py --dataset shapes                                             # smoke run: a minute
"""
import argparse
from collections import defaultdict
from collections.abc import Callable
from contextlib import ExitStack
from copy import deepcopy
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models import build_model
from utils import fail
from utils.augment import apply_epoch
from utils.checkpoint import Checkpoint
from utils.cli import for_student, identity_flags, parse_args
from utils.distilled import load_sources, load_train_data
from utils.losses import kl_loss, mse_gt_loss
from utils.parser import Parser, number
from utils.processes import barrier, rank, shard, world_size
from utils.protocols import earlier_seeds, metrics, prune, trainings
from utils.report import accuracy, beside
from utils.run import Run, begin, generator, script, send
from utils.teachers import check_models, warn_at_chance
from utils.train import (Graphed, Record, channels_last, fit, floating, full_batch, learning_rates,
                         make_step, shuffled, split_accuracy, swapped, with_precision)


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Weight decay only on tensors of two or more dimensions, as in the release; the paper is silent."""
    parameters = list(model.parameters())
    return [{"params": [p for p in parameters if p.dim() >= 2], "weight_decay": weight_decay},
            {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0}]


def hard_loss(logits: Tensor, labels: Tensor, partner_labels: Tensor, ratio: Tensor) -> Tensor:
    """Cross-entropy of logits [B, C] with both classes [B] of a mixed sample, by ratio [B] and 1 - ratio."""
    base, partner = (F.cross_entropy(logits, y, reduction="none") for y in (labels, partner_labels))
    return (ratio * base + (1 - ratio) * partner).mean()


def student_loss(logits: Tensor, y: Tensor, soft: Tensor, partner_y: Tensor, ratio: Tensor, *, kind: str,
                 gamma: float, temperature: float) -> Tensor:
    """The loss of logits [B, C] that --loss names; soft: logits [B, C]; kind "hard": of classes. y, partner_y
    [B]: classes of both images; mse_gt takes that of the first alone, as the paper's Eq. 11 has one class."""
    if kind == "hard":
        return hard_loss(logits, y, partner_y, ratio)
    if kind == "mse_gt":
        return mse_gt_loss(logits, soft, y, gamma)
    return kl_loss(logits, soft, temperature) * (temperature ** 2 if kind == "kl_t2" else 1)


def train_student(name: str, seed: int, train_data: dict, args: argparse.Namespace, checkpoint: Checkpoint,
                  piece: str, *, model: nn.Module | None = None, penalty: Callable = lambda: 0) -> dict:
    """Train a student from scratch, or `model` in place, at its precision, and resume from `piece` of the
    checkpoint. Epoch e has the labels of epoch e % label_epochs.
    train_data: from `load_train_data`; args: from `for_student`, lr: [str]; penalty(): added to the loss
    -> {"top1": % by epoch evaluated, the last epoch always among them; "top1_by_class": of the last epoch;
    "images": how many}"""
    torch.manual_seed(generator("student", seed, name).initial_seed())
    images, classes, labels, data = (train_data[key] for key in ("images", "classes", "labels", "data"))
    count, device, mean_std = len(images), images.device, train_data["mean_std"]
    if model is None:
        model = build_model(name, len(data["classes"]), data["image_size"]).to(device)
        model = with_precision(channels_last(model), device, args.precision)
    groups, fused = parameter_groups(model, args.weight_decay), device.type == "cuda"
    if args.optimizer == "adamw":
        optimizer = torch.optim.AdamW(groups, lr=float(args.lr[0]), fused=fused)
    else:
        optimizer = torch.optim.SGD(groups, lr=float(args.lr[0]), momentum=args.momentum, fused=fused)
    schedule = learning_rates(optimizer, args.schedule, args.epochs * args.lr_stretch)
    weights = floating(model) if args.ema_decay else []              # and their running averages
    record = Record(device, top1={}, top1_by_class=None, average=[value.clone() for value in weights])
    loss_of = partial(student_loss, kind="hard" if args.labels == "hard" else args.loss, gamma=args.gamma,
                      temperature=args.temperature)
    label_epochs = (args.label_epochs if args.labels == "stored" else None) or args.epochs
    draw = {}                                                        # of this epoch; train_epoch sets it

    def mixed_samples(batch, *rows):                                 # takes only tensors, as `Graphed` needs
        drawn = dict(zip(draw, rows))
        mixed = apply_epoch(images, drawn, batch, labels.mix, mean_std)
        return mixed, classes[batch], classes[drawn["partner"][batch]], drawn["ratio"][batch]

    step = make_step(optimizer, lambda mixed, *targets: (loss_of(model(mixed), *targets) + penalty(),),
                     args.cuda_graphs)
    graphs = defaultdict(partial(Graphed, mixed_samples))  # by the size of a batch: the last may differ

    def train_epoch(epoch, batches, rng):
        nonlocal draw
        labelled = epoch % label_epochs
        draw = send(labels.epoch(labelled), device)
        for batch in batches:
            mix = graphs[len(batch)] if args.cuda_graphs else mixed_samples
            mixed, y, partner_y, ratio = mix(send(batch, device), *draw.values())
            loss, = step(mixed, y, labels.soft_logits(labelled, batch, mixed), partner_y, ratio)
            if weights:
                torch._foreach_lerp_(record["average"], weights, 1 - args.ema_decay)
            yield loss

    rng = generator("order", seed, name)     # one for all epochs; batches need not be those of relabel.py
    batch_size = full_batch(count, args.whole_up_to, args.batch_size)
    for epoch in fit((model, optimizer, schedule, record),
                     shuffled(torch.arange(count), batch_size, lambda epoch: rng), train_epoch,
                     epochs=args.epochs, name=f"train_eval {name} seed {seed}",
                     resume=checkpoint.load(piece), save=partial(checkpoint.save_if_due, piece=piece)):
        # `evaluations` evenly spaced epochs, the last of them the last epoch
        if epoch * args.evaluations // args.epochs > (epoch - 1) * args.evaluations // args.epochs:
            with swapped(weights, record["average"]):
                record["top1"][epoch], record["top1_by_class"] = split_accuracy(
                    model, train_data["test"], mean_std)
    return {"top1": record["top1"], "top1_by_class": record["top1_by_class"], "images": count}


def train_piece(name: str, piece: str, seed: int, train_data: dict, checkpoint: Checkpoint,
                args: argparse.Namespace, start: nn.Module | None) -> dict:
    """One piece of `trainings`.   start: the model to prune, or None   -> {"top1": {epoch: top1}, ...}"""
    train = partial(train_student, name, seed, train_data, args, checkpoint)
    if start is None:
        return train(piece)

    def train_stage(stage, model, penalty):
        return train(piece + "-sparse" * (stage == "sparse"), model=model, penalty=penalty)["top1"]

    def test(model):
        return split_accuracy(model, train_data["test"], train_data["mean_std"])[0]

    sparse = (checkpoint.read(f"{piece}-sparse") or {}).get("weights")       # there once that stage is done
    model = channels_last(deepcopy(start).requires_grad_()).train()
    model = with_precision(model, train_data["images"].device, args.precision)
    return prune(model, train_stage, test, args.sparsity, args.l1, sparse,
                 lambda weights: checkpoint.save({"weights": weights}, f"{piece}-sparse"))


def get_parser():    # its defaults hold where utils/presets.py has none
    parser = identity_flags(Parser(__doc__))
    share, weight, count = number(float, 0, 1), number(float, 0), number(int, 1)
    switch = argparse.BooleanOptionalAction
    add = parser.add_argument_group("method").add_argument
    add("--images", type=Path, metavar="DIR",
        help="a folder <class>/<file> of any origin, instead of the run's images")
    add("--class-map", type=Path, metavar="FILE",
        help="JSON {folder: class} where folders of --images have other names")
    add("--labels", choices=["stored", "online", "hard"], default="stored",
        help="by relabel.py; online: by the teachers during training; hard: only the class")
    add("--label-epochs", type=count,
        help="reuse the labels of the first N epochs; only these need be stored; default all")
    add("--loss", choices=["mse_gt", "kl", "kl_t2"], default="mse_gt",
        help="Eq. 11 as a mean over images and classes; or SRe2L's divergence, or that times tau squared")
    add("--gamma", type=weight, default=0.1, help="weight of the class in mse_gt, 0 = off [gamma]")
    add("--temperature", type=number(float, 1e-3), default=20.0, help="of kl and kl_t2 [tau, Eq. 3]")
    add("--logit-norm", action=switch, default=True, help="of the teachers, with --labels online [LN, Eq. 8]")
    add = parser.add_argument_group("views of the images, with --labels online or hard").add_argument
    add("--mix", choices=["cutmix", "mixup", "none"], default="cutmix", help="how two images become one")
    add("--flip", action=switch, default=True, help="mirror views at random")
    add("--crop-floor", type=number(float, 0.01, 1), default=0.08,
        help="smallest share of the area that a random crop takes, 1 = off")
    add = parser.add_argument_group("optimization").add_argument
    add("--students", nargs="+", default=["convnet_w128"], metavar="NAME", help="networks to train [f_eval]")
    add("--student-seeds", nargs="+", type=number(int, 0, 10 ** 18), default=[0], metavar="SEED",
        help="one training of each student for each")
    add("--epochs", type=count, default=300, help="passes over the distilled images")
    add("--batch-size", type=count, default=64,
        help="images per step; a last batch of one image joins the batch before")
    add("--whole-up-to", type=number(int, 0), default=100,
        help="sets of up to so many images make one batch, 0 = never [||S||]")
    add("--optimizer", nargs="+", default=["adamw"], metavar="NAME",
        help="adamw or sgd, and exceptions after it: sgd swin_t=adamw")
    add("--lr", nargs="+", default=["0.001"], metavar="LR",
        help="learning rate, and exceptions after it: 0.1 resnet18=0.2")
    add("--momentum", type=share, default=0.9, help="of sgd, 0 = off")
    add("--weight-decay", nargs="+", default=["0.0"], metavar="WEIGHT",
        help="on tensors of 2 or more dimensions, 0 = off, and exceptions after it: 0.0005 swin_t=0.01")
    add("--schedule", choices=["constant", "cosine"], default="cosine", help="of the learning rate")
    add("--lr-stretch", type=number(float, 1), default=1.0,
        help="length of the cosine in trainings: at 2 the rate ends at half [zeta of EDC]")
    add("--ema-decay", type=number(float, 0, 0.99999), default=0.0,
        help="per step, of a running average of the weights, which is what is tested; 0 = off")
    add("--evaluations", type=count, default=5, help="evenly spaced over the epochs, the last is the result")
    add("--cuda-graphs", action=switch, default=False,
        help="replay a step as one launch; for GPUs that wait for the host")
    add("--download", action="store_true", help="fetch a named data set when it is missing")
    add = parser.add_argument_group("protocol").add_argument
    add("--protocol", choices=["standard", "continual", "prune"], default="standard",
        help="all classes at once, or in steps, or teachers of the students' names are pruned")
    add("--steps", type=count, default=5, help="of continual: in so many the classes arrive")
    add("--orders", type=count, default=5, help="of continual: random orders of the classes, of --seed")
    add("--sparsity", type=number(float, 0, 0.99), default=0.5, help="of prune: share of channels removed")
    add("--l1", type=weight, default=1e-4,
        help="of prune: weight of the BatchNorm scales' L1 norm, 0 = off [lambda of network slimming]")
    return parser


def main(argv=None):
    args = parse_args(get_parser(), "train_eval", argv)
    device, paths = begin(args)
    check_models("--students", args.students)
    if args.cuda_graphs and device.type != "cuda":
        fail("--cuda-graphs needs a GPU (--device cuda); leave it out")
    suffix = "" if args.labels == "stored" else f"-{args.labels}"
    suffix += {"standard": "", "continual": f"-continual{args.steps}",
               "prune": f"-prune{100 * args.sparsity:g}"}[args.protocol]
    sources = load_sources(args, paths, device)
    runs, earlier, todo = {}, {}, []
    for name in args.students:                                       # a result for each
        runs[name] = Run("train_eval", for_student(args, name), paths.eval / f"{name}{suffix}.json",
                         sources.hashes[name])
        earlier[name] = earlier_seeds(runs[name])
        if earlier[name] or not runs[name].finished():
            todo.append(name)
    if not todo:
        return

    def summary(result):
        compared = beside(result, paths.run.parent)
        return f"{result['student']} {accuracy(result)} % of the test images ({compared})"

    train_data = load_train_data(args, paths, sources, device)
    pieces, classes = trainings(args, train_data), train_data["data"]["classes"]
    # one process finishes a student before the next; those of torchrun share the trainings of all students
    for names in [todo] if world_size() > 1 else [[name] for name in todo]:
        with ExitStack() as stack:
            works = {name: stack.enter_context(runs[name].work(extends=bool(earlier[name])))
                     for name in names}
            for name, piece in shard([(name, piece) for name in names for piece in pieces
                                      if piece not in earlier[name]]):
                if "finished" not in (works[name].read(piece) or {}):
                    seed, make_data = pieces[piece]
                    found = train_piece(name, piece, seed, make_data(), works[name], runs[name].args,
                                        sources.starts.get(name))
                    works[name].save({"finished": True, **found}, piece)
            barrier()
            for name in names if rank() == 0 else ():
                done = [earlier[name].get(piece) or works[name].read(piece) for piece in pieces]
                found = {"student": name, "labels": args.labels, **metrics(args, done),
                         "images": len(train_data["images"]), "tested": len(train_data["test"]),
                         "classes": classes}
                runs[name].finish(found, summary, sources.upstream,
                                  works[name].seconds() + earlier[name].get("seconds", 0))
                warn_at_chance(name, found["top1"], len(classes), found["tested"],
                               "name more --epochs, another --lr or other --backbones")


if __name__ == "__main__":
    script(main)
