"""Train and evaluate: students from scratch on the distilled images (phase 5 of 5).
G-VBSM, arXiv:2311.17950, Eqs. 3, 11.

Accuracy of the last epoch is the result; the best of the evaluated epochs stands beside it under its own
name. Compare with --method random, real images under the same recipe, and with --labels hard.

reads   data/<dataset>/...                                       the test images
        runs/<dataset>/<run>/images/<class>/<id>.png             recover.py, or any ImageFolder (--images)
        runs/<dataset>/<run>/labels/...                          relabel.py; not with --labels online or hard
        runs/<dataset>/teachers/<teachers>/<backbone>.pt         squeeze.py; --labels online, --protocol prune
writes  runs/<dataset>/<run>/eval/<student>[-online|-hard].json  top1 of the last epoch, per seed, mean,
deviation
        runs/<dataset>/<run>/eval/<student>...-<protocol>.json   of --protocol continual and prune
        (utils/protocols.py)

python train_eval.py --dataset cifar100 --ipc 10                                   # paper setting, Table 9
python train_eval.py --dataset cifar100 --ipc 10 --loss kl --temperature 20        # ablation, Fig. 6; --overwrite or a --tag
python train_eval.py --dataset shapes                                              # smoke run: a minute
"""
import argparse
import json
import statistics
from collections import defaultdict
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F

from models import build_model, is_model_name
from models.pruning import channel_scales
from utils import fail
from utils.augment import apply_epoch, draw_epoch
from utils.checkpoint import load_json
from utils.cli import Parser, call, identity_flags, number, parse_args
from utils.data import check_count, describe, list_folder, load_folder, load_split, read_class_map
from utils.labels import StoredLabels
from utils.losses import ensemble_logits, kl_loss, mse_gt_loss
from utils.processes import barrier, rank, rank0_first, shard, warn, world_size
from utils.protocols import SeenLabels, prune, summary, trainings
from utils.provenance import (AGAIN, check_classes, check_data, check_inputs, check_recovered, check_same,
                              fingerprint, fingerprints, image_set, relevant)
from utils.report import beside
from utils.run import Run, begin, generator, script, send
from utils.teachers import at_chance, check_models, load_teachers
from utils.train import (Graphed, Record, channels_last, class_accuracies, fit, learning_rates, make_step,
                         network_inputs, split_accuracy, split_batches, with_precision)


class OnlineLabels:
    """What relabel.py would draw, and the logits of the teachers, asked while training, for the classes
    `seen`, by default
    all. Without teachers, for hard labels: the draws alone.   draw: function(epoch) -> what `draw_epoch`
    gives"""

    def __init__(self, draw, mix, teachers=(), logit_norm=True, seen=slice(None)):
        self.epoch, self.mix, self.teachers, self.logit_norm, self.seen = draw, mix, teachers, logit_norm, seen

    @torch.no_grad()
    def soft_logits(self, epoch, batch, mixed):
        if not self.teachers:
            return mixed.new_zeros(0)
        logits = torch.stack([teacher(mixed) for teacher in self.teachers])
        return ensemble_logits(logits, self.logit_norm)[:, self.seen]


def full_batch(args, count):
    """Size of a batch: all images where they are at most --whole-up-to."""
    return count if count <= args.whole_up_to else args.batch_size


def parameter_groups(model, weight_decay):
    """Weight decay on tensors of two or more dimensions alone."""
    parameters = list(model.parameters())
    return [{"params": [p for p in parameters if p.dim() >= 2], "weight_decay": weight_decay},
            {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0}]


def make_optimizer(model, args):
    """args: of `for_student`   -> optimizer, schedule of its learning rate by epoch"""
    groups, lr, fused = parameter_groups(model,
                                         args.weight_decay), float(args.lr[0]), next(model.parameters()).is_cuda
    optimizer = (torch.optim.AdamW(groups, lr=lr, fused=fused) if args.optimizer == "adamw" else
                 torch.optim.SGD(groups, lr=lr, momentum=args.momentum, fused=fused))
    return optimizer, learning_rates(optimizer, args.schedule, args.epochs * args.lr_stretch)


def hard_loss(logits, labels, partner_labels, ratio):
    """Cross-entropy with the classes of both images of a mixed sample, by their shares `ratio` [B] and 1 -
    ratio."""
    base, partner = (F.cross_entropy(logits, y, reduction="none") for y in (labels, partner_labels))
    return (ratio * base + (1 - ratio) * partner).mean()


def student_loss(logits, y, soft, partner_y, ratio, *, kind, gamma, temperature):
    """The loss of --loss, or that of hard labels, which read no soft [B, classes]: kind "hard"."""
    if kind == "hard":
        return hard_loss(logits, y, partner_y, ratio)
    if kind == "mse_gt":
        return mse_gt_loss(logits, soft, y, gamma)
    return kl_loss(logits, soft, temperature) * (temperature ** 2 if kind == "kl_t2" else 1)


def learn(model, optimizer, train_data, loss_of, record, *, label_epochs, ema_decay=0.0, cuda_graphs=False):
    """-> train_epoch of `fit`: a student on mixed samples of the distilled images; of its labels the epochs 0
    .. label_epochs - 1 again and again. loss_of(logits, y, soft, partner_y, ratio) -> scalar.
    train_data: of `load_distilled`; record["average"]: running averages of `floating(model)`, at ema_decay a
    step"""
    images, classes, labels = (train_data[key] for key in ("images", "classes", "labels"))
    mean_std, keys, weights = units(train_data, images.device), [], floating(model) if ema_decay else []

    def mixed_samples(batch, *params):
        params = dict(zip(keys, params))
        mixed = apply_epoch(images, params, batch, labels.mix, mean_std)
        return mixed, classes[batch], classes[params["partner"][batch]], params["ratio"][batch]

    step = make_step(optimizer, lambda mixed, *targets: (loss_of(model(mixed), *targets),), cuda_graphs)
    graphs = defaultdict(partial(Graphed, mixed_samples))  # by the size of a batch: the last may differ

    def train_epoch(epoch, batches, rng):
        labelled = epoch % label_epochs
        params = send(labels.epoch(labelled), images.device)
        keys[:] = params
        for batch in batches:
            mix = graphs[len(batch)] if cuda_graphs else mixed_samples
            mixed, y, partner_y, ratio = mix(send(batch, images.device), *params.values())
            loss, = step(mixed, y, labels.soft_logits(labelled, batch, mixed), partner_y, ratio)
            if ema_decay:
                torch._foreach_lerp_(record["average"], weights, 1 - ema_decay)
            yield loss
    return train_epoch


def floating(model):
    """The model's floating-point weights and buffers."""
    return [value for value in model.state_dict().values() if value.is_floating_point()]


def units(train_data, device):
    """Mean and std of the pixels, [2, 3]."""
    return torch.tensor([train_data["data"]["mean"], train_data["data"]["std"]], device=device)


def train_student(name, seed, train_data, args, checkpoint, piece, *, model=None, penalty=lambda: 0):
    """One student from scratch, or a trained model further, in place; unfinished, it goes on from its piece
    of the checkpoint.
    args: of `for_student`; penalty(): is added to the loss.
    -> {"top1": in % by epoch evaluated, the last epoch always among them; "top1_by_class": of the last
    epoch}"""
    torch.manual_seed(generator("student", seed, name).initial_seed())
    data, count, device = train_data["data"], len(train_data["images"]), train_data["images"].device
    model = model or build_model(name, len(data["classes"]), data["image_size"]).to(device)
    model = with_precision(channels_last(model), device, args.precision)
    optimizer, schedule = make_optimizer(model, args)
    weights = floating(model) if args.ema_decay else []
    record = Record(device, top1={}, top1_by_class=None, average=[value.clone() for value in weights])
    loss = partial(student_loss, kind="hard" if args.labels == "hard" else args.loss, gamma=args.gamma,
                   temperature=args.temperature)
    order, mean_std = generator("order", seed, name), units(train_data, device)

    def draw_batches(epoch):
        return order, split_batches(torch.randperm(count, generator=order), full_batch(args, count))

    train_epoch = learn(model, optimizer, train_data, lambda *targets: loss(*targets) + penalty(), record,
                        label_epochs=args.label_epochs or args.epochs, ema_decay=args.ema_decay,
                        cuda_graphs=args.cuda_graphs)
    for epoch in fit((model, optimizer, schedule, record), draw_batches, train_epoch, epochs=args.epochs,
                     name=f"train_eval {name} seed {seed}", resume=checkpoint.load(piece),
                     save=partial(checkpoint.save_if_due, piece=piece)):
        # `evaluations` evenly spaced epochs, the last of them the last epoch
        if epoch * args.evaluations // args.epochs > (epoch - 1) * args.evaluations // args.epochs:
            with swapped(weights, record["average"]):
                record["top1"][epoch] = split_accuracy(model, train_data["test"], mean_std)
                if epoch == args.epochs:
                    inputs = network_inputs(train_data["test"], mean_std)
                    record["top1_by_class"] = class_accuracies(model, inputs, len(data["classes"]))
    return record


@contextmanager
@torch.no_grad()
def swapped(weights, others):
    """Inside the block tensors have the values of others, and these theirs."""
    def swap():
        for one, other in zip(weights, others):
            kept = one.clone()
            one.copy_(other)
            other.copy_(kept)
    swap()
    yield
    swap()


# flags that take exceptions for single students, and how a word is read; a rate stays as it was written
OWN = {
    "optimizer": {"adamw": "adamw", "sgd": "sgd"}.__getitem__,
    "lr": lambda text: [text] if number(float, 1e-30)(text) else None, "weight_decay": number(float, 0)}


def for_student(args, name):
    """The arguments for one student alone, with its own values of flags such as --lr 0.1 resnet18=0.2."""
    own = {"students": [name]}
    for flag, read in OWN.items():
        words = getattr(args, flag)
        try:
            values = {student: read(value) for student, _, value in (word.rpartition("=") for word in words)}
            if not all(not student or is_model_name(student) for student in values):
                raise ValueError
            own[flag] = values.get(name, values[""])
        except (KeyError, ValueError, argparse.ArgumentTypeError):
            what = "adamw or sgd, and exceptions such as swin_t=adamw" if flag == "optimizer" else (
                f"one {'positive ' * (flag == 'lr')}number, and exceptions such as resnet18=0.2")
            fail(f"--{flag.replace('_', '-')} {' '.join(words)}: give {what} after it")
    return argparse.Namespace(**vars(args) | own)


def get_parser():
    parser = identity_flags(Parser(__doc__))
    method = parser.add_argument_group("method")
    method.add_argument("--images", type=Path, metavar="DIR",
                        help="a folder <class>/<file> of any origin, instead of the run's images")
    method.add_argument("--class-map", type=Path, metavar="FILE",
                        help="JSON {folder: class} where folders of --images have other names")
    method.add_argument("--labels", choices=["stored", "online", "hard"], default="stored",
                        help="of relabel.py, asked of the teachers while training, or the class alone")
    method.add_argument("--label-epochs", type=number(int, 1),
                        help="use the labels of so many epochs again and again, which is all that need be "
                        "stored; default all")
    method.add_argument("--loss", choices=["mse_gt", "kl", "kl_t2"], default="mse_gt",
                        help="Eq. 11, or SRe2L's divergence, or that times the squared temperature")
    method.add_argument("--gamma", type=number(float, 0), default=0.1,
                        help="weight of the class in mse_gt, 0 = off [gamma]")
    method.add_argument("--temperature", type=number(float, 1e-3), default=20.0,
                        help="of kl and kl_t2 [tau, Eq. 3]")
    method.add_argument("--logit-norm", action=argparse.BooleanOptionalAction, default=True,
                        help="with --labels online [LN, Eq. 8]")
    method.add_argument("--mix", choices=["cutmix", "mixup", "none"], default="cutmix",
                        help="with --labels online or hard; stored labels know theirs")
    method.add_argument("--flip", action=argparse.BooleanOptionalAction, default=True,
                        help="with --labels online or hard: mirror half of the views")
    method.add_argument("--crop-floor", type=number(float, 0.01, 1), default=0.08,
                        help="with --labels online or hard: smallest share of the area that a random crop "
                        "takes, 1 = off")
    optimization = parser.add_argument_group("optimization")
    optimization.add_argument("--students", nargs="+", default=["convnet_w128"], metavar="NAME",
                              help="networks to train [f_eval]")
    optimization.add_argument("--student-seeds", nargs="+", type=number(int, 0, 10 ** 18), default=[0],
                              metavar="SEED", help="one training of each student for each")
    optimization.add_argument("--epochs", type=number(int, 1), default=300,
                              help="passes over the distilled images")
    optimization.add_argument("--batch-size", type=number(int, 1), default=64,
                              help="images per step; a last one alone joins the batch before")
    optimization.add_argument("--whole-up-to", type=number(int, 0), default=100,
                              help="sets of up to so many images make one batch, 0 = never [||S||]")
    optimization.add_argument("--optimizer", nargs="+", default=["adamw"], metavar="NAME",
                              help="adamw or sgd, and exceptions after it: sgd swin_t=adamw")
    optimization.add_argument("--lr", nargs="+", default=["0.001"], metavar="LR",
                              help="learning rate, and exceptions after it: 0.1 resnet18=0.2")
    optimization.add_argument("--momentum", type=number(float, 0, 1), default=0.9, help="of sgd, 0 = off")
    optimization.add_argument("--weight-decay", nargs="+", default=["0.0"], metavar="WEIGHT",
                              help="on tensors of 2 or more dimensions, 0 = off, and exceptions after it: "
                              "0.0005 swin_t=0.01")
    optimization.add_argument("--schedule", choices=["constant", "cosine"], default="cosine",
                              help="of the learning rate, per epoch")
    optimization.add_argument("--lr-stretch", type=number(float, 1), default=1.0,
                              help="the cosine is that of so many times the epochs: at 2 it ends at half "
                              "[zeta of EDC]")
    optimization.add_argument("--ema-decay", type=number(float, 0, 0.99999), default=0.0,
                              help="per step, of a running average of the weights, which is what is tested; "
                              "0 = off")
    optimization.add_argument("--evaluations", type=number(int, 1), default=5,
                              help="evenly spaced over the epochs, the last is the result")
    optimization.add_argument("--cuda-graphs", action=argparse.BooleanOptionalAction, default=False,
                              help="replay a step as one launch; for GPUs that wait for the host")
    optimization.add_argument("--download", action="store_true",
                              help="fetch a named data set when it is missing")
    protocol = parser.add_argument_group("protocol")
    protocol.add_argument("--protocol", choices=["standard", "continual", "prune"], default="standard",
                          help="all classes at once, or in steps, or teachers of the students' names are "
                          "pruned")
    protocol.add_argument("--steps", type=number(int, 1), default=5,
                          help="of continual: in so many the classes arrive")
    protocol.add_argument("--orders", type=number(int, 1), default=5,
                          help="of continual: random orders of the classes, of --seed")
    protocol.add_argument("--sparsity", type=number(float, 0, 0.99), default=0.5,
                          help="of prune: the part of the channels that goes")
    protocol.add_argument("--l1", type=number(float, 0), default=1e-4,
                          help="of prune: weight of the BatchNorm scales' L1 norm, 0 = off [lambda of "
                          "network slimming]")
    return parser


def main(argv=None):
    args = parse_args(get_parser(), "train_eval", argv)
    device, paths = begin(args)
    check_models("--students", args.students, build_model)
    if args.cuda_graphs and device.type != "cuda":
        fail("--cuda-graphs needs a GPU (--device cuda); leave it out")
    alone = {name: for_student(args, name) for name in args.students}  # a result for each student
    before, upstream = earlier_result(args, paths)
    teachers, records, starts, data = {}, {}, {}, before.get("data")
    if args.labels == "online":
        teachers, records, data = load_teachers(args, paths.teachers, build_model, device)
        upstream["squeeze"] = upstream.get("squeeze", {}) | {name: record["args"] for name,
                                                             record in records.items()}
    if args.labels == "online" and before:
        check_recovered(before, args, paths, data, records)
    made_from = dict.fromkeys(args.students, origin(args, paths, before, records))
    if args.protocol == "prune":
        starts, origins, start_data = load_starts(args, paths, device)
        upstream["squeeze"] = upstream.get("squeeze", {}) | {name: record["args"] for name,
                                                             record in origins.items()}
        made_from = {name: made_from[name] | {"teacher": origins[name]["fingerprint"]}
                     for name in args.students}
    kind = ("" if args.labels == "stored" else f"-{args.labels}") + {
        "standard": "", "continual": f"-continual{args.steps}",
        "prune": f"-prune{100 * args.sparsity:g}"}[args.protocol]
    results = {name: paths.eval / f"{name}{kind}.json" for name in args.students}
    earlier = {name: earlier_seeds(results[name], alone[name], made_from[name]) for name in results}
    runs = {name: Run("train_eval", alone[name], results[name], made_from[name]) for name in results}
    todo = [name for name in results if earlier[name] or not runs[name].finished()]
    if not todo:
        return
    if args.labels == "hard":
        data = describe(args.dataset, args.data_dir, args.image_size, args.workers,
                        args.data_set["fingerprint"])
    if args.labels == "hard" and before:
        check_recovered(before, args, paths, data, {})
    images, classes, labels = load_distilled(args, paths, before, data, made_from[todo[0]],
                                             list(teachers.values()), device)
    check_models("--students", todo, build_model, len(data["classes"]), data["image_size"])
    if starts and (key := next((key for key in data if start_data.get(key) != data[key]), None)):
        fail(f"{paths.teachers / todo[0]}.pt and the labels' data differ in {key}; train it again with "
             f"squeeze.py --overwrite")
    with rank0_first():
        test = load_split(args.dataset, args.data_dir, "test", data["image_size"], args.workers,
                          args.download, args.holdout).to(device)
    check_classes(test.classes, data["classes"], "the test images", args.images or paths.images)
    whole = {"images": images, "classes": classes, "labels": labels, "test": test, "data": data}
    pieces = trainings(args, whole, partial(labels_of, args, data["image_size"]))
    # torchrun deals all trainings at once
    for names in [todo] if world_size() > 1 else [[name] for name in todo]:
        with ExitStack() as stack:
            works = {name: stack.enter_context(runs[name].work(extends=bool(earlier[name])))
                     for name in names}
            for name, piece in shard([(name, piece) for name in names for piece in pieces
                                      if piece not in earlier[name]]):
                if (works[name].read(piece) or {}).get("epoch") != args.epochs:
                    done = train_piece(name, piece, *pieces[piece], works[name], alone[name],
                                       starts.get(name))
                    works[name].save({"epoch": args.epochs, **done}, piece)
            barrier()
            for name in names if rank() == 0 else ():
                done = [earlier[name].get(piece) or works[name].read(piece) for piece in pieces]
                metrics = {"student": name, "labels": args.labels, **accuracies(args, done),
                           "images": len(images), "classes": data["classes"]}
                seconds = works[name].seconds() + earlier[name].get("seconds", 0)
                runs[name].finish(metrics, partial(summary_line, folder=paths.run.parent), upstream, seconds)
                if at_chance(metrics["top1"], len(data["classes"]), len(test)):
                    warn(f"{name} is right on {metrics['top1']:.1f} % of the test images, no better than "
                         f"chance; "
                         "look at the images, or name more --epochs, another --lr or other --backbones")


def summary_line(result, folder):
    """The accuracy of a result, and what it compares with.   folder: runs/<dataset>"""
    deviation = f" ± {result['top1_std']:.1f}" * (len(result["seeds"]) > 1)
    return f"{result['student']} {result['top1']:.1f}{deviation} % of the test images ({beside(result, folder)})"


def earlier_seeds(path, args, made_from):
    """Of a finished result of some of the --student-seeds, all else the same: what `train_piece` gave for
    each piece, and "seconds"; {} where there is none."""
    result = load_json(path, AGAIN, ("args", "made_from")) if path.exists() and not args.overwrite else {}
    seeds = result.get("seeds", args.student_seeds)
    if args.protocol != "standard" or not set(seeds) < set(args.student_seeds):
        return {}
    check_same(result["args"] | {"student_seeds": args.student_seeds}, relevant(args), path)
    check_inputs(result["made_from"], made_from, path)
    by_class = result.get("top1_by_class", [None] * len(seeds))
    return {"seconds": result["seconds"]} | {
        f"seed{seed}": {"top1": {int(epoch): value for epoch, value in top1.items()},
                        "top1_by_class": classes}
        for seed, top1, classes in zip(seeds, result["top1_by_epoch"], by_class)}


def accuracies(args, done):
    """What a RESULT tells of what `train_piece` gave for all pieces; the last epochs count."""
    runs, more = summary(args, done)
    if args.protocol == "standard" and all(by_class := [piece.get("top1_by_class") for piece in done]):
        more["top1_by_class"] = by_class  # for each seed, in the order of "classes"
    last = [list(top1.values())[-1] for top1 in runs]
    return {"top1": statistics.fmean(last), "top1_std": statistics.stdev(last) if len(last) > 1 else 0.0,
            "top1_best": statistics.fmean(max(top1.values()) for top1 in runs), "seeds": args.student_seeds,
            "top1_per_seed": last, "top1_by_epoch": runs, **more}


def load_starts(args, paths, device):
    """The teachers that --protocol prune begins with, by the names of the students.   -> as of
    `load_teachers`"""
    # train_student sets its own
    named = argparse.Namespace(**vars(args) | {"backbones": args.students, "precision": "fp32"})
    loaded = load_teachers(named, paths.teachers, build_model, device)
    for name, model in loaded[0].items():
        if not channel_scales(model):
            fail(f"--students {name}: no BatchNorm scale decides over a channel of it; prune one such as "
                 f"vgg11_bn or resnet18")
    return loaded


def labels_of(args, size, labels, rows, seen):
    """Labels of the images `rows` [N] booleans with logits of the classes `seen`.
    -> the rows they are for, labels object"""
    if args.labels == "stored":
        labels = SeenLabels(labels, min(args.epochs, args.label_epochs or args.epochs), rows, seen)
        return labels.rows, labels
    rows = rows.nonzero().flatten()
    return rows, online_labels(args, len(rows), size, labels.teachers, seen)


def online_labels(args, count, size, teachers, seen=slice(None)):
    """`OnlineLabels` of `count` images of `size` pixels, drawn as relabel.py would by these arguments."""
    def draw(epoch):
        return draw_epoch(count, size, full_batch(args, count), args.mix,
                          generator("relabel", args.seed, epoch), (args.crop_floor, 1.0), args.flip)
    return OnlineLabels(draw, args.mix, teachers, args.logit_norm, seen)


def train_piece(name, piece, seed, make_data, checkpoint, args, start):
    """One piece of `trainings`.   start: the trained model that --protocol prune begins with
    -> {"top1": {epoch: top1}, ...}"""
    train_data = make_data()
    train = partial(train_student, name, seed, train_data, args, checkpoint)
    if args.protocol != "prune":
        record = train(piece)
        return {"top1": record["top1"], "top1_by_class": record["top1_by_class"],
                "images": len(train_data["images"])}

    def train_stage(stage, model, penalty):
        return train(piece + "-sparse" * (stage == "sparse"), model=model, penalty=penalty)["top1"]

    test = partial(split_accuracy, split=train_data["test"],
                   mean_std=units(train_data, train_data["images"].device))
    sparse = (checkpoint.read(f"{piece}-sparse") or {}).get("weights")
    return prune(channels_last(deepcopy(start).requires_grad_()), train_stage, test, args.sparsity, args.l1,
                 sparse, lambda weights: checkpoint.save({"weights": weights}, f"{piece}-sparse"))


def earlier_result(args, paths):
    """The result of the phase before, relabel.py's or, without stored labels, recover.py's; {} for images of
    other origin.
    -> result, arguments of the earlier phases"""
    if args.labels != "stored" and args.images:
        return {}, {}
    phase, path = ("relabel", paths.labels) if args.labels == "stored" else ("recover", paths.run)
    command = call(f"{phase}.py", args, images=args.images, class_map=args.class_map)
    result = load_json(path / "result.json", f"run: {command}", ("args", "upstream", "made_from", "classes"))
    return result, result["upstream"] | {phase: result["args"]}


def origin(args, paths, before, records):
    """What the students are made from; before: as of `earlier_result`."""
    if args.labels == "stored":
        if set(args.backbones) != set(before["made_from"]["weights"]):
            fail(f"--backbones {' '.join(args.backbones)}: {paths.labels} was made with "
                 f"{' '.join(before['made_from']['weights'])}; name the same")
        return before["made_from"] | {"labels": fingerprint(json.dumps([before["args"],
                                                                        before["made_from"]]))}
    folder = args.images or paths.images
    images = {"images": before["image_set"] if before else image_set(folder, list_folder(folder)[2])}
    return images | fingerprints(records) if args.labels == "online" else images


def load_distilled(args, paths, before, data, made_from, teachers, device):
    """The images and their classes on the device, and where soft labels come from.
    -> images uint8 [N, 3, S, S], classes [N], labels object"""
    folder = args.images or paths.images
    check_data(data.get("fingerprint"), args, paths.labels if args.labels == "stored" else folder)
    raw, classes, _, files = load_folder(folder, data["image_size"], args.workers, data["classes"],
                                         read_class_map(args.class_map))
    if args.images:
        check_count(classes, args.ipc, folder)
    if image_set(folder, files) != made_from["images"]:
        fail(f"{paths.labels} was made for other images than {folder}; run relabel.py --overwrite"
             if args.labels == "stored" else
             f"{folder} holds other images than recover.py wrote; run recover.py --overwrite, or name them "
             f"with --images")
    if args.labels == "stored":
        labels = StoredLabels(paths.labels, before["args"]["mix"])
        wanted = min(args.epochs, args.label_epochs or args.epochs)
        if wanted > len(labels.logits):
            flag = f"--epochs {wanted}" if wanted == args.epochs else f"--label-epochs {wanted}"
            fail(f"{flag} is more than the {len(labels.logits)} in {paths.labels}; use --label-epochs "
                 f"{len(labels.logits)}, "
                 f"or run relabel.py --epochs {wanted} --overwrite")
    else:
        labels = online_labels(args, len(raw), data["image_size"],
                               [channels_last(teacher) for teacher in teachers])
    return raw.to(device), classes.to(device), labels


if __name__ == "__main__":
    script(main)
