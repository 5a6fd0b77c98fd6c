"""Folders of one's own, of many kinds: does everything train by the defaults?

python -m tests.own_folders OUT.jsonl                 # the whole grid, hours; goes on where it stopped
python -m tests.own_folders --classes 3 --pixels 16 --images 20 --methods random
"""
import argparse
import colorsys
import itertools
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from PIL import Image

from utils.shapes import SHAPES

ROOT = Path(__file__).resolve().parents[1]
CLASSES, PIXELS, IMAGES = (2, 3, 5, 10, 20, 50, 200), (16, 32, 48, 64, 96), (20, 200)
PHASES = "squeeze", "collect_stats", "recover", "relabel", "train_eval"


def draw(number, pixels, rng):
    """uint8 [pixels, pixels, 3] of class `number` (0..199): one of ten shapes, of five hues, on stripes of four directions;
    place, size, brightness, phase and noise are drawn."""
    shape, hue, turn = number % 10, number // 10 % 5, (number // 50 + number) % 4
    x, y = np.meshgrid(*[np.linspace(-1, 1, pixels, dtype=np.float32)] * 2)
    angle = turn * np.pi / 4
    stripes = np.sin(12 * (x * np.cos(angle) + y * np.sin(angle)) + rng.uniform(0, 6.3))
    image = rng.uniform(0.2, 0.5) + 0.15 * stripes[..., None] * np.ones(3)
    radius, (cx, cy) = rng.uniform(0.5, 0.7), rng.uniform(-0.25, 0.25, 2)
    outline = list(SHAPES.values())[shape]((x - cx) / radius, (y - cy) / radius)
    colour = colorsys.hsv_to_rgb((hue / 5 + rng.normal(0, 0.02)) % 1, 0.7, rng.uniform(0.7, 1))
    inside = (0.5 - outline * radius * pixels / 2).clip(0, 1)[..., None]
    image += inside * (np.array(colour) - image) + rng.normal(0, 0.08, image.shape)
    return (image.clip(0, 1) * 255).round().astype(np.uint8)


def make_folder(root, classes, pixels, images, tested=10):
    """A data set of `classes` classes with `images` training and `tested` test images each.   pixels: of a side"""
    for split, count in ("train", images), ("val", tested):
        for number in range(classes):
            folder = Path(root, split, f"class{number:03}")
            folder.mkdir(parents=True)
            rng = np.random.default_rng((number, split == "val"))
            for i in range(count):
                Image.fromarray(draw(number, pixels, rng)).save(folder / f"{i:03}.png", compress_level=1)
