"""Tensors of other projects into an ImageFolder for --images of the phases, and back; a run to publish.

python -m utils.convert images_best.pt labels_best.pt OUT --dataset cifar10     # MTT and its successors
python -m utils.convert res_DC.pt OUT --dataset cifar10             # DatasetCondensation: its last experiment
python -m utils.convert file.npz OUT --mean 0 0 0 --std 1 1 1       # images [N, 3, H, W], labels [N]
python -m utils.convert runs/cifar10/gvbsm-ipc10/images OUT.npz     # back, or OUT.pt
python -m utils.convert runs/cifar10/gvbsm-ipc10 --hub DIR          # a folder ready to upload to Hugging Face
python -m utils.convert runs/cifar10/gvbsm-ipc10 --zip images.zip   # its images in one uncompressed file

Floats are (pixel - mean) / std of pixels 0..1; bytes are pixels. A file written here has classes,
mean and std beside its images.
"""
import argparse
import os
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from PIL import Image
from torch.serialization import safe_globals

from utils import fail
from utils.augment import normalize
from utils.data import (class_folders, describe, folder_name, list_folder, pixels, rgb_image, unreadable_fails,
                        white_levels)
from utils.files import load_json, whole_file
from utils.hub import write_hub, write_zip
from utils.parser import Parser
from utils.run import script

CIFAR = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)
IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
UNITS = dict(cifar10=CIFAR, cifar100=CIFAR, tiny=IMAGENET, imagenet=IMAGENET)    # of DatasetCondensation, MTT
NUMPY = np.zeros(0).__reduce__()[0], np.float64(0).__reduce__()[0]
PLAIN = [np.dtype, np.ndarray, *{type(np.dtype(kind)) for kind in "?bBhHiIlLqQefd"}, *NUMPY,
         *((function, f"numpy.core.multiarray.{function.__name__}") for function in NUMPY)]      # numpy 1's


def load_file(path: Path):
    """What a .pt or .npz file holds: tensors, arrays, plain values. Nothing in the file can run."""
    try:
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as arrays:
                return dict(arrays)
        with safe_globals(PLAIN), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        fail(f"{path} is missing; name a .pt or .npz file, or a folder of <class>/<image>")
    except Exception as error:                                       # a damaged file may raise anything
        if code := re.search(r"GLOBAL (\S+)", str(error)):
            fail(f"{path} is refused: it would run {code[1]}; save its images and labels alone, as tensors")
        fail(f"{path} is no whole file of tensors ({type(error).__name__}); use torch.save or numpy.savez")


def load_tensors(files: list[Path], index: int = -1) -> dict:
    """images [N, 3, H, W], labels [N], and what else one file holds, such as classes, mean and std."""
    first, *more = map(load_file, files)
    found = dict(images=first, labels=more[0]) if more else first if isinstance(first, dict) else {}
    where = f"data[{index}] of {files[0]}" if "data" in found else " and ".join(map(str, files))
    try:
        if "data" in found:                                          # a list of [images, labels]
            found = found | dict(zip(("images", "labels"), found["data"][index]))
        images, labels = (torch.as_tensor(found[key]).detach() for key in ("images", "labels"))
    except (IndexError, KeyError, RuntimeError, TypeError, ValueError):
        fail(f"{where} holds no images and labels; name the file of the images, then that of the labels")
    if images.ndim == 4 and images.shape[1] != 3 and images.shape[3] == 3:
        images = images.permute(0, 3, 1, 2)
    if not labels.is_floating_point():
        labels = labels.long()                                       # torch computes little with uint16
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    if labels.ndim == 2:
        print(f"{where}: of soft labels only the largest, the class, is kept; relabel.py makes new ones")
        labels = labels.argmax(1)
    if images.ndim != 4 or images.shape[1] != 3 or not images.numel():
        fail(f"{where}: images of shape {list(images.shape)}; write them as [N, 3, H, W], none of these 0")
    if not images.is_floating_point() and images.dtype != torch.uint8:
        fail(f"{where}: images of type {images.dtype}; write them as floats, or as bytes (uint8)")
    if not (finite := images.flatten(1).isfinite().all(1)).all():
        fail(f"{where}: pixels of image {finite.int().argmin()} are not finite; leave it out or mend it")
    if labels.shape != images.shape[:1]:
        fail(f"{where}: labels of shape {list(labels.shape)} for {len(images)} images; write one class each")
    if (odd := labels[(labels.long() != labels) | (labels < 0)]).numel():
        fail(f"{where}: label {odd[0]:g}; number the classes from 0 on")
    return found | dict(images=images, labels=labels.long())


def class_names(labels: torch.Tensor, names: list[str] | None, where: Path) -> list[str]:
    """Names of the classes, numbers if names is None. Stops unless each, and no other, has images."""
    there = labels.unique().tolist()
    count = len(names) if names else there[-1] + 1
    if odd := sorted(set(there) ^ set(range(min(count, len(there) + 1)))):
        what = "has no image" if odd[0] < count else "is one too many"
        ends = f"{names[0]} .. {names[-1]}" if names else f"0 .. {there[-1]}"
        fail(f"{where}: class {odd[0]} {what} for the {count} classes {ends}; "
             "name the --dataset that the file is of, or a folder of its classes")
    names = names or [f"{i:0{len(str(there[-1]))}}" for i in range(count)]
    if twice := next((name for name in names if names.count(name) > 1), None):
        fail(f"{where}: class {twice} stands twice among the names; give each its own")
    return names


def to_pixels(images: torch.Tensor, units) -> tuple[torch.Tensor, str]:
    """uint8 [N, 3, H, W] of images in units [2, 3], mean and std; and how far the pixels moved, in words."""
    mean, std = torch.tensor(units, dtype=torch.float64)[..., None, None]
    pixels, rounded, outside, furthest = torch.empty(images.shape, dtype=torch.uint8), 0, 0, 0
    for done, part in zip(pixels.split(256), images.split(256)):
        levels = 255 * (part * std + mean)
        inside = levels.clamp(0, 255)
        done.copy_(inside.round())
        rounded, outside = rounded + (done - inside).abs().sum(), outside + (levels.round() != done).sum()
        furthest = max(furthest, (inside - levels).abs().max().item())
    if 2 * outside > images.numel():
        fail(f"{100 * outside / images.numel():.0f} % of the pixels lie outside 0 .. 255 with mean "
             f"{units[0]} and std {units[1]}, which are not their units; name these by --mean and --std")
    return pixels, (f"rounding moved pixels by {rounded / images.numel():.3f} of 255 on average; clamping "
                    f"moved {100 * outside / images.numel():.1f} % of them, by up to {furthest:.1f}")


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """Yields a folder to fill, which becomes `path` when all is written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=path.parent) as temporary:
        folder = Path(temporary, "new")
        folder.mkdir()
        yield folder
        os.replace(folder, path)


def write_folder(pixels: torch.Tensor, labels: torch.Tensor, classes: list[str], out: Path) -> None:
    """uint8 [N, 3, H, W] as <class>/<id>.png, ids from 0 on in each class."""
    count = [0] * len(classes)
    with whole_folder(out) as folder:
        for image, label in zip(pixels.permute(0, 2, 3, 1), labels.tolist()):
            path = folder / folder_name(classes[label]) / f"{count[label]:05d}.png"
            path.parent.mkdir(exist_ok=True)
            Image.fromarray(image.contiguous().numpy()).save(path)
            count[label] += 1


def read_folder(folder: Path, classes: list[str] | None = None) -> tuple[torch.Tensor, torch.Tensor, list]:
    """uint8 [N, 3, H, W], labels [N] and class names of an ImageFolder whose images are of one size.
    classes: in their order; by default that of the folders' names, or of their numbers."""
    _, found, _ = list_folder(folder)
    if "train" in found and class_folders(folder / "train"):
        fail(f"{folder} is a data set of {' and '.join(found)}; name one, such as {folder / 'train'}")
    classes = classes or sorted(found, key=int if all(map(str.isdecimal, found)) else None)
    labels, _, files = list_folder(folder, classes)
    paths = [str(folder / file) for file in files]
    white = white_levels(paths)
    with unreadable_fails():
        images = [pixels(rgb_image(path, white)) for path in paths]
    if odd := next((file for file, image in zip(files, images) if image.shape != images[0].shape), None):
        fail(f"{folder / odd} is of another size than {files[0]}; make all images of one size")
    return torch.stack(images), labels, classes


def mean_std(args: argparse.Namespace, known: dict):
    """[2, 3]: of --mean and --std, of the file itself, or of the data set."""
    if args.mean or args.std:
        if not (args.mean and args.std and np.isfinite(args.mean + args.std).all() and min(args.std) > 0):
            fail("--mean and --std are three finite numbers each, those of --std above 0; name both")
        return [args.mean, args.std]
    if np.shape(known.get("mean")) == np.shape(known.get("std")) == (3,):
        with suppress(ValueError):                                   # no number
            mean, std = ([float(value) for value in known[key]] for key in ("mean", "std"))
            if np.isfinite(mean + std).all() and min(std) > 0:
                return [mean, std]
        fail(f"the file's mean {list(known['mean'])} and std {list(known['std'])} are no units of pixels; "
             "name --mean and --std")
    if not (dataset := args.dataset or known.get("dataset")):
        fail("--dataset, or --mean and --std, give the units of floats; 0..1 is --mean 0 0 0 --std 1 1 1")
    data = {} if dataset in UNITS else describe(dataset, args.data_dir)
    return UNITS.get(dataset) or [data["mean"], data["std"]]


def to_tensors(args: argparse.Namespace, source: Path, out: Path) -> None:
    """An ImageFolder into a .npz, or into a .pt such as DatasetCondensation writes."""
    result = source.parent / "result.json"                           # where the images are those of a run
    run = load_json(result, "name --dataset") if result.exists() else {"args": {}}
    pixels, labels, classes = read_folder(source, run.get("classes"))
    mean, std = mean_std(args, {"dataset": run["args"].get("dataset")})
    images, known = normalize(pixels, mean, std), dict(classes=classes, mean=mean, std=std)
    with whole_file(out) as temporary, open(temporary, "wb") as file:
        if out.suffix == ".npz":
            np.savez(file, images=images.numpy(), labels=labels.numpy(), **known)
        else:
            torch.save({"data": [[images, labels]], **known}, file)
    print(f"{out}: {len(images)} images of {len(classes)} classes, mean {mean}, std {std}")


def to_folder(args: argparse.Namespace, sources: list[Path], out: Path) -> None:
    """One or two files of tensors into an ImageFolder."""
    known = load_tensors(sources, args.index)
    names = describe(args.dataset, args.data_dir)["classes"] if args.dataset else known.get("classes")
    names = ([name.decode() if isinstance(name, bytes) else str(name) for name in names]
             if np.ndim(names) else None)                            # others may count them
    classes = class_names(known["labels"], names, sources[-1])
    pixels, moved = known["images"], "the pixels are bytes already"
    if pixels.dtype != torch.uint8:
        pixels, moved = to_pixels(pixels, mean_std(args, known))
    write_folder(pixels, known["labels"], classes, out)
    print(f"{out}: {len(pixels)} images of {len(classes)} classes; {moved}")


def get_parser():
    parser = Parser(__doc__)
    parser.add_argument("paths", type=Path, nargs="+", metavar="PATH", help="to read, then to write")
    parser.add_argument("--dataset", metavar="NAME|FOLDER", help="gives class names, mean and std; of "
                        "cifar10, cifar100, tiny and imagenet mean and std of DatasetCondensation and MTT")
    parser.add_argument("--data-dir", default="data", help="where named data sets lie")
    parser.add_argument("--mean", type=float, nargs=3, help="of floats, for pixels 0..1")
    parser.add_argument("--std", type=float, nargs=3, help="of floats, for pixels 0..1")
    parser.add_argument("--zca", action="store_true", help="the floats are ZCA-whitened, which is refused")
    parser.add_argument("--index", type=int, default=-1, help="experiment in a res_*.pt, -1 = the last")
    parser.add_argument("--hub", type=Path, metavar="DIR", help="write a run as a data set for Hugging Face")
    parser.add_argument("--zip", type=Path, metavar="FILE", help="write the images of a run into one file")
    return parser


def main(argv=None):
    args = get_parser().parse_args(argv)
    *sources, out = [path for path in [*args.paths, args.hub, args.zip] if path]
    folder, run = bool(sources) and sources[0].is_dir(), args.hub or args.zip
    if args.zca:
        fail("--zca: whitened pixels are taken back by a matrix that the file lacks; convert what its "
             "inverse gives (MTT's images_zca_<step>.pt) with --mean 0 0 0 --std 1 1 1")
    if args.hub and args.zip:
        fail(f"--hub {args.hub} and --zip {args.zip}: name one of them, then call again for the other")
    if not 1 <= len(sources) <= (1 if folder or run else 2):
        fail(f"{' '.join(map(str, args.paths))}: name one or two files, or a folder, then what to write")
    if args.index != -1 and (run or folder or len(sources) > 1 or sources[0].suffix != ".pt"):
        fail(f"--index {args.index} is of a res_*.pt; leave it out")
    if run and not (sources[0] / "result.json").is_file():
        fail(f"{sources[0]} is no run of recover.py; name one, such as runs/cifar10/gvbsm-ipc10")
    names = [path.name for path in sources[0].glob("images/*") if run]
    if odd := next((name for name in names if name.encode(errors="ignore").decode() != name), None):
        fail(f"{sources[0]}/images: class {odd!a} is not UTF-8, which --hub and --zip need; rename its "
             "folder in the data set and run all phases again")
    if folder and not run and out.suffix not in (".pt", ".npz"):
        fail(f"{out} is no .pt or .npz file, into which a folder is written; name one")
    if not folder and not run and out.suffix in (".pt", ".npz"):
        fail(f"{out} ends like a file of tensors; behind what is read, name a folder to write")
    if out.exists():
        fail(f"{out} is there already; name another, or remove it")
    if args.hub:
        with whole_folder(out) as new:
            write_hub(sources[0], new)
        print(f"{out} is ready: fill in the licence in its README.md, then upload it")
    elif args.zip:
        print(f"{out}: sha256 {write_zip(sources[0], out)}")
    elif folder:
        to_tensors(args, sources[0], out)
    else:
        to_folder(args, sources, out)


if __name__ == "__main__":
    script(main)
