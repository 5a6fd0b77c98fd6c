"""Squeezed backbones: loading and checking them, and what matches their statistics."""
import argparse
import math
from collections.abc import Iterable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models import build_model
from utils import fail
from utils.checkpoint import load_torch
from utils.cli import call
from utils.closed_form import ClosedFormMatching, freeze
from utils.data import Split, load_split
from utils.files import absent, reason
from utils.presets import UNMATCHED
from utils.processes import print_rank0, warn
from utils.provenance import check_classes, check_data, fingerprint, fingerprints
from utils.stats import Matching, layer_weights, matched_layers, mixed_moments
from utils.train import with_precision

TEACHER = ("weights", "backbone", "data", "top1", "tested", "args")            # what squeeze.py stores


def need_files(args: argparse.Namespace, folder: Path, suffix: str, script: str) -> str:
    """Stop with the command to run where a backbone of --backbones has no file; else return that command."""
    recipe = {"method": args.recipe, "recipe": None} if args.recipe else {}
    command = "run: " + call(script, args, **recipe, teachers=args.teachers, backbones=None)
    missing = [name for name in args.backbones if not (folder / f"{name}{suffix}").exists()]
    if not missing:
        return command
    check_models("--backbones", [name.partition("@")[0] for name in missing])
    names, more = missing, ""
    if script == "squeeze.py" and "@" in "".join(missing):
        names = dict.fromkeys(name.partition("@")[0] for name in missing)
        more = ", with --save-epochs or --pruned for what @ names"
    if not folder.exists() and (sets := sorted(path.name for path in folder.parent.glob("*/"))):
        more += f"; or name one of the --teachers that are there: {' '.join(sets)}"
    path = (folder / f"{missing[0]}{suffix}").absolute()
    remedy = f"{command} --backbones {' '.join(names)}{more}"
    fail(f"{path} is {absent(path, remedy)}")


def load_teachers(args: argparse.Namespace, folder: Path,
                  device: torch.device) -> tuple[dict[str, nn.Module], dict[str, dict], dict]:
    """The backbones of --backbones, frozen and in eval mode, and what their checkpoints agree on. -> {name:
    model}, {name: checkpoint without weights, plus its "fingerprint"}, {"classes", "image_size", ...}"""
    models, records = {}, {}
    again = need_files(args, folder, ".pt", "squeeze.py")
    for name in args.backbones:
        path = folder / f"{name}.pt"
        record = load_torch(path, f"{again} --backbones {name} --overwrite", TEACHER)
        data, widths = record["data"], record.get("widths")
        try:
            model = build_model(record["backbone"], len(data["classes"]), data["image_size"], widths)
            model.load_state_dict(record.pop("weights"))
        except (AttributeError, KeyError, TypeError, RuntimeError, ValueError) as error:
            fail(f"{path} does not hold weights of {name} ({reason(error)}); train it again with squeeze.py "
                 "--overwrite")
        check_data(data.get("fingerprint"), args, path)
        models[name] = with_precision(model.eval().requires_grad_(False).to(device), device, args.precision)
        records[name] = record | {"fingerprint": fingerprint(path)}
        first = records[args.backbones[0]]
        check_same_data(data, first["data"], path, f"{args.backbones[0]}.pt")
        if not torch.equal(*(one.get("kept", torch.empty(0)) for one in (record, first))):
            fail(f"{path} and {args.backbones[0]}.pt were trained on other images (--prune-ratio); train "
                 "them again alike, or name those that were")
    check_classes(data["classes"], sorted(data["classes"]), f"the teachers in {folder}", "every data set",
                  "train them again with squeeze.py --overwrite")
    return models, records, data


def training_split(args: argparse.Namespace, folder: Path, data: dict, records: dict[str, dict]) -> Split:
    """The training images, checked to be those that the teachers in `folder` were trained on.
    data, records: of `load_teachers`, or of `describe` and {}"""
    split = load_split(args.dataset, args.data_dir, "train", data["image_size"], args.workers,
                       holdout=args.holdout, imbalance=args.imbalance)
    check_classes(split.classes, data["classes"], f"--dataset {args.dataset}", f"the teachers in {folder}")
    for name, record in records.items():
        if record.get("trained", len(split)) != len(split):
            fail(f"{folder / name}.pt was trained when there were {record['trained']} training images, now "
                 f"{len(split)}; train it again with squeeze.py --overwrite")
    return split


def check_same_data(data: dict, other: dict, path: Path, where: str) -> None:
    """Stop unless two descriptions of the data (`describe`) agree: a teacher's and another's or the labels'."""
    if key := next((key for key in other if data.get(key) != other[key]), None):
        fail(f"{path} and {where} differ in {key}; train again with squeeze.py --overwrite")


def load_statistics(args: argparse.Namespace, folder: Path, models: dict[str, nn.Module],
                    records: dict[str, dict]) -> dict[str, dict]:
    """The files of Eq. 9, each checked to belong to its backbone's weights; none where only BatchNorms act.
    -> {backbone: file's dict, "fingerprint"}"""
    if not (args.conv_weight or args.class_statistics):
        return {name: {"statistics": {}, "patch": 4} for name in models}
    stored, single = {}, " --class-statistics" * args.class_statistics
    command = need_files(args, folder, ".stats.pt", f"collect_stats.py{single}")
    for name, model in models.items():
        path, again = folder / f"{name}.stats.pt", f"{command} --backbones {name} --overwrite"
        file = load_torch(path, again, ("statistics", "patch", "checkpoint", "classes", "args"))
        stored[name] = file | {"fingerprint": fingerprint(path)}
        layers, patch = matched_layers(model), stored[args.backbones[0]]["patch"]
        convolutions = {layer for layer, module in layers.items() if isinstance(module, nn.Conv2d)}
        check_classes(file["classes"], records[name]["data"]["classes"], path, f"{name}.pt")
        check_statistics(file, path, records[name], args.class_statistics, again)
        if file["statistics"].keys() != convolutions or (
                args.class_statistics and file["class_statistics"].keys() != layers.keys()):
            fail(f"{path} does not hold the layers of {name}; {again}")
        if file["patch"] != patch:
            fail(f"{path} was collected with --patch {file['patch']}, {args.backbones[0]}'s with {patch}; "
                 f"{again}")
    return stored


def check_statistics(stored: dict, path: Path, record: dict, by_class: bool,
                     again: str = "collect again with --overwrite") -> None:
    """Stop unless a file of collect_stats.py is of the backbone's weights now, and by class if so asked."""
    if stored["checkpoint"] != record["fingerprint"]:
        fail(f"{path} belongs to other weights than {path.name.replace('.stats', '')}; {again}")
    if by_class and "class_statistics" not in stored:
        fail(f"{path} holds no statistics of single classes; {again}")


def load_backbones(args: argparse.Namespace, folder: Path, device: torch.device) -> tuple:
    """The backbones that a --method of recover.py matches, the first where it chooses real images, or none.
    -> models, records, statistics, each {backbone: ...}, data of `load_teachers` or None, fingerprints"""
    first, nothing = args.backbones[0], ({}, {}, {}, None, {})
    optional = args.method == "dm" and args.init in ("noise", "real")   # only for the images that it keeps
    if args.method == "random" or optional and not (folder / f"{first}.pt").exists():
        return nothing
    if args.method not in UNMATCHED:
        if args.subset > (found := len(args.backbones)):
            fail(f"--subset {args.subset} is more than the {found} --backbones; use at most that many")
        models, records, data = load_teachers(args, folder, device)
        statistics = load_statistics(args, folder, models, records)
        stored = {name: stored.get("fingerprint") for name, stored in statistics.items()}
        return models, records, statistics, data, fingerprints(records) | {"statistics": stored}
    one = argparse.Namespace(**vars(args) | {"backbones": [first]})
    models, records, data = load_teachers(one, folder, device)
    if optional and "kept" not in records[first]:
        return nothing                                               # it would change nothing
    return models, records, {}, data, {"first backbone": fingerprints(records)["weights"]}


def make_matchers(models: dict[str, nn.Module], statistics: dict[str, dict], labels: Tensor, *,
                  plain: bool = False, class_statistics: bool = False, alpha: float = 0.8,
                  **weights: float) -> list[ClosedFormMatching | Matching]:
    """A `ClosedFormMatching`, or with `plain` a `Matching`, of each backbone, for batches of labels [G, B].
    statistics: {backbone: file of collect_stats.py}; class_statistics: a batch's targets are those of the
    mixture of its classes; weights: of `layer_weights`"""
    matchers = []
    for name, model in models.items():
        stored, targets = statistics[name], statistics[name]["statistics"]
        if class_statistics:
            share = F.one_hot(labels, len(stored["classes"])).double().mean(1).cpu()
            targets = {layer: [moment.float() for mean, var in zip(vectors[::2], vectors[1::2])
                               for moment in mixed_moments(mean, var, share)]
                       for layer, vectors in stored["class_statistics"].items()}
        targets = {layer: [vector.to(labels.device) for vector in vectors]
                   for layer, vectors in targets.items()}
        model, form = (model, Matching) if plain else (freeze(model), ClosedFormMatching)
        matchers.append(form(model, targets, layer_weights(model, **weights), alpha=alpha,
                             patch=stored["patch"]))
    return matchers


def at_chance(top1: float, classes: int, tested: int) -> bool:
    """Whether an accuracy in % on `tested` images is at most two standard errors above chance."""
    chance = 100 / classes
    return top1 <= chance + 2 * math.sqrt(chance * (100 - chance) / tested)


def warn_at_chance(name: str, top1: float, classes: int, tested: int, remedy: str) -> None:
    """Say that a network knows nothing, if its accuracy is within two standard errors of a guess."""
    if at_chance(top1, classes, tested):
        warn(f"{name} is right on {top1:.1f} % of {tested} test images, which a guess ({100 / classes:.1f} "
             f"%) may reach too; look at the images, or {remedy}")


def warn_of_backbones(records: dict[str, dict], num_classes: int) -> None:
    """`warn_at_chance` of squeezed backbones."""
    for name, record in records.items():
        warn_at_chance(name, record["top1"], num_classes, record["tested"],
                       "train it again with squeeze.py --overwrite and more --epochs or another --lr")


def warn_of_unmatched(models: dict[str, nn.Module], bn_weight: float, conv_weight: float) -> None:
    """Say which backbones have nothing that is matched, although something is to be."""
    for name, model in models.items():
        if bn_weight and not any(layer_weights(model, bn_weight, conv_weight, 1).values()):
            warn(f"{name} has no BatchNorm, and --conv-weight is 0: its statistics are not matched")


def first_bn_variance(name: str, weights: dict[str, Tensor]) -> float | None:
    """Variance over the channels of the first BatchNorm's running means (SC-DD, Table 2: the larger, the more
    a squeezed backbone tells), of a state_dict; None without BatchNorm. Also printed."""
    means = next((value for key, value in weights.items() if key.endswith("running_mean")), None)
    if means is None:
        return None
    variance = means.float().var(correction=0).item()
    print_rank0(f"{name}: the running means of its first BatchNorm vary by {variance:.5f} over the channels")
    return variance


def check_models(flag: str, names: Iterable[str], num_classes: int = 10, image_size: int = 224) -> None:
    """Stop unless every name is a network's and the network takes such images. Nothing is allocated."""
    for name in names:
        try:
            with torch.device("meta"):
                build_model(name, num_classes, image_size)
        except ValueError as error:
            fail(f"{flag} {name}: {error}")
