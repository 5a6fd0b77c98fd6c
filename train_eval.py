"""Train and evaluate: students from scratch on the distilled images (phase 5 of 5).   G-VBSM, arXiv:2311.17950, Eqs. 3, 11.

Accuracy of the last epoch is the result; the best of the evaluated epochs stands beside it under its own name. Compare
with --method random, real images under the same recipe, and with --labels hard.

reads   data/<dataset>/...                                       the test images
        runs/<dataset>/<run>/images/<class>/<id>.png             recover.py, or any ImageFolder (--images)
        runs/<dataset>/<run>/labels/...                          relabel.py; not with --labels online or hard
        runs/<dataset>/teachers/<teachers>/<backbone>.pt         squeeze.py; --labels online, --protocol prune
writes  runs/<dataset>/<run>/eval/<student>[-online|-hard].json  top1 of the last epoch, per seed, mean, deviation
        runs/<dataset>/<run>/eval/<student>...-<protocol>.json   of --protocol continual and prune (utils/protocols.py)

python train_eval.py --dataset cifar100 --ipc 10                                   # paper setting, Table 9
python train_eval.py --dataset cifar100 --ipc 10 --loss kl --temperature 20        # ablation, Fig. 6; --overwrite or a --tag
python train_eval.py --dataset shapes                                              # smoke run: a minute
"""
import argparse
import json
import math
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
from utils.augment import apply_epoch, draw_epoch, normalize
from utils.checkpoint import load_json
from utils.cli import Parser, call, identity_flags, number, parse_args
from utils.data import describe, folder_name, list_folder, load_folder, load_split, preset_column
from utils.labels import StoredLabels
from utils.losses import ensemble_logits, kl_loss, mse_gt_loss
from utils.processes import barrier, rank, rank0_first, shard, warn, world_size
from utils.protocols import SeenLabels, prune, summary, trainings
from utils.provenance import (AGAIN, check_classes, check_inputs, check_recovered, check_same, fingerprint,
                              fingerprints, image_set, relevant)
from utils.report import beside
from utils.run import (Finite, Graphed, Progress, Run, accuracy, begin, channels_last, check_training,
                       generator, script, send, with_precision)
from utils.teachers import at_chance, check_models, load_teachers


class FreshLabels:
    """What relabel.py would draw in batches of this size, and the logits of the teachers, asked while training (none for hard
    labels), for the classes `seen`, by default all."""

    def __init__(self, args, count, size, teachers=(), seen=slice(None)):
        self.mix, self.seed, self.logit_norm, self.floor = args.mix, args.seed, args.logit_norm, args.crop_floor
        self.count, self.size, self.teachers, self.seen, self.flip = count, size, teachers, seen, args.flip
        self.batch_size = whole_batch(args, count)

    def epoch(self, epoch):
        return draw_epoch(self.count, self.size, self.batch_size, self.mix, generator("relabel", self.seed, epoch),
                          (self.floor, 1.0), self.flip)

    @torch.no_grad()
    def soft_logits(self, epoch, batch, mixed):
        return ensemble_logits(torch.stack([teacher(mixed) for teacher in self.teachers]), self.logit_norm)[:, self.seen]


def whole_batch(args, count):
    return count if count <= args.whole_up_to else args.batch_size


def parameter_groups(model, weight_decay):
    """Weight decay on tensors of two or more dimensions alone."""
    parameters = list(model.parameters())
    return [{"params": [p for p in parameters if p.dim() >= 2], "weight_decay": weight_decay},
            {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0}]


def make_optimizer(model, args):
    """args: of `for_student`   -> optimizer, schedule of its learning rate by epoch"""
    groups, lr, fused = parameter_groups(model, args.weight_decay), float(args.lr[0]), next(model.parameters()).is_cuda
    optimizer = (torch.optim.AdamW(groups, lr=lr, fused=fused) if args.optimizer == "adamw" else
                 torch.optim.SGD(groups, lr=lr, momentum=args.momentum, fused=fused))
    return optimizer, (torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.epochs * args.lr_stretch)
                       if args.schedule == "cosine" else torch.optim.lr_scheduler.ConstantLR(optimizer, 1))


def hard_loss(logits, labels, partner_labels, ratio):
    """Cross-entropy with the classes of both images of a mixed sample, by their shares `ratio` [B] and 1 - ratio."""
    base, partner = (F.cross_entropy(logits, y, reduction="none") for y in (labels, partner_labels))
    return (ratio * base + (1 - ratio) * partner).mean()


def student_loss(args, logits, y, soft, partner_y, ratio):
    """The loss of --labels and --loss; soft [B, classes] is not read by hard labels."""
    if args.labels == "hard":
        return hard_loss(logits, y, partner_y, ratio)
    if args.loss != "mse_gt":
        return kl_loss(logits, soft, args.temperature) * (args.temperature ** 2 if args.loss == "kl_t2" else 1)
    return mse_gt_loss(logits, soft, y, args.gamma)


def train_student(name, seed, images, classes, labels, test, data, args, device, load=lambda: None, keep=lambda state: None,
                  model=None, penalty=lambda: 0):
    """One student from scratch, or a trained model further, in place.   keep: takes, after every step, a function that gives
    the state; load: gives a state to go on from, or None; args: of `for_student`; penalty(): is added to the loss.
    -> top-1 in % by epoch evaluated, {epoch: top1}; the last epoch is always among them"""
    torch.manual_seed(generator("student", seed, name).initial_seed())
    model = model or build_model(name, len(data["classes"]), data["image_size"]).to(device)
    model = with_precision(channels_last(model), device, args.precision)
    optimizer, schedule = make_optimizer(model, args)
    trained = model, optimizer, schedule
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    order, units, top1 = generator("order", seed, name), torch.tensor([data["mean"], data["std"]], device=device), {}
    weights = [value for value in model.state_dict().values() if value.is_floating_point()] if args.ema_decay else []
    average = [value.clone() for value in weights]
    finite, epoch, done, before, loss = Finite(["loss"], device), 0, 0, order.get_state(), torch.tensor(math.nan)
    progress = Progress(f"train_eval {name} seed {seed}", args.epochs)
    if start := load():
        epoch, done, before, top1 = (start[key] for key in ("epoch", "done", "order", "top1"))
        for part, saved in zip(trained, start["trained"]):
            part.load_state_dict(saved)
        average = send(start["average"], device)
        order.set_state(before)
        progress.skip(epoch)

    def state():
        check_training(finite, model, progress.what)
        return {"epoch": epoch, "done": done, "order": before, "top1": top1, "average": average,
                "trained": [part.state_dict() for part in trained]}

    def mixed_samples(batch, *drawn):
        drawn = dict(zip(draw, drawn))
        mixed = apply_epoch(images, drawn, batch, labels.mix, units)
        return mixed, classes[batch], classes[drawn["partner"][batch]], drawn["ratio"][batch]

    def loss_and_gradients(mixed, *targets):
        loss = student_loss(args, model(mixed), *targets) + penalty()
        return loss.detach(), *torch.autograd.grad(loss, parameters)

    # by the size of a batch: the last may be short
    graphs = [defaultdict(partial(Graphed, function)) for function in (mixed_samples, loss_and_gradients)]
    while epoch < args.epochs:
        model.train()
        labelled = epoch % (args.label_epochs or args.epochs)
        draw = send(labels.epoch(labelled), device)
        batches = torch.randperm(len(images), generator=order).split(whole_batch(args, len(images)))
        for rows in batches[done:]:
            mix, step = (graph[len(rows)] for graph in graphs) if args.cuda_graphs else (mixed_samples, loss_and_gradients)
            mixed, y, partner_y, ratio = mix(send(rows, device), *draw.values())
            soft = labels.soft_logits(labelled, rows, mixed) if args.labels != "hard" else mixed.new_zeros(0)
            loss, *gradients = step(mixed, y, soft, partner_y, ratio)
            for parameter, gradient in zip(parameters, gradients):
                parameter.grad = gradient
            optimizer.step()
            if args.ema_decay:
                torch._foreach_lerp_(average, weights, 1 - args.ema_decay)
            done += 1
            finite.see(epoch * len(batches) + done, loss)
            keep(state)
        schedule.step()
        epoch, done, before = epoch + 1, 0, order.get_state()
        # `evaluations` evenly spaced epochs, the last of them the last epoch
        if epoch * args.evaluations // args.epochs > (epoch - 1) * args.evaluations // args.epochs:
            check_training(finite, model, progress.what)
            with swapped(weights, average):
                top1[epoch] = tested(model, test, units)
        progress.step(lambda: f"loss {loss.item():.4f}  top1 {list(top1.values())[-1:]}")
    return top1


def tested(model, test, units):
    """Top-1 in % on the test images; units: mean and std on the model's device."""
    return accuracy(model, ((normalize(send(x, units.device), *units), y) for x, y in test.batches(500)))


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


OWN = {     # flags that take exceptions for single students, and how a word is read; a rate stays as it was written
    "optimizer": {"adamw": "adamw", "sgd": "sgd"}.__getitem__, "lr": lambda text: [text] if number(float, 1e-30)(text) else None,
    "weight_decay": number(float, 0)}


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
    method.add_argument("--labels", choices=["stored", "online", "hard"], default="stored",
                        help="of relabel.py, asked of the teachers while training, or the class alone")
    method.add_argument("--label-epochs", type=number(int, 1),
                        help="use the labels of so many epochs again and again, which is all that need be stored; default all")
    method.add_argument("--loss", choices=["mse_gt", "kl", "kl_t2"], default="mse_gt",
                        help="Eq. 11, or SRe2L's divergence, or that times the squared temperature")
    method.add_argument("--gamma", type=number(float, 0), default=0.1,
                        help="weight of the class in mse_gt, 0 = off [gamma]")
    method.add_argument("--temperature", type=number(float, 1e-3), default=20.0, help="of kl and kl_t2 [tau, Eq. 3]")
    method.add_argument("--logit-norm", action=argparse.BooleanOptionalAction, default=True,
                        help="with --labels online [LN, Eq. 8]")
    method.add_argument("--mix", choices=["cutmix", "mixup", "none"], default="cutmix",
                        help="with --labels online or hard; stored labels know theirs")
    method.add_argument("--flip", action=argparse.BooleanOptionalAction, default=True,
                        help="with --labels online or hard: mirror half of the views")
    method.add_argument("--crop-floor", type=number(float, 0.01, 1), default=0.08,
                        help="with --labels online or hard: smallest share of the area that a random crop takes, 1 = off")
    optimization = parser.add_argument_group("optimization")
    optimization.add_argument("--students", nargs="+", default=["convnet_w128"], metavar="NAME",
                              help="networks to train [f_eval]")
    optimization.add_argument("--student-seeds", nargs="+", type=number(int, 0, 10 ** 18), default=[0], metavar="SEED",
                              help="one training of each student for each")
    optimization.add_argument("--epochs", type=number(int, 1), default=300, help="passes over the distilled images")
    optimization.add_argument("--batch-size", type=number(int, 1), default=64, help="images per step")
    optimization.add_argument("--whole-up-to", type=number(int, 0), default=100,
                              help="sets of up to so many images make one batch, 0 = never [||S||]")
    optimization.add_argument("--optimizer", nargs="+", default=["adamw"], metavar="NAME",
                              help="adamw or sgd, and exceptions after it: sgd swin_t=adamw")
    optimization.add_argument("--lr", nargs="+", default=["0.001"], metavar="LR",
                              help="learning rate, and exceptions after it: 0.1 resnet18=0.2")
    optimization.add_argument("--momentum", type=number(float, 0, 1), default=0.9, help="of sgd, 0 = off")
    optimization.add_argument("--weight-decay", nargs="+", default=["0.0"], metavar="WEIGHT",
                              help="on tensors of 2 or more dimensions, 0 = off, and exceptions after it: 0.0005 swin_t=0.01")
    optimization.add_argument("--schedule", choices=["constant", "cosine"], default="cosine",
                              help="of the learning rate, per epoch")
    optimization.add_argument("--lr-stretch", type=number(float, 1), default=1.0,
                              help="the cosine is that of so many times the epochs: at 2 it ends at half [zeta of EDC]")
    optimization.add_argument("--ema-decay", type=number(float, 0, 0.99999), default=0.0,
                              help="per step, of a running average of the weights, which is what is tested; 0 = off")
    optimization.add_argument("--evaluations", type=number(int, 1), default=5,
                              help="evenly spaced over the epochs, the last is the result")
    optimization.add_argument("--cuda-graphs", action=argparse.BooleanOptionalAction, default=False,
                              help="replay a step as one launch; for GPUs that wait for the host")
    optimization.add_argument("--download", action="store_true", help="fetch a named data set when it is missing")
    protocol = parser.add_argument_group("protocol")
    protocol.add_argument("--protocol", choices=["standard", "continual", "prune"], default="standard",
                          help="all classes at once, or in steps, or teachers of the students' names are pruned")
    protocol.add_argument("--steps", type=number(int, 1), default=5, help="of continual: in so many the classes arrive")
    protocol.add_argument("--orders", type=number(int, 1), default=5, help="of continual: random orders of the classes, of --seed")
    protocol.add_argument("--sparsity", type=number(float, 0, 0.99), default=0.5,
                          help="of prune: the part of the channels that goes")
    protocol.add_argument("--l1", type=number(float, 0), default=1e-4,
                          help="of prune: weight of the BatchNorm scales' L1 norm, 0 = off [lambda of network slimming]")
    return parser


def main(argv=None):
    args = parse_args(get_parser(), "train_eval", argv, preset_column)
    device, paths = begin(args)
    check_models("--students", args.students, build_model)
    if args.cuda_graphs and device.type != "cuda":
        fail("--cuda-graphs needs a GPU (--device cuda); leave it out")
    alone = {name: for_student(args, name) for name in args.students}                # a result for each student
    before, upstream = earlier_result(args, paths)
    teachers, records, starts, data = {}, {}, {}, before.get("data")
    if args.labels == "online":
        teachers, records, data = load_teachers(args, paths.teachers, build_model, device)
        upstream["squeeze"] = upstream.get("squeeze", {}) | {name: record["args"] for name, record in records.items()}
    if args.labels == "online" and before:
        check_recovered(before, args, paths, data, records)
    made_from = dict.fromkeys(args.students, origin(args, paths, before, records))
    if args.protocol == "prune":
        starts, origins, start_data = load_starts(args, paths, device)
        upstream["squeeze"] = upstream.get("squeeze", {}) | {name: record["args"] for name, record in origins.items()}
        made_from = {name: made_from[name] | {"teacher": origins[name]["fingerprint"]} for name in args.students}
    kind = ("" if args.labels == "stored" else f"-{args.labels}") + {
        "standard": "", "continual": f"-continual{args.steps}", "prune": f"-prune{100 * args.sparsity:g}"}[args.protocol]
    results = {name: paths.eval / f"{name}{kind}.json" for name in args.students}
    earlier = {name: earlier_seeds(results[name], alone[name], made_from[name]) for name in results}
    runs = {name: Run("train_eval", alone[name], results[name], made_from[name]) for name in results}
    todo = [name for name in results if earlier[name] or not runs[name].finished()]
    if not todo:
        return
    if args.labels == "hard":
        data = describe(args.dataset, args.data_dir, args.image_size, args.workers)
    if args.labels == "hard" and before:
        check_recovered(before, args, paths, data, {})
    images, classes, labels = load_distilled(args, paths, before, data, made_from[todo[0]], list(teachers.values()), device)
    check_models("--students", todo, build_model, len(data["classes"]), data["image_size"])
    if starts and (key := next((key for key in data if start_data.get(key) != data[key]), None)):
        fail(f"{paths.teachers / todo[0]}.pt and the labels' data differ in {key}; train it again with squeeze.py --overwrite")
    with rank0_first():
        test = load_split(args.dataset, args.data_dir, "test", data["image_size"], args.workers, args.download,
                          args.holdout).to(device)
    check_classes(test.classes, data["classes"], "the test images", args.images or paths.images)
    whole = {"images": images, "classes": classes, "labels": labels, "test": test, "data": data}
    pieces = trainings(args, whole, partial(labels_of, args))
    for names in [todo] if world_size() > 1 else [[name] for name in todo]:                # torchrun deals all trainings at once
        with ExitStack() as stack:
            works = {name: stack.enter_context(runs[name].work(extends=bool(earlier[name])))
                     for name in names}
            for name, piece in shard([(name, piece) for name in names for piece in pieces if piece not in earlier[name]]):
                if (works[name].read(piece) or {}).get("epoch") != args.epochs:
                    done = train_piece(name, piece, *pieces[piece], works[name], alone[name], device, starts.get(name))
                    works[name].save({"epoch": args.epochs, **done}, piece)
            barrier()
            for name in names if rank() == 0 else ():
                done = [earlier[name].get(piece) or works[name].read(piece) for piece in pieces]
                metrics = {"student": name, "labels": args.labels, **accuracies(args, done), "images": len(images),
                           "classes": data["classes"]}
                seconds = works[name].seconds() + earlier[name].get("seconds", 0)
                runs[name].finish(metrics, partial(summary_line, folder=paths.run.parent), upstream, seconds)
                if at_chance(metrics["top1"], len(data["classes"]), len(test)):
                    warn(f"{name} is right on {metrics['top1']:.1f} % of the test images, no better than chance; "
                         "look at the images, or name more --epochs, another --lr or other --backbones")


def summary_line(result, folder):
    """The accuracy of a result, and what it compares with.   folder: runs/<dataset>"""
    deviation = f" ± {result['top1_std']:.1f}" * (len(result["seeds"]) > 1)
    return f"{result['student']} {result['top1']:.1f}{deviation} % of the test images ({beside(result, folder)})"


def earlier_seeds(path, args, made_from):
    """Of a finished result of some of the --student-seeds, all else the same: what `train_piece` gave for each piece, and
    "seconds"; {} where there is none."""
    result = load_json(path, AGAIN, ("args", "made_from")) if path.exists() and not args.overwrite else {}
    seeds = result.get("seeds", args.student_seeds)
    if args.protocol != "standard" or not set(seeds) < set(args.student_seeds):
        return {}
    check_same(result["args"] | {"student_seeds": args.student_seeds}, relevant(args), path)
    check_inputs(result["made_from"], made_from, path)
    return {"seconds": result["seconds"]} | {f"seed{seed}": {"top1": {int(epoch): value for epoch, value in top1.items()}}
                                             for seed, top1 in zip(seeds, result["top1_by_epoch"])}


def accuracies(args, done):
    """What a RESULT tells of what `train_piece` gave for all pieces; the last epochs count."""
    runs, more = summary(args, done)
    last = [list(top1.values())[-1] for top1 in runs]
    return {"top1": statistics.fmean(last), "top1_std": statistics.stdev(last) if len(last) > 1 else 0.0,
            "top1_best": statistics.fmean(max(top1.values()) for top1 in runs), "seeds": args.student_seeds,
            "top1_per_seed": last, "top1_by_epoch": runs, **more}


def load_starts(args, paths, device):
    """The teachers that --protocol prune begins with, by the names of the students.   -> as of `load_teachers`"""
    named = argparse.Namespace(**vars(args) | {"backbones": args.students, "precision": "fp32"})   # train_student sets its own
    loaded = load_teachers(named, paths.teachers, build_model, device)
    for name, model in loaded[0].items():
        if not channel_scales(model):
            fail(f"--students {name}: no BatchNorm scale decides over a channel of it; prune one such as vgg11_bn or resnet18")
    return loaded


def labels_of(args, labels, rows, seen):
    """Labels of the images `rows` [N] booleans with logits of the classes `seen`.   -> the rows they are for, labels object"""
    if args.labels == "stored":
        labels = SeenLabels(labels, min(args.epochs, args.label_epochs or args.epochs), rows, seen)
        return labels.rows, labels
    rows = rows.nonzero().flatten()
    return rows, FreshLabels(args, len(rows), labels.size, labels.teachers, seen)


def train_piece(name, piece, seed, material, work, args, device, start):
    """One piece of `trainings`.   start: the trained model that --protocol prune begins with   -> {"top1": {epoch: top1}, ...}"""
    material = material()

    def train(stage="", model=None, penalty=lambda: 0):
        part = piece + "-sparse" * (stage == "sparse")
        return train_student(name, seed, **material, args=args, device=device, load=partial(work.load, part),
                             keep=partial(work.save_if_due, piece=part), model=model, penalty=penalty)

    if args.protocol != "prune":
        return {"top1": train(), "images": len(material["images"])}
    units = torch.tensor([material["data"]["mean"], material["data"]["std"]], device=device)
    sparse = (work.read(f"{piece}-sparse") or {}).get("weights")
    return prune(channels_last(deepcopy(start).requires_grad_()), train, partial(tested, test=material["test"], units=units),
                 args.sparsity, args.l1, sparse, lambda weights: work.save({"weights": weights}, f"{piece}-sparse"))


def earlier_result(args, paths):
    """The result of the phase before, relabel.py's or, without stored labels, recover.py's; {} for images of other origin.
    -> result, arguments of the earlier phases"""
    if args.labels != "stored" and args.images:
        return {}, {}
    phase, path = ("relabel", paths.labels) if args.labels == "stored" else ("recover", paths.run)
    result = load_json(path / "result.json", "run: " + call(f"{phase}.py", args, images=args.images),
                       ("args", "upstream", "made_from", "classes"))
    return result, result["upstream"] | {phase: result["args"]}


def origin(args, paths, before, records):
    """What the students are made from; before: as of `earlier_result`."""
    if args.labels == "stored":
        if set(args.backbones) != set(before["made_from"]["weights"]):
            fail(f"--backbones {' '.join(args.backbones)}: {paths.labels} was made with "
                 f"{' '.join(before['made_from']['weights'])}; name the same")
        return before["made_from"] | {"labels": fingerprint(json.dumps([before["args"], before["made_from"]]))}
    folder = args.images or paths.images
    images = {"images": before["image_set"] if before else image_set(folder, list_folder(folder)[2])}
    return images | fingerprints(records) if args.labels == "online" else images


def load_distilled(args, paths, before, data, made_from, teachers, device):
    """The images and their classes on the device, and where soft labels come from.
    -> images uint8 [N, 3, S, S], classes [N], labels object"""
    folder = args.images or paths.images
    raw, classes, names, files = load_folder(folder, data["image_size"], args.workers)
    expected = [folder_name(name) for name in data["classes"]]
    check_classes(names, sorted(expected), folder, paths.labels if args.labels == "stored" else "the data set")
    if image_set(folder, files) != made_from["images"]:
        fail(f"{paths.labels} was made for other images than {folder}; run relabel.py --overwrite" if args.labels == "stored" else
             f"{folder} holds other images than recover.py wrote; run recover.py --overwrite, or name them with --images")
    if args.labels == "stored":
        labels = StoredLabels(paths.labels, before["args"]["mix"])
        wanted = min(args.epochs, args.label_epochs or args.epochs)
        if wanted > len(labels.logits):
            flag = f"--epochs {wanted}" if wanted == args.epochs else f"--label-epochs {wanted}"
            fail(f"{flag} is more than the {len(labels.logits)} in {paths.labels}; use --label-epochs {len(labels.logits)}, "
                 f"or run relabel.py --epochs {wanted} --overwrite")
    else:
        labels = FreshLabels(args, len(raw), data["image_size"], [channels_last(teacher) for teacher in teachers])
    number = torch.tensor([expected.index(name) for name in names])
    return raw.to(device), number[classes].to(device), labels


if __name__ == "__main__":
    script(main)
