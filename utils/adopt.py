"""Weights that others trained, for squeeze.py."""
from pathlib import Path

import torch

from models import pretrained_weights
from utils import fail
from utils.checkpoint import load_torch, reason


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
