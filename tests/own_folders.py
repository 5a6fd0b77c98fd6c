"""Folders of one's own, of many kinds: does everything train by the defaults?

python -m tests.own_folders OUT.jsonl                 # the whole grid, small cells first; may be stopped
python -m tests.own_folders OUT.jsonl --classes 2 3 5 --pixels 16 --images 20
python -m tests.own_folders OUT.jsonl --table         # what OUT.jsonl holds, for tests/README.md

A cell is a generated folder through all five phases by `--dataset` and `--ipc 3` alone, but for `shorter`.
"""
import argparse
import colorsys
import io
import itertools
import json
import re
import time
from contextlib import redirect_stderr, redirect_stdout
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from PIL import Image

from utils import PHASES
from utils.shapes import SHAPES
from utils.teachers import at_chance

CLASSES, PIXELS, IMAGES = (2, 3, 5, 10, 20, 50, 200), (16, 32, 48, 64, 96), (20, 200)
METHODS = "random", "gvbsm"
RECORDED = {"image_size", "backbones", "students", "epochs", "iterations", "batch_size", "lr", "optimizer"}
# pixels of one image of each class, beyond which a cell is `shorter`
LARGE, HUGE = 20 * 16 ** 2, 80 * 32 ** 2


def shorter(classes, pixels, images, ipc):
    """{phase: flags} of a cell that would take long by the defaults: fewer epochs, from 20 classes on also
    fewer iterations (with 100 of them three classes of 48 pixels are at chance, with 300 all is right), and
    a squeeze of 20,000 images in all where even that is long."""
    size = classes * min(pixels, 64) ** 2
    if size <= LARGE:
        return {}
    epochs = ["--epochs", str(30 if size > HUGE else max(100, 6000 // (classes * ipc)))]
    flags = {"relabel": epochs, "train_eval": epochs}
    if classes >= 20:
        flags["recover"] = ["--iterations", "50" if size > HUGE else "100"]
    if size > HUGE:
        flags["squeeze"] = ["--epochs", str(max(1, 20_000 // (classes * images)))]
    return flags


def draw(number, pixels, rng):
    """uint8 [pixels, pixels, 3] of class `number` (0..199): one of ten shapes, of five hues, on stripes of
    four directions; place, size, brightness, phase and noise are drawn."""
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


def tested(classes):
    """Test images of a class."""
    return max(10, -(-100 // classes))


def make_folder(root, classes, pixels, images):
    """A data set of `classes` classes with `images` training images each, and 10 to test, or as many as make
    100 in all.   pixels: of a side"""
    for split, count in ("train", images), ("val", tested(classes)):
        for number in range(classes):
            folder = Path(root, split, f"class{number:03}")
            folder.mkdir(parents=True)
            rng = np.random.default_rng((number, split == "val"))
            for i in range(count):
                Image.fromarray(draw(number, pixels, rng)).save(folder / f"{i:03}.png", compress_level=1)


def run_phase(phase, flags):
    """-> its short RESULT, None where it failed; what it printed"""
    with redirect_stdout(io.StringIO()) as out, redirect_stderr(out):
        try:
            import_module(phase).main(flags)
        except SystemExit as end:
            if end.code:
                return None, out.getvalue()
    return json.loads(re.findall(r"^RESULT (.*)$", out.getvalue(), re.M)[-1]), out.getvalue()


def run_cell(root, classes, pixels, images, ipc=3, methods=METHODS):
    """Yields what came out for each method on a new folder below `root`; they share their teachers."""
    data, typed = Path(root, f"c{classes}-p{pixels}-n{images}"), shorter(classes, pixels, images, ipc)
    make_folder(data, classes, pixels, images)
    flags = ["--dataset", str(data), "--ipc", str(ipc), "--run-dir", str(Path(root, "runs"))]
    for method in methods:
        started, results, args = time.process_time(), {}, {}
        for phase in PHASES:
            results[phase], said = run_phase(phase, flags + ["--method", method] + typed.get(phase, []))
            if not results[phase]:
                yield {"method": method, "failed": phase, "said": said[-400:], "flags": typed}
                break
            args[phase] = json.loads(Path(results[phase]["file"]).read_text())["args"]
        else:
            yield {"method": method, "teachers": results["squeeze"]["top1"],
                   "student": results["train_eval"]["top1"], "tested": classes * tested(classes),
                   "cpu_seconds": round(time.process_time() - started), "flags": typed,
                   "args": {phase: {flag: value for flag, value in args[phase].items() if flag in RECORDED}
                            for phase in PHASES}, "found": said.splitlines()[0]}


def table(cells):
    """One row for each number of classes and images, one column for each size: weakest teacher / random /
    gvbsm, * where the cell is `shorter`, ! where one of them is at chance or a phase failed."""
    lines = ["| classes (chance) | images a class | " + " | ".join(f"{size} pixels" for size in PIXELS)
             + " |",
             "|" + " --- |" * (2 + len(PIXELS))]
    for classes, images in itertools.product(CLASSES, IMAGES):
        row = []
        for size in PIXELS:
            found = {cell["method"]: cell for cell in cells
                     if (cell["classes"], cell["images"], cell["pixels"]) == (classes, images, size)}
            numbers = [min(cell["teachers"].values()) for cell in found.values() if "teachers" in cell][:1]
            numbers += [found[method]["student"] for method in METHODS if "student" in found.get(method, {})]
            bad = len(numbers) < 3 or any(at_chance(top1, classes, classes * tested(classes))
                                          for top1 in numbers)
            row.append(" / ".join(f"{top1:.0f}" for top1 in numbers) + "!" * bad
                       + "*" * bool(shorter(classes, size, images, 3)) if found else "not run")
        lines.append(f"| {classes} ({100 / classes:.3g} %) | {images} | " + " | ".join(row) + " |")
    return "\n".join(lines)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="JSON lines, one a cell and method")
    for name, values in ("classes", CLASSES), ("pixels", PIXELS), ("images", IMAGES):
        parser.add_argument(f"--{name}", nargs="+", type=int, default=values)
    parser.add_argument("--ipc", type=int, default=3)
    parser.add_argument("--table", action="store_true")
    args = parser.parse_args(argv)
    done = [json.loads(line) for line in args.out.read_text().splitlines()] if args.out.exists() else []
    if args.table:
        return print(table(done))
    torch.set_num_threads(1)
    known = {(cell["classes"], cell["pixels"], cell["images"]) for cell in done if cell["method"]
             == METHODS[-1]}
    cells = [cell for cell in itertools.product(args.classes, args.pixels, args.images) if cell not in known]
    for classes, pixels, images in sorted(cells, key=lambda cell: (cell[0] * cell[2] + 20 * cell[0])
                                          * min(cell[1], 64) ** 2):
        with TemporaryDirectory() as root:
            for result in run_cell(root, classes, pixels, images, args.ipc):
                line = {"classes": classes, "pixels": pixels, "images": images, "ipc": args.ipc, **result}
                print(json.dumps(line), flush=True)
                with open(args.out, "a") as file:
                    file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
