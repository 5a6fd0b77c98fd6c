"""Weights that others trained, for squeeze.py: torchvision's, a classifier of one's own, a self-supervised
encoder."""
import argparse
from pathlib import Path

import torch
from torch import Tensor, nn

from models import pretrained_weights
from utils import fail
from utils.checkpoint import load_torch
from utils.files import reason

# keys under which others store a state dict
WRAPPERS = "state_dict", "model", "teacher", "model_state_dict", "network"
PLAIN = "save the state dict alone, torch.save(model.state_dict(), FILE)"


def check_weights(args: argparse.Namespace) -> None:
    """Stop where squeeze.py cannot take the weights of --weights FILE, whatever they are."""
    path, backbones = args.weights_file, args.backbones
    if args.objective == "probe" and not path:
        fail("--objective probe trains a classifier on an encoder: name its checkpoint (MoCo, SwAV, DINO) "
             "with --weights FILE and its network with --backbones, or use --objective moco up to 64 pixels")
    if path and len(backbones) > 1:
        fail(f"--weights {path} is of one network, and --backbones names {len(backbones)}; name one, and "
             "call squeeze.py again for each other")


def load_pretrained(name: str, model: nn.Module, download: bool) -> None:
    """torchvision's IMAGENET1K_V1 weights, from its cache unless a download is allowed."""
    try:
        weights = pretrained_weights(name)
    except ValueError as error:
        fail(f"--pretrained: {error}; name other --backbones or use --no-pretrained")
    classes, mine = len(weights.meta["categories"]), len(model.get_submodule(classifier_of(model)).weight)
    if mine != classes:
        fail(f"--pretrained: the weights of {name} are of {classes} classes, the data has {mine}; use "
             "--no-pretrained, or --weights FILE with --objective probe")
    cached = Path(torch.hub.get_dir()) / "checkpoints" / Path(weights.url).name
    remedy = "put torchvision's file there, or remove it and pass --download"
    if not cached.exists() and download:
        try:
            weights.get_state_dict(progress=False, check_hash=True, weights_only=True)
        except (OSError, RuntimeError) as error:                     # no network, or other bytes
            fail(f"--pretrained: {weights.url} cannot be fetched ({reason(error)}); put it at {cached}, or "
                 "use --no-pretrained")
    state_dict = load_torch(cached, remedy)
    try:
        model.load_state_dict(state_dict)
    except RuntimeError as error:
        fail(f"{cached} does not hold weights of {name} for these images ({reason(error)}); use "
             f"--no-pretrained, or {remedy}")


def read_weights(path: Path) -> dict[str, Tensor]:
    """The state dict of a checkpoint: plain, or under one of WRAPPERS."""
    # many store their arguments so; it runs nothing
    with torch.serialization.safe_globals([argparse.Namespace]):
        stored = load_torch(path, f"name another --weights, or {PLAIN}")
    stored = next((stored[key] for key in WRAPPERS if isinstance(stored.get(key), dict)), stored)
    tensors = {key: value for key, value in stored.items()
               if isinstance(key, str) and torch.is_tensor(value)}
    if not tensors:
        fail(f"--weights {path}: there is no state dict in it, nor under {', '.join(WRAPPERS)}; {PLAIN}")
    return tensors


def has_large_stem(model: nn.Module, path: Path) -> bool:
    """Whether the file's first convolution is ResNet's of 7 pixels where the model's is that of 3."""
    mine = model.state_dict()
    stems = [tensors["conv1.weight"].shape for tensors in (strip_prefix(read_weights(path), mine), mine)
             if "conv1.weight" in tensors]
    return stems == [(64, 3, 7, 7), (64, 3, 3, 3)]


def strip_prefix(tensors: dict[str, Tensor], names: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors without what stands before the names of a network: "module.", "backbone.", "encoder_q." or
    any other. Of several networks in a file (query and key encoder) the first that has most of the names."""
    first = next(iter(names))
    prefixes = [key[:-len(first)] for key in tensors if key == first or key.endswith(f".{first}")]
    if not prefixes:
        return tensors
    prefix = max(prefixes, key=lambda prefix: sum(prefix + name in tensors for name in names))
    return {key[len(prefix):]: value for key, value in tensors.items() if key.startswith(prefix)}


def adopt(model: nn.Module, path: Path, *, encoder: bool = False) -> None:
    """Load the weights of a file into a model, in place.   encoder: all but its last linear layer, whatever
    head the file has. Ends in a line that names the first tensor missing, left over or of another shape."""
    classifier, expected = classifier_of(model), model.state_dict()
    if encoder:
        expected = {key: value for key, value in expected.items() if not key.startswith(f"{classifier}.")}
    tensors = strip_prefix(read_weights(path), expected)
    parts = {key.partition(".")[0] for key in expected}
    missing = [key for key in expected if key not in tensors and not key.endswith("num_batches_tracked")]
    left = [key for key in tensors if key not in expected and (not encoder or key.partition(".")[0] in parts)]
    if missing or left:
        found = [f"{key} is missing" for key in missing[:1]] + [f"{key} is left over" for key in left[:1]]
        headless = not encoder and missing[:1] == [f"{classifier}.weight"]
        hint = ", or --objective probe for an encoder" * headless
        fail(f"--weights {path}: {' and '.join(found)}; name the --backbones that it is of{hint}")
    tensors = {key: tensors[key] for key in expected if key in tensors}
    for key, tensor in tensors.items():
        if tensor.shape != expected[key].shape:
            why = ("it has other classes than the data; use --objective probe, or the data set it is of"
                   if key.startswith(f"{classifier}.") else
                   "it is of another network; name the --backbones that it is of, or the --image-size")
            fail(f"--weights {path}: {key} is {shape(tensor)}, not {shape(expected[key])}: {why}")
        if not tensor.isfinite().all():
            fail(f"--weights {path}: {key} is not finite; name another file")
    model.load_state_dict(tensors, strict=False)


def classifier_of(model: nn.Module) -> str:
    """Name of the last linear layer, or of the last convolution where that makes the logits (SqueezeNet)."""
    return [name for name, layer in model.named_modules() if isinstance(layer, (nn.Linear, nn.Conv2d))][-1]


def shape(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "a number"
