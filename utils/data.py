"""The data sets: one table, and loading into uint8 tensors.  Up to 64 pixels in memory, above streamed from
the files.

Layouts, in the order they are looked for (nothing is downloaded unless asked):
    shapes                               drawn here, no file
    <data_dir>/<name>/train/<class>/     val/ or test/ beside it (val/ if both; --holdout needs none)
    <data_dir>/cifar-10-batches-py, cifar-100-python, tiny-imagenet-200      as their authors publish them
    any other folder with the same in it
Classes are numbered by their sorted names everywhere, images of a class by their sorted file names.
"""
import json
import os
import re
import signal
from collections import Counter
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from torch.utils.data import DataLoader

from utils import fail
from utils.folders import (UnreadableImage, class_folders, fit_image, list_images, not_read, opened, pixels,
                           read_images, rgb_image, same_letters, sampled, stamp, survey, unreadable_fails,
                           visible, walk, white_levels)
from utils.processes import print_rank0, warn
from utils.shapes import SHAPES, draw_shapes

# mean and std of the training pixels on the 0..1 scale; patch: side of the patches of Eq. 9, in pixels
DATASETS = {
    "shapes": dict(num_classes=10, image_size=32, patch=4,
                   mean=(0.3476, 0.3482, 0.3474), std=(0.2316, 0.2320, 0.2323)),
    "cifar10": dict(num_classes=10, image_size=32, patch=4,
                    mean=(0.4914, 0.4822, 0.4465), std=(0.2470, 0.2435, 0.2616)),
    "cifar100": dict(num_classes=100, image_size=32, patch=4,
                     mean=(0.5071, 0.4865, 0.4409), std=(0.2673, 0.2564, 0.2762)),
    "tiny": dict(num_classes=200, image_size=64, patch=4,
                 mean=(0.4802, 0.4481, 0.3975), std=(0.2302, 0.2265, 0.2262)),
    "imagenet": dict(num_classes=1000, image_size=224, patch=16,
                     mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)),
}
SMALL = 64      # pixels: above, images are streamed, and a folder of one's own takes the settings of ImageNet
FEW_CLASSES = 20                # up to so many a folder takes the settings of CIFAR-10
FLAT = 1 / 255                  # standard deviation of a channel that does not vary
ARCHIVES = {"cifar10": "cifar-10-batches-py", "cifar100": "cifar-100-python", "tiny": "tiny-imagenet-200"}
TINY_URL, TINY_MD5 = "http://cs231n.stanford.edu/tiny-imagenet-200.zip", "90528d7ca1a48142e341f4ef8d21d0de"


def end_later(worker: int) -> None:
    """Signals often go to all processes of a group; those that read images end ten seconds after the one that
    asked for them, which is to end its step first."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(10))


class Split:
    """Images and labels: `classes`, `labels` [N], `image_size` S, `streamed`, `images` uint8 [N, 3, S, S] (or
    None)."""

    def __init__(self, sources, labels, classes, image_size, workers=0, white=None):
        self.classes, self.labels = classes, torch.as_tensor(labels)
        self.image_size, self.workers, self.white = image_size, workers, white
        self.streamed = image_size > SMALL
        self.files = sources if self.streamed or not isinstance(sources, np.ndarray) else None
        self.images = None if self.streamed else read_images(sources, image_size, image_size, workers, white)
        # ImageNet's customary margin: 256 pixels, of which 224 are cut out
        self.shorter = image_size * 256 // 224

    def __len__(self):
        return len(self.labels)

    def to(self, device: torch.device) -> "Split":
        """Images and labels move to the device to stay, unless they are streamed.   -> self"""
        if not self.streamed:
            self.images, self.labels = self.images.to(device), self.labels.to(device)
        return self

    def check_crop(self, crop: str) -> None:
        """Only images in memory can be padded and cropped in batches."""
        if self.streamed and crop != "resized":
            fail(f"--crop {crop} is for images of at most {SMALL} pixels; use --crop resized")

    def read(self, index: torch.Tensor) -> torch.Tensor:
        """uint8 [n, 3, S, S] of the images at index (LongTensor [n]), never augmented."""
        if not self.streamed:
            return self.images[index]
        return read_images([self.files[i] for i in index.tolist()], self.shorter, self.image_size,
                           self.workers, self.white)

    def batches(self, index, crop_seed: int | None = None) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yields images uint8 [B, 3, S, S], labels [B].   index: a LongTensor [B] for each batch, or one
        number, the size of batches of all images in their order.

        crop_seed (0, 1, ...): streamed images get RandomResizedCrop and a flip drawn from (crop_seed, index)
        alone, whatever the workers; torch's generators stay as they were. Images in memory come as they are.
        """
        index = torch.arange(len(self)).split(index) if isinstance(index, int) else index
        if not self.streamed:
            # a GPU waits once
            rows = torch.cat([torch.empty(0, dtype=torch.long), *index]).to(self.labels.device)
            yield from ((self.images[batch], self.labels[batch])
                        for batch in rows.split([len(batch) for batch in index]))
            return
        loader = DataLoader(index, batch_size=None, num_workers=self.workers, generator=torch.Generator(),
                            collate_fn=partial(self._load, crop_seed),  # generator: not torch's global one
                            worker_init_fn=end_later)
        for images, labels in loader:
            if labels is None:
                break  # leaving the loop ends the workers; an exception would hold them for seconds
            yield images, labels
        else:
            return
        fail(images)

    def _load(self, crop_seed, index):
        try:
            return torch.stack([self._image(i, crop_seed) for i in index.tolist()]), self.labels[index]
        except UnreadableImage as error:
            return error, None

    def _image(self, i, crop_seed):
        image = rgb_image(self.files[i], self.white)
        if crop_seed is None:
            return fit_image(image, self.shorter, self.image_size)
        from torchvision.transforms import v2    # late, slow to import
        view = v2.Compose([v2.RandomResizedCrop(self.image_size, scale=(0.08, 1)), v2.RandomHorizontalFlip()])
        # torchvision's transforms draw from torch's global CPU generator
        with torch.random.fork_rng(devices=[]):
            seed = np.random.SeedSequence((crop_seed, i)).generate_state(1)
            torch.default_generator.manual_seed(int(seed[0]))
            return pixels(view(image))


def find_root(dataset: str, data_dir: str, download: bool = False) -> Path:
    """The folder that holds a data set: with train/ in it, or one of ARCHIVES (perhaps yet to be fetched)."""
    if not dataset:
        fail("--dataset is empty; name a data set or a folder")
    root = Path(data_dir, dataset) if dataset in DATASETS else Path(dataset)
    if (root / "train").is_dir():
        return root
    there = root.absolute()                                          # tells which folder the call came from
    if (root.parent / "train").is_dir() and root.name in ("train", "val", "test"):
        fail(f"--dataset {dataset}: name the folder above, {root.parent}, which has train/ and val/ in it")
    if dataset not in DATASETS and root.is_dir() and (folders := class_folders(root)):
        if near := next((name for name in folders if name.lower().startswith("train")), None):
            fail(f"--dataset {dataset}: there is no {there}/train; rename {near}/ to train/, and the test "
                 "images' folder to val/")
        fail(f"--dataset {dataset}: there is no {there}/train beside {folders[0]}/; move folders that are "
             "classes into train/, and add val/ alike or --holdout")
    if dataset not in DATASETS:
        fail(f"--dataset {dataset}: there is no {there}/train; name one of {', '.join(DATASETS)}, "
             f"or a folder that has train/<class>/<image>, and val/ alike unless there is --holdout")
    if dataset not in ARCHIVES:
        fail(f"--dataset {dataset}: there is no {there}/train/<class>/<image>; lay it out so or name another "
             f"--data-dir")
    archive = Path(data_dir, ARCHIVES[dataset])
    if not (archive.is_dir() or download):
        fail(f"--dataset {dataset}: there is neither {there}/train/<class>/<image> nor {archive.absolute()}; "
             f"name another --data-dir, or fetch it by python squeeze.py --dataset {dataset} --download")
    return archive


def fetch_tiny(root: Path) -> None:
    """Download and unpack Tiny-ImageNet as `root`, which is there only when complete."""
    root.parent.mkdir(parents=True, exist_ok=True)
    from torchvision.datasets.utils import download_and_extract_archive
    with TemporaryDirectory(dir=root.parent) as folder:
        download_and_extract_archive(TINY_URL, folder, md5=TINY_MD5)
        os.replace(Path(folder, root.name), root)


def find_split(dataset: str, data_dir: str, split: str, download: bool = False) -> tuple:
    """One split's images (files, or uint8 [N, H, W, 3]), labels and class names."""
    if dataset == "shapes":
        return *draw_shapes(split), list(SHAPES)
    root = find_root(dataset, data_dir, download)
    try:
        if root.name == ARCHIVES.get(dataset) and dataset != "tiny":
            from torchvision import datasets
            found = getattr(datasets, dataset.upper())(root.parent, split == "train", download=download)
            return found.data, found.targets, found.classes
        if not root.is_dir():
            fetch_tiny(root)
    except (OSError, RuntimeError) as error:    # no network, or other bytes than the authors'
        fail(f"--dataset {dataset}: {root} is damaged or cannot be fetched ({error}); remove it and use "
             f"--download")
    return list_split(root, split)[:3]


def test_folder(root: Path) -> Path | None:
    """val/ or else test/, the one that is not empty; None where neither is there."""
    folders = list(filter(Path.is_dir, (root / "val", root / "test")))
    return next((folder for folder in folders if any(map(visible, os.listdir(folder)))),
                next(iter(folders), None))


def alike(train: Path, test: Path | None) -> bool:
    """Whether there is a folder of test images, with the classes of train/."""
    return test is not None and {*map(same_letters, class_folders(test))} == {
        *map(same_letters, class_folders(train))}


def check_alike(train: Path, names: set[str], test: Path, there: set[str]) -> None:
    """Stop unless the training and the test images, of two folders or a table, have the same classes."""
    told = []
    for path, other, missing in (test, train, names - there), (train, test, there - names):
        if missing:
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            told.append(f"{path} lacks class {min(missing)}{more} of {other.name}")
    if told:
        fail(f"{'; '.join(told)}: add or remove what is in only one")


def list_split(root: Path, split: str) -> tuple[list[str], list[int], list[str], dict]:
    """`list_images` of one split of a folder; those of val/, or else test/, by the classes of train/."""
    if split == "train":
        return list_images(root / "train")
    folder = test_folder(root)
    if folder is None:
        others = [name for name in class_folders(root) if name != "train"]
        renamed = f"rename {' or '.join(others)} to val" if others else "add one with the same classes"
        fail(f"{root} has train/ but neither val/ nor test/: {renamed}, or test on a tenth of the training "
             "images by --holdout")
    classes, there = class_folders(root / "train"), set(class_folders(folder))
    tables = list(filter(Path.is_file, (folder / "val_annotations.txt", folder / "val.txt",
                                        root / f"{folder.name}.txt", root / "meta.bin")))
    if there <= {"images"} and tables:
        return list_annotated(folder, tables[0], classes)
    if not there and (loose := walk(folder)[0]):
        fail(f"{folder} holds {len(loose)} images, such as {Path(loose[0]).name}, and no folder for each "
             f"class; sort them into {folder.name}/<class>/, or write lines of a file's name and its class "
             f"to {root / folder.name}.txt")
    check_alike(root / "train", set(map(same_letters, classes)), folder, set(map(same_letters, there)))
    return list_images(folder, classes)


def list_annotated(folder: Path, table: Path, classes: list[str]) -> tuple:
    """The same of images without class folders, from a table with file and class in each line, as
    Tiny-ImageNet has it; the class by its name or by its number."""
    number = {str(i): i for i in range(len(classes))}
    number |= {same_letters(name): i for i, name in enumerate(classes)}
    rows = devkit_rows(folder, table) if table.suffix == ".bin" else table_rows(table, number)
    named = [same_letters(name) for _, name in rows]
    check_alike(folder.parent / "train", set(map(same_letters, classes)), table,
                {same_letters(classes[number[name]]) if name in number else name for name in named})
    rows.sort(key=lambda row: (number[same_letters(row[1])], row[0]))
    place = folder / "images" if (folder / "images").is_dir() else folder
    files, (images, other, hidden) = [str(place / file) for file, _ in rows], walk(place)
    for file, count in Counter(files).items():
        if count > 1 or not os.path.isfile(file):
            fail(f"{table} names {os.path.relpath(file, place)} "
                 + (f"{count} times; name it once" if count > 1 else
                    f"and it is not in {place}: mend the line, file and class separated by a tab"))
    other += sorted(set(images) - set(files))                        # that the table does not name
    return (files, [number[same_letters(name)] for _, name in rows], classes,
            {"hidden": hidden, "other": [path for path in other if path != str(table)]})


def table_rows(table: Path, known: Iterable[str]) -> list[list[str]]:
    """[file, class] of each line of a text file: columns separated by tabs, or else by blanks; then the class
    is one of `known`, which may have blanks in it, or one word."""
    try:
        lines = table.read_text(encoding="utf-8-sig").splitlines()
    except ValueError as error:
        fail(f"{table} is no text in UTF-8 ({error}); store it as such")
    rows = []
    for line in filter(str.strip, lines):
        file, *rest = line.strip().split("\t")[:2] if "\t" in line else line.split(maxsplit=1)
        if not rest:
            fail(f"{table}: {file!r} does not name a file and a class: mend or remove it")
        name = rest[0].strip()
        rows.append([file, name if "\t" in line or same_letters(name) in known else name.split()[0]])
    return rows


def devkit_rows(folder: Path, table: Path) -> list[list[str]]:
    """[file, class] of the images in a folder by the meta.bin that torchvision.datasets.ImageNet makes of
    ImageNet's devkit: names of classes, and the class of each validation image, sorted by name."""
    files = [os.path.basename(path) for path in walk(folder)[0]]
    try:
        wnids = torch.load(table, weights_only=True)[1]
        return [list(row) for row in zip(files, wnids, strict=True)]
    except Exception as error:                                       # a damaged pickle may raise anything
        fail(f"{table} does not give the classes of the {len(files)} images in {folder} "
             f"({type(error).__name__}); remove it, and write lines of a file's name and its class to "
             f"{folder}.txt")


def fitting_size(sizes: list[tuple[int, int]]) -> int:
    """The side to which images of these (width, height) are cut: that of most of them where those are one
    square of up to SMALL pixels; else what half of them have at least, up to SMALL if that is at most 96,
    else up to 224; at least 8."""
    (most, count), = Counter(sizes).most_common(1)
    if 2 * count > len(sizes) and most[0] == most[1] <= SMALL:
        return max(8, most[0])
    median = sorted(map(min, sizes))[len(sizes) // 2]
    return max(8, min(median // 8 * 8, SMALL)) if median <= 96 else min(median // 32 * 32, 224)


def look(dataset: str, data_dir: str, known: Iterable[dict] = (), holdout: bool = False) -> dict:
    """What a data set is, fit for JSON: path, fingerprint, classes and images counted, pixels of its sides,
    image_size that fits, which `fits` keeps whatever size is chosen; all but image_size and classes are None
    of a named one that is no folder of images, or is not here.
    known: what earlier calls gave; the one whose files have the same names, sizes and times is given back.
    holdout: test images may be absent, or of no class."""
    named = DATASETS.get(dataset)
    nothing = dict.fromkeys(["path", "fingerprint", "train", "test", "pixels", "passed", "stamp", "fits"])
    root = Path(data_dir, dataset) if named else find_root(dataset, data_dir)
    if named and not (root / "train").is_dir():
        root = Path(data_dir, ARCHIVES.get(dataset, dataset))
    if dataset == "shapes" or named and not (root / "train").is_dir():
        return nothing | dict(classes=named["num_classes"], image_size=named["image_size"])
    files, labels, classes, passed = list_split(root, "train")
    tests, others = [], dict.fromkeys(passed, [])
    if not holdout or alike(root / "train", test_folder(root)):
        tests, _, _, others = list_split(root, "test")
    try:
        mark = stamp(files + tests, root)
    except OSError as error:                                         # such as a link to nothing
        fail(f"{error.filename} cannot be read ({error.strerror}): replace or remove it")
    for one in known:
        if one.get("stamp") == mark:
            return one | dict(path=str(root.resolve()), image_size=one.get("fits", one["image_size"]))
    sizes, fingerprint, contents = survey(files + tests, root)
    warn_of_copies(files, labels, tests, contents)
    sides = [side for size in sizes for side in size]
    passed = {kind: passed[kind] + others[kind] for kind in passed}
    fits = named["image_size"] if named else fitting_size(sizes[:len(files)])
    return dict(path=str(root.resolve()), fingerprint=fingerprint, train=len(files), test=len(tests),
                classes=len(classes), pixels=[min(sides), max(sides)], stamp=mark,
                passed={kind: [len(paths), *paths[:1]] for kind, paths in passed.items()},
                image_size=fits, fits=fits)


def warn_of_copies(files: list[str], labels: list[int], tests: list[str], contents: list[bytes]) -> None:
    """Training images that are test images too, or of two classes.   contents: sha256 of all files, or []"""
    last = dict(zip(contents, zip(files, labels)))
    tested = [(test, last[content][0]) for test, content in zip(tests, contents[len(files):])
              if content in last]
    double = [(file, last[content][0]) for file, label, content in zip(files, labels, contents)
              if last[content][1] != label]
    for copies, what in ((tested, "test images are training images"),
                         (double, "training images are of two classes")):
        if copies:
            warn(f"{len(copies)} {what}, such as {copies[0][0]} and {copies[0][1]}; remove one of each pair")


def folder_column(size: int, classes: int) -> str:
    """The name of DATASETS whose settings are nearest to a folder of so many classes."""
    if size > SMALL:
        return "imagenet"
    return "cifar10" if classes <= FEW_CLASSES else "cifar100" if size <= 32 else "tiny"


def find_size(dataset: str, data_dir: str) -> int:
    """The image size if none is asked for: a folder's is `fitting_size` of (some of) its training images."""
    if dataset in DATASETS:
        return DATASETS[dataset]["image_size"]
    sizes = []
    with unreadable_fails():
        for file in sampled(list_images(find_root(dataset, data_dir) / "train")[0]):
            with opened(file) as image:
                sizes.append(image.size)
    return fitting_size(sizes)


def subset(labels: Iterable[int], classes: int, split: str, holdout: bool, imbalance: float) -> list[int]:
    """Rows of a split that --holdout and --imbalance leave, in their order."""
    members = [[] for _ in range(classes)]
    for row, label in enumerate(labels):
        members[label].append(row)
    if holdout:
        members = [[row for i, row in enumerate(rows, 1) if (i % 10 == 0) == (split == "test")]
                   for rows in members]
    if split == "train":
        largest = max(map(len, members))
        members = [rows[:max(1, round(largest * imbalance ** (-label / max(1, classes - 1))))]
                   for label, rows in enumerate(members)]
    return sorted(row for rows in members for row in rows)


def load_split(dataset: str, data_dir: str, split: str, image_size: int | None = None, workers: int = 0,
               download: bool = False, holdout: bool = False, imbalance: float = 1.0) -> Split:
    """Split "train" or "test" of a named data set or of a folder, at image_size (default: find_size) pixels.
    holdout: every tenth training image of a class is "test", the others are "train", and the test set stays
    unread. imbalance: of the training images the first n_max * imbalance^(-k / (K - 1)) of class k are taken
    (long-tailed CIFAR: Cui et al., arXiv:1901.05555), so that the first class has `imbalance` times the
    images of the last; 1 = all."""
    images, labels, classes = find_split(dataset, data_dir, "train" if holdout else split, download)
    white = None if isinstance(images, np.ndarray) else white_levels(
        images if split == "train" or holdout else find_split(dataset, data_dir, "train")[0])
    if split == "test" and not holdout and white is not None:
        white = white_levels(images, white)                          # warns; their own beside 8-bit training
    if holdout or imbalance > 1:
        rows = subset(labels, len(classes), split, holdout, imbalance)
        if not rows:
            fail(f"--holdout: no class of --dataset {dataset} has ten training images; add some, or test "
                 "images in val/ and leave it out")
        if untested := set(range(len(classes))) - {labels[row] for row in rows}:
            warn(f"--holdout: {len(untested)} of {len(classes)} classes, such as {classes[min(untested)]}, "
                 "have fewer than ten training images, and so none to test on")
        images = images[rows] if isinstance(images, np.ndarray) else [images[row] for row in rows]
        labels = [labels[row] for row in rows]
    return Split(images, labels, classes, image_size or find_size(dataset, data_dir), workers, white)


def describe(dataset: str, data_dir: str, image_size: int | None = None, workers: int = 0,
             fingerprint: str | None = None) -> dict:
    """What the phases must know of a data set, fit for JSON: classes, image_size, mean [3], std [3], patch,
    and the fingerprint that `look` gave, if any.

    Mean and std of a folder are those of all pixels of its training images at this size, 0..1, per channel.
    """
    size = image_size or find_size(dataset, data_dir)
    row = DATASETS.get(dataset, DATASETS["imagenet"])              # of a folder above 64 pixels: the patches
    if dataset in DATASETS:
        train, mean, std = Path(data_dir, dataset, "train"), row["mean"], row["std"]
        as_folder = train.is_dir() and dataset != "shapes"
        classes = class_folders(train) if as_folder else find_split(dataset, data_dir, "test")[2]
    else:
        split = load_split(dataset, data_dir, "train", size, workers)
        classes, (mean, std) = split.classes, pixel_moments(split)
        if len(classes) < 2:
            inside = class_folders(find_root(dataset, data_dir) / "train" / classes[0])
            fail(f"--dataset {dataset}: there is only one class, {classes[0]}; "
                 + (f"move the folders in it, such as {inside[0]}, one level up if they are the classes"
                    if inside else "add another to tell it from"))
        for name, level, spread in zip(("red", "green", "blue"), mean, std):
            if spread <= FLAT:
                warn(f"{name} is {255 * level:g} of 255 in every pixel of the training images, such as "
                     f"{split.files[0]}; look at how they are stored if that is not meant")
    patch = row["patch"] if size > SMALL else 4                      # ImageNet's 16 is for 224 pixels
    return dict(classes=classes, image_size=size, mean=list(mean), std=list(std), patch=patch) | (
        {"fingerprint": fingerprint} if fingerprint else {})


def pixel_moments(split: Split, batch_size: int = 256) -> tuple[list[float], list[float]]:
    """Mean and std [3] of every pixel of a split, on the 0..1 scale: exact, from a histogram of the bytes."""
    counts = sum(torch.stack([channel.flatten().bincount(minlength=256) for channel in images.unbind(1)])
                 for images, _ in split.batches(batch_size)).double()
    values, weights = torch.arange(256).double() / 255, counts / counts.sum(1, keepdim=True)
    mean = weights @ values
    variance = weights @ values ** 2 - mean ** 2
    return mean.tolist(), variance.clamp_min(FLAT ** 2).sqrt().tolist()      # a channel may be flat


def folder_name(name: str) -> str:
    """A class's name as that of a folder: what could lead elsewhere, or nowhere, is written %XX. A name that
    is a folder's stays as it is, so that folders sort as classes do."""
    return re.sub(r"^\.|[/\x00]", lambda found: f"%{ord(found[0]):02X}", name) or "%"


def escaped_name(name: str) -> str:
    """`folder_name` as older runs have it."""
    return re.sub(r'^\.|[%/\\:*?"<>|\x00-\x1f\x7f]', lambda found: f"%{ord(found[0]):02X}", name) or "%"


def read_class_map(path: Path | None) -> dict[str, str]:
    """{folder: class} of a JSON file; of lists (as in imagenet_class_index.json) the first name. None: {}"""
    try:
        table = json.loads(Path(path).read_text()) if path else {}
        names = {folder: name if isinstance(name, str) else name[0] for folder, name in table.items()}
        if not all(isinstance(name, str) for name in names.values()):
            raise TypeError
        return names
    except (AttributeError, LookupError, OSError, TypeError, ValueError) as error:
        why = f" ({error.strerror})" if isinstance(error, OSError) else ""
        fail(f"--class-map {path} is no JSON file of the form {{folder: class}}, both in quotes{why}")


def class_numbers(found: list[str], classes: list[str], folder: Path,
                  class_map: dict[str, str] | None = None) -> list[int]:
    """Of the class folders `found`: the number of each among the classes. class_map: {folder: class}. Without
    it, folders that are all numbers, such as 0, 00012 or new3, are numbers of classes, which is printed."""
    folders, found = found, [(class_map or {}).get(name, name) for name in found]
    for named in folder_name, escaped_name, lambda name: same_letters(folder_name(name)):
        number = {named(name): i for i, name in enumerate(classes)}
        names = [same_letters(name) if name not in number else name for name in found]
        if sorted(names) == sorted(number):
            return [number[name] for name in names]
    parts = [re.fullmatch(r"(\D*)(\d+)", name, re.ASCII) for name in found]
    numbers = [int(part[2]) for part in parts] if all(parts) and len({part[1] for part in parts}) == 1 else []
    values = [int(name) if name.isdecimal() else None for name in classes]    # classes that are numbers
    number = {value: i for i, value in enumerate(range(len(classes)) if None in values else values)}
    if numbers and sorted(numbers) == sorted(number):
        last = classes[number[numbers[-1]]]
        print(f"{folder}: folder {folders[-1]} holds class {last}, and so on by number", flush=True)
        return [number[value] for value in numbers]
    expected = Counter(map(folder_name, classes))
    extra, missing = [*(Counter(found) - expected)], [*(expected - Counter(found))]
    what = (f"{len(found)} classes, not {len(classes)}" if len(found) != len(classes) else
            f"class {extra[0]!r} stands where {missing[0]!r} does")
    inside = [name for name in folders if len(class_folders(folder / name)) == len(classes)]
    fail(f"{folder} and the data set differ in their classes ({what}); "
         + (f"name {folder / inside[0]}" if inside else "use the same data set for both, or --class-map"))


def list_folder(folder: str | Path, classes: list[str] | None = None,
                class_map: dict[str, str] | None = None,
                told: bool = False) -> tuple[torch.Tensor, list[str], list[str]]:
    """Labels [N], names of the class folders and relative paths [N] of the images <folder>/<class>/<id>.png.
    classes: of a data set, which the labels are to number (default: the folders as they are sorted)
    class_map: {folder: class} where they are named otherwise; told: say what is passed over"""
    folder = Path(folder)
    files, labels, found, passed = list_images(folder)
    for line in not_read({kind: [len(paths), *paths[:1]] for kind, paths in passed.items() if told}):
        print_rank0(line)
    if classes is not None:
        numbers = class_numbers(found, classes, folder, class_map)
        labels = [numbers[label] for label in labels]
    return torch.tensor(labels), found, [Path(file).relative_to(folder).as_posix() for file in files]


def check_count(labels: torch.Tensor, ipc: int, folder: Path) -> None:
    """Images of other origin are --ipc a class."""
    counts = torch.bincount(labels)
    if not counts.min() <= ipc <= counts.max():
        there = f"{counts.min()} to {counts.max()}" if counts.min() < counts.max() else f"{counts.min()}"
        fail(f"--images {folder} has {there} images a class, not --ipc {ipc}; name --ipc {counts.max()}")
    if counts.min() < counts.max():
        warn(f"--images {folder} has {counts.min()} to {counts.max()} images a class")


def load_folder(folder: str | Path, image_size: int, workers: int = 0, classes: list[str] | None = None,
                class_map: dict[str, str] | None = None) -> tuple[torch.Tensor, torch.Tensor, list, list]:
    """Distilled images: uint8 [N, 3, S, S], and the three of `list_folder`."""
    labels, found, files = list_folder(folder, classes, class_map, told=True)
    paths = [str(Path(folder) / file) for file in files]
    return read_images(paths, image_size, image_size, workers, white_levels(paths)), labels, found, files
