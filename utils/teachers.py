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
    """Stop with the command to run where a backbone of --backbones has no file.   -> the command for other
    cases"""
    recipe = {"method": args.recipe, "recipe": None} if args.recipe else {}
    command = "run: " + call(script, args, **recipe, teachers=args.teachers, backbones=None)
    missing = [name for name in args.backbones if not (folder / f"{name}{suffix}").exists()]
    if not missing:
        return command
    names, more = missing, ""
    if script == "squeeze.py" and "@" in "".join(missing):
        names = dict.fromkeys(name.partition("@")[0] for name in missing)
        more = ", with --save-epochs or --pruned for what @ names"
    path = f"{(folder / missing[0]).absolute()}{suffix}"
    fail(f"{path} is missing; {command} --backbones {' '.join(names)}{more}")


def load_teachers(args, folder, build_model, device):
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
        check_alike(records, name, args.backbones[0], folder)
    check_classes(data["classes"], sorted(data["classes"]), f"the teachers in {folder}", "every data set")
    return models, records, data


def check_alike(records, name, other, folder):
    """Stop unless two teachers were trained on the same data and the same images of it."""
    path, one, two = folder / f"{name}.pt", records[name], records[other]
    if key := next((key for key in two["data"] if one["data"].get(key) != two["data"][key]), None):
        fail(f"{path} and {other}.pt differ in {key}; train them again with squeeze.py --overwrite")
    if not torch.equal(*(record.get("kept", torch.empty(0)) for record in (one, two))):
        fail(f"{path} and {other}.pt were trained on other images (--prune-ratio); train them again alike, "
             "or name those that were")


def at_chance(top1, classes, tested):
    """Whether an accuracy in % on `tested` images is at most two standard errors above chance."""
    chance = 100 / classes
    return top1 <= chance + 2 * math.sqrt(chance * (100 - chance) / tested)


def costs(path):
    """{backbone: its seconds and peak_memory} of the result file of squeeze.py or collect_stats.py, {}
    without one."""
    return load_json(path, AGAIN).get("costs", {}) if path.exists() else {}


def check_models(flag, names, build_model, num_classes=10, image_size=224):
    """Stop unless every name is a network's and the network takes such images. Nothing is allocated."""
    for name in names:
        try:
            with torch.device("meta"):
                build_model(name, num_classes, image_size)
        except ValueError as error:
            fail(f"{flag} {name}: {error}")
