"""Squeezed backbones: loading and checking."""
import math

import torch

from utils import fail
from utils.checkpoint import load_json, load_torch, reason
from utils.cli import call
from utils.provenance import AGAIN, check_classes, check_data, fingerprint
from utils.train import with_precision

TEACHER = ("weights", "backbone", "data", "top1", "tested", "args")            # what squeeze.py stores


def need_files(args, folder, suffix, script):
    """A file for each backbone, or the command that makes those which are missing.   -> the command for others"""
    of_recipe = {"method": args.recipe, "recipe": None} if args.recipe else {}
    command = "run: " + call(script, args, **of_recipe, teachers=args.teachers, backbones=None)
    missing = [name for name in args.backbones if not (folder / f"{name}{suffix}").exists()]
    if missing and script == "squeeze.py" and "@" in "".join(missing):
        whole = " ".join(dict.fromkeys(name.partition("@")[0] for name in missing))
        fail(f"{folder / missing[0]}{suffix} is missing; {command} --backbones {whole}, with --save-epochs or --pruned for what "
             "@ names")
    if missing:
        fail(f"{folder / missing[0]}{suffix} is missing; {command} --backbones {' '.join(missing)}")
    return command


def load_teachers(args, folder, build_model, device):
    """The backbones of --backbones, frozen and in eval mode, and what their checkpoints agree on.
    -> {name: model}, {name: checkpoint without weights, plus its fingerprint}, data dict(classes, image_size, ...)"""
    models, records = {}, {}
    again = need_files(args, folder, ".pt", "squeeze.py")
    for name in args.backbones:
        path = folder / f"{name}.pt"
        record = load_torch(path, f"{again} --backbones {name} --overwrite", TEACHER)
        try:
            model = build_model(record["backbone"], len(record["data"]["classes"]), record["data"]["image_size"],
                                record.get("widths"))
            model.load_state_dict(record.pop("weights"))
        except (AttributeError, KeyError, TypeError, RuntimeError, ValueError) as error:
            fail(f"{path} does not hold weights of {name} ({reason(error)}); train it again with squeeze.py --overwrite")
        check_data(record["data"].get("fingerprint"), args, path)
        models[name] = with_precision(model.eval().requires_grad_(False).to(device), device, args.precision)
        records[name] = record | {"fingerprint": fingerprint(path)}
        first = records[args.backbones[0]]["data"]
        if record["data"] != first:
            key = next(key for key in first if record["data"].get(key) != first[key])
            fail(f"{path} and {args.backbones[0]}.pt differ in {key}; train them again with squeeze.py --overwrite")
        kept = [records[one].get("kept", torch.empty(0)) for one in (name, args.backbones[0])]
        if not torch.equal(*kept):
            fail(f"{path} and {args.backbones[0]}.pt were trained on other images (--prune-ratio); train them again alike, "
                 "or name those that were")
    check_classes(first["classes"], sorted(first["classes"]), f"the teachers in {folder}", "every data set")
    return models, records, first


def at_chance(top1, classes, tested):
    """Whether an accuracy in % on `tested` images is at most two standard errors above chance."""
    chance = 100 / classes
    return top1 <= chance + 2 * math.sqrt(chance * (100 - chance) / tested)


def costs(path):
    """{backbone: its seconds and peak_memory} of the result file of squeeze.py or collect_stats.py, {} without one."""
    return load_json(path, AGAIN).get("costs", {}) if path.exists() else {}


def check_models(flag, names, build_model, num_classes=10, image_size=224):
    """Every name is that of a network which takes such images; nothing is allocated."""
    for name in names:
        try:
            with torch.device("meta"):
                build_model(name, num_classes, image_size)
        except ValueError as error:
            fail(f"{flag} {name}: {error}")
