"""How recover.py, relabel.py and train_eval.py grow with images, classes and pixels: `python -m tests.bench
scale`.

Each row is one process of a phase on noise, with networks so small that what is around them shows. It runs
twice, with few and with many steps (iterations of recover, epochs of the others): their difference is the
time of an image in a step, the rest is spent before and after. Processor seconds of one thread, so that other
processes count little.

    python -m tests.bench scale > scale.txt && python -m tests.scale scale.txt scale.png        # a picture
"""
import os
import re
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from PIL import Image

from utils.figures import draw

ROOT = Path(__file__).resolve().parents[1]
SHARED = "--ipc {ipc} --image-size {size} --backbones wrn10_1 --device cpu --workers 0"
PHASES = {   # flags, and the flag of the steps
    "squeeze": ("--epochs 1 --batch-size 50 --crop resized --lr 0.01", None),
    "collect_stats": ("--batch-size 50 --crop resized --patch 4", None),
    "recover": ("--batch-size 50 --crop resized", "--iterations"),
    "relabel": ("--batch-size 50 --whole-up-to 0", "--epochs"),
    "train_eval": ("--batch-size 50 --whole-up-to 0 --students wrn10_1 --evaluations 1", "--epochs")}
PROCESS = """
import importlib, pathlib, re, sys, time
importlib.import_module(sys.argv[1]).main(sys.argv[2:])
status = (pathlib.Path("/") / "proc" / "self" / "status").read_text()
print(time.process_time(), re.search(r"VmHWM:\\s*(\\d+)", status)[1])
"""
CASES = [   # images, classes, pixels
    (10, 10, 32), (100, 10, 32), (1000, 10, 32), (1000, 100, 32), (1000, 1000, 32), (100, 10, 64),
    (100, 10, 224)]


def write_noise(folder, classes, size):
    """An image folder of noise: two training images and a test image a class."""
    rng = np.random.default_rng(0)
    for split, count in ("train", 2), ("test", 1):
        for label in range(classes):
            (folder / split / f"{label:04}").mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 256, (size, size, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / split / f"{label:04}" / f"{i}.png")


def measure(phase, *flags):
    """A process of a phase.   -> its processor seconds, its peak memory in MB (Linux)"""
    out = subprocess.run([sys.executable, "-c", PROCESS, phase, *map(str, flags)], cwd=ROOT, check=True,
                         text=True, stdout=subprocess.PIPE, env=os.environ | {"OMP_NUM_THREADS": "1"}).stdout
    seconds, kilobytes = out.splitlines()[-1].split()
    return float(seconds), int(kilobytes) / 1000


def steps(images, size):
    """Few, and many: some 4,000 images of 32 pixels more, or as many pixels."""
    return 2, 2 + max(4, round(4000 / images * (32 / size) ** 2))


def bench_scale(rounds, quick, device):
    """recover.py, relabel.py and train_eval.py by images, classes and pixels (tests/scale.py): milliseconds
    of an image in an iteration or epoch, seconds around them, and peak memory with few and many steps;
    processor time of one thread, one round."""
    for images, classes, size in [(4, 2, 16)] if quick else CASES:
        with TemporaryDirectory() as folder:
            data = Path(folder, "noise")
            write_noise(data, classes, size)
            shared = ["--dataset", data, "--run-dir", Path(folder, "runs"),
                      *SHARED.format(ipc=images // classes, size=size).split()]
            for phase, (flags, name) in PHASES.items():
                flags = [*shared, *flags.split()]
                if not name:
                    measure(phase, *flags)
                    continue
                few, many = (2, 6) if quick else steps(images, size)
                (first, less), (second, more) = (measure(phase, *flags, name, n, "--overwrite")
                                                 for n in (few, many))
                each = (second - first) / (many - few)
                yield f"{phase}, {images} images, {classes} classes, {size} pixels", {
                    "ms_image": 1e3 * each / images, "around_s": first - few * each, "few_mb": less,
                    "many_mb": more}


def draw_scale(text, fig):
    """Time of an image by the number of images and of pixels, of the lines of `bench_scale`."""
    found = re.findall(r"^(\w+), (\d+) images, (\d+) classes, (\d+) pixels +ms_image ([\d.]+)", text, re.M)
    rows = [(phase, *map(int, numbers), float(ms)) for phase, *numbers, ms in found]
    fig.set_size_inches(8, 3.2)
    by_images, by_pixels = fig.subplots(1, 2, sharey=True)
    for phase in dict.fromkeys(row[0] for row in rows):
        ours = [row[1:] for row in rows if row[0] == phase]
        at_32 = [(images, ms) for images, classes, size, ms in ours if (classes, size) == (10, 32)]
        at_100 = [(size, ms) for images, classes, size, ms in ours if (images, classes) == (100, 10)]
        by_images.plot(*zip(*at_32), marker="o", label=f"{phase}.py")
        by_pixels.plot(*zip(*at_100), marker="o", label=f"{phase}.py")
    by_pixels.plot((32, 224), (2, 2 * 49), ":", color="0.5", label="as the area")
    by_images.set(xscale="log", xlabel="distilled images (32 pixels)", ylabel="ms of an image in a step")
    by_pixels.set(xscale="log", yscale="log", xlabel="pixels of a side (100 images)")
    by_pixels.set_xticks([32, 64, 224], ["32", "64", "224"])
    by_pixels.minorticks_off()
    by_pixels.legend()


if __name__ == "__main__":
    draw(draw_scale, Path(sys.argv[1]).read_text(), Path(sys.argv[2]))
