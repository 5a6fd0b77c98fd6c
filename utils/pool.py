"""Teddy's pool of weak teachers (arXiv:2410.07579): weights of early epochs, <backbone>@<epoch>, and trained
ones without random channels that are fine-tuned a little, <backbone>@pruned<i> (supplement Sec. D.1)."""
import argparse
from pathlib import Path

import torch
from torch import nn

from models import build_model
from models.pruning import coupled, random_channels, shrink
from utils import fail
from utils.checkpoint import load_torch
from utils.files import reason
from utils.processes import barrier
from utils.provenance import AGAIN
from utils.run import generator
from utils.train import Training

KEPT_PARAMETERS, MOST_EPOCHS = 0.66, 2     # of a pruned teacher: their share; of its fine-tuning


def saved_epochs(text: str) -> range:
    """The epochs of first:last:step, up to last; none of "none"."""
    first, last, step = map(int, (text if text != "none" else "1:0:1").split(":"))
    return range(first, last + 1, step)


def teachers_of(name: str, save_epochs: str, pruned: int) -> list[str]:
    """The names of a backbone and of the weak teachers made with it."""
    return [name, *(f"{name}@{epoch}" for epoch in saved_epochs(save_epochs)),
            *(f"{name}@pruned{i + 1}" for i in range(pruned))]


def prune_teacher(name: str, model: nn.Module, folder: Path, seed: int) -> dict[str, int]:
    """Make the model the trained backbone of a name without random channels, in place.
    -> {convolution: channels left}"""
    barrier()                                                        # until its backbone is written
    path = folder / f"{name.partition('@')[0]}.pt"
    try:
        model.load_state_dict(load_torch(path, AGAIN, ["weights"])["weights"])
    except RuntimeError as error:
        fail(f"{path} does not hold weights of {path.stem} ({reason(error)}); {AGAIN}")
    chosen = random_channels(model, KEPT_PARAMETERS, generator("pruned", seed, name))
    shrink(model, chosen)
    return {layer: len(index) for layer, index in chosen.items()}


def fine_tuning(name: str, count: int, **more) -> Training:
    """How one of `count` pruned teachers is trained: from 0 to MOST_EPOCHS epochs, never fewer than the one
    before, at a rate of 0.1 that falls to 0.001."""
    epochs = (int(name.partition("@pruned")[2]) - 1) * (MOST_EPOCHS + 1) // count
    return Training("squeeze", epochs, 32, 0.1, 1e-4, schedule="step", step_epochs=1,
                    step_factor=0.01 ** (1 / max(1, epochs - 1)), remedy="leave out --pruned", **more)


def check_pool(args: argparse.Namespace) -> None:
    """Stop where squeeze.py cannot make the weak teachers of its flags, whatever the data."""
    saved = saved_epochs(args.save_epochs)
    if saved and args.pretrained:
        fail(f"--save-epochs {args.save_epochs}: pretrained weights have no epochs; use --save-epochs none "
             "or --no-pretrained")
    if max(saved, default=1) > args.epochs:
        fail(f"--epochs {args.epochs} is too few for --save-epochs {args.save_epochs}; use more")
    if (saved or args.pruned) and (args.weights or args.objective != "supervised"):
        flag = "--weights" if args.weights else f"--objective {args.objective}"
        fail(f"{flag} makes no weak teachers; leave out --save-epochs and --pruned")
    for name in args.backbones if args.pruned else ():
        with torch.device("meta"):
            if not coupled(build_model(name, 10, 224)):
                fail(f"--pruned {args.pruned}: no channel of {name} can be removed; name other --backbones")
