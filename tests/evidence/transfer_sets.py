"""Eight data sets of ten classes each, made of CIFAR-100: five to choose settings by, three to test them on
once. And two of CIFAR-10's classes, with as many images and with three times as many.

python -m tests.evidence.transfer_sets --data-dir data
# writes data/cifar100-a ... -h, data/cifar10-500 and data/cifar10-1500, ignored by git

Classes are drawn at random with a fixed seed and are disjoint. Each set has 500 training and 100 test images
a class, of CIFAR-10 the first 500 or 1500. Choose by a to e, with --holdout; f, g and h are for the end.
"""
import argparse
from pathlib import Path

import torch
from PIL import Image

from utils.data import load_split

CHOOSE, TEST = "abcde", "fgh"
IMAGES = {"train": 500, "test": 100}                                             # of a class
OF_CIFAR10 = {"cifar10-500": 500, "cifar10-1500": 1500}                          # training images of a class


def class_sets(classes):
    """{set: its ten class names}, the same for everybody."""
    order = torch.randperm(len(classes), generator=torch.Generator().manual_seed(0)).tolist()
    return {name: sorted(classes[i] for i in order[10 * k:10 * k + 10]) for k,
            name in enumerate(CHOOSE + TEST)}


def write_split(folder, found, chosen, count):
    """Write the first images of the chosen classes as folder/<class>/<number in the data set>.png."""
    for label, name in enumerate(found.classes):
        if name in chosen:
            rows = (found.labels == label).nonzero().flatten()[:count]
            (folder / name).mkdir(parents=True, exist_ok=True)
            for row, image in zip(rows, found.read(rows)):
                Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / name / f"{row:05d}.png")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", default="data", help="where the CIFARs lie, and the sets go")
    parser.add_argument("--download", action="store_true", help="fetch the CIFARs when they are missing")
    args = parser.parse_args(argv)
    root = Path(args.data_dir)
    for split, count in IMAGES.items():
        ten, hundred = (load_split(name, args.data_dir, split, download=args.download)
                        for name in ("cifar10", "cifar100"))
        for name, chosen in class_sets(hundred.classes).items():
            write_split(root / f"cifar100-{name}" / split, hundred, chosen, count)
        for name, training in OF_CIFAR10.items():
            write_split(root / name / split, ten, ten.classes, training if split == "train" else count)


if __name__ == "__main__":
    main()
