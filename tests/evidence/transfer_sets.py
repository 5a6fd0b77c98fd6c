"""Eight data sets of ten classes each, made of CIFAR-100: five to choose settings by, three to test them on
once.

python -m tests.evidence.transfer_sets --data-dir data      # writes data/cifar100-a ... -h, ignored by git

Classes are dealt at random with a fixed seed and are disjoint. Each set has 500 training and 100 test images
a class. Choose by a to e, with --holdout; f, g and h are for the end.
"""
import argparse
from pathlib import Path

import torch
from torchvision.datasets import CIFAR100

CHOOSE, TEST = "abcde", "fgh"


def class_sets(classes):
    """{set: its ten class names}, the same for everybody."""
    order = torch.randperm(len(classes), generator=torch.Generator().manual_seed(0)).tolist()
    return {name: sorted(classes[i] for i in order[10 * k:10 * k + 10]) for k,
            name in enumerate(CHOOSE + TEST)}


def write_split(folder, found, chosen):
    """Write the images of the chosen classes as folder/<class>/<number in CIFAR-100>.png."""
    for number, label in enumerate(found.targets):
        if (name := found.classes[label]) in chosen:
            (folder / name).mkdir(parents=True, exist_ok=True)
            found[number][0].save(folder / name / f"{number:05d}.png")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", default="data", help="where cifar-100-python lies, and the sets go")
    parser.add_argument("--download", action="store_true", help="fetch CIFAR-100 when it is missing")
    args = parser.parse_args(argv)
    root = Path(args.data_dir)
    splits = {"train": CIFAR100(root, True, download=args.download), "test": CIFAR100(root, False)}
    for name, chosen in class_sets(splits["train"].classes).items():
        for split, found in splits.items():
            write_split(root / f"cifar100-{name}" / split, found, chosen)
        print(f"{root}/cifar100-{name}: {' '.join(chosen)}")


if __name__ == "__main__":
    main()
