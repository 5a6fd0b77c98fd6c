"""The data sets: one table, and loading into uint8 tensors.  Up to 64 pixels in memory, above streamed from the files.

Layouts, in the order they are looked for (nothing is downloaded unless asked):
    shapes                               drawn here, no file
    <data_dir>/<name>/train/<class>/     with val/ or test/ beside it (val/ if both): torchvision's ImageFolder
    <data_dir>/cifar-10-batches-py, cifar-100-python, tiny-imagenet-200      as their authors publish them
    any other folder with train/ and val/ or test/ in it
Classes are numbered by their sorted names everywhere, images of a class by their sorted file names.
"""
import os
import re
import signal
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader
from torchvision.datasets import CIFAR10, CIFAR100, ImageFolder
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.datasets.utils import download_and_extract_archive
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as TF

from utils import fail

DATASETS = {  # mean and std of the training pixels on the 0..1 scale; patch: side of the patches of Eq. 9, in pixels
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
CIFAR = {"cifar10": CIFAR10, "cifar100": CIFAR100}
ARCHIVES = {"cifar10": CIFAR10.base_folder, "cifar100": CIFAR100.base_folder, "tiny": "tiny-imagenet-200"}
TINY_URL, TINY_MD5 = "http://cs231n.stanford.edu/tiny-imagenet-200.zip", "90528d7ca1a48142e341f4ef8d21d0de"

SHAPES = {  # class -> distance of the point (x, y) from the outline, negative inside; about 1 from centre to rim
    "bar": lambda x, y: np.maximum(abs(x) - 1, abs(y) - 0.3),
    "circle": lambda x, y: np.hypot(x, y) - 0.85,
    "crescent": lambda x, y: np.maximum(np.hypot(x, y) - 0.95, 0.8 - np.hypot(x - 0.5, y)),
    "cross": lambda x, y: np.maximum(np.minimum(abs(x), abs(y)) - 0.25, np.maximum(abs(x), abs(y)) - 0.95),
    "hourglass": lambda x, y: np.maximum(abs(x) - 0.85, 0.7 * (abs(y) - abs(x)) - 0.08),
    "ring": lambda x, y: abs(np.hypot(x, y) - 0.75) - 0.2,
    "semicircle": lambda x, y: np.maximum(np.hypot(x - 0.4, y) - 1, -x),
    "square": lambda x, y: np.maximum(abs(x), abs(y)) - 0.75,
    "star": lambda x, y: 0.7 * (np.hypot(x, y) - 0.68 - 0.3 * np.cos(5 * np.arctan2(y, x))),
    "triangle": lambda x, y: np.maximum(x, abs(y) * 0.75 ** 0.5 - x / 2) - 0.5,
}


def draw_shape(outline, count, rng):
    """uint8 [count, 32, 32, 3]: one bright shape, turned, moved, scaled, on stripes, among strokes, blobs and noise."""
    row, column = np.mgrid[-15.5:16, -15.5:16].astype(np.float32)

    def draw(low, high, *shape):
        return rng.uniform(low, high, (count, 1, 1, *shape)).astype(np.float32)

    def place(spread):                  # the pixels' coordinates in a frame turned and moved at random, [count, 32, 32]
        angle, x, y = draw(0, 2 * np.pi), column - draw(-spread, spread), row - draw(-spread, spread)
        return x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle)

    def stripes():
        return draw(0, 0.15, 3) * np.sin(draw(0.3, 2) * place(16)[0])[..., None]

    def paint(distance, colour):        # distance in pixels: the rim is one pixel wide
        np.add(canvas, (0.5 - distance).clip(0, 1)[..., None] * (colour - canvas), out=canvas)

    ground = draw(0, 0.5, 3)
    canvas = ground + stripes()
    for _ in range(2):
        along, across = place(16)
        paint(np.maximum(abs(across) - 1, abs(along) - draw(4, 16)), draw(0, 1, 3))
    radius, (x, y) = draw(9, 13), place(3)
    paint(outline(x / radius, y / radius) * radius, ground + draw(0.25, 0.5, 3) + stripes())
    for _ in range(2):
        paint(np.hypot(*place(16)) - draw(1, 3), draw(0, 1, 3))
    canvas += 0.08 * rng.standard_normal(canvas.shape, dtype=np.float32)
    return np.rint(canvas.clip(0, 1) * 255).astype(np.uint8)


def draw_shapes(split):
    """The data set `shapes`, always the same: 500 images a class to train, 100 to test.   -> images, labels"""
    hundreds = {"train": range(5), "test": range(5, 6)}[split]      # a hundred at a time: so they stay in the cache
    images = [draw_shape(outline, 100, np.random.default_rng((label, hundred)))
              for label, outline in enumerate(SHAPES.values()) for hundred in hundreds]
    return np.concatenate(images), np.repeat(np.arange(len(SHAPES)), 100 * len(hundreds))


class UnreadableImage(Exception):
    """A file that is no image, or a damaged one, or one of too many pixels."""


@contextmanager
def unreadable_fails():
    try:
        yield
    except UnreadableImage as error:
        fail(error)


@contextmanager
def opened(path):
    """PIL's lazy image of a file; UnreadableImage."""
    try:
        with Image.open(path) as image:
            yield image
    except Exception as error:          # a decoder may raise anything on a damaged file
        raise UnreadableImage(f"{path} cannot be read as an image ({error}): replace or remove it") from error


def rgb_image(source):
    """PIL image in RGB of a file, or of uint8 [H, W, 3].  Behind transparent pixels lies white."""
    if isinstance(source, np.ndarray):
        return Image.fromarray(source)
    with opened(source) as image:
        if image.mode.startswith("I"):  # 16-bit grey, which PIL would clip at 255
            image = Image.fromarray((np.asarray(image).clip(0, 65535) // 257).astype(np.uint8))
        elif "A" in image.getbands() or "transparency" in image.info:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return image.convert("RGB")


def fit_image(image, shorter, size):
    """uint8 [3, size, size]: the shorter side resized (bilinear, antialiased), the centre cut out."""
    return TF.pil_to_tensor(TF.center_crop(TF.resize(image, [shorter]), [size]))


def read_images(sources, shorter, size, workers):
    """uint8 [N, 3, size, size] of files or of uint8 [N, H, W, 3]; by threads, since PIL decodes without the GIL."""
    if isinstance(sources, np.ndarray) and sources.shape[1:3] == (size, size):
        return torch.from_numpy(sources).permute(0, 3, 1, 2).contiguous()
    images = torch.empty(len(sources), 3, size, size, dtype=torch.uint8)
    with unreadable_fails(), ThreadPoolExecutor(max(1, workers)) as pool:
        for i, image in enumerate(pool.map(lambda source: fit_image(rgb_image(source), shorter, size), sources)):
            images[i] = image
    return images


def end_later(worker):
    """Signals often go to all processes of a group; those that read images end ten seconds after the one that asked for
    them, which is to end its step first."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(10))


class Split:
    """Images and labels: `classes`, `labels` [N], `image_size` S, `streamed`, `images` uint8 [N, 3, S, S] (or None)."""

    def __init__(self, sources, labels, classes, image_size, workers=0):
        self.classes, self.labels, self.image_size, self.workers = classes, torch.as_tensor(labels), image_size, workers
        self.streamed = image_size > SMALL
        self.sources = sources if self.streamed else None
        self.images = None if self.streamed else read_images(sources, image_size, image_size, workers)
        self.shorter = image_size * 256 // 224      # ImageNet's customary margin: 256 pixels, of which 224 are cut out
        self.random_crop = v2.Compose([v2.RandomResizedCrop(image_size, scale=(0.08, 1)), v2.RandomHorizontalFlip()])

    def __len__(self):
        return len(self.labels)

    def to(self, device):
        """Images and labels move to the device to stay, unless they are streamed.   -> self"""
        if not self.streamed:
            self.images, self.labels = self.images.to(device), self.labels.to(device)
        return self

    def check_crop(self, crop):
        """Only images in memory can be padded and cropped in batches."""
        if self.streamed and crop != "resized":
            fail(f"--crop {crop} is for images of at most {SMALL} pixels; use --crop resized")

    def read(self, index):
        """uint8 [n, 3, S, S] of the images at index (LongTensor [n]), never augmented."""
        if not self.streamed:
            return self.images[index]
        return read_images([self.sources[i] for i in index.tolist()], self.shorter, self.image_size, self.workers)

    def batches(self, index, crop_seed=None):
        """Yields images uint8 [B, 3, S, S], labels [B].   index: a LongTensor [B] for each batch, or one number, the size
        of batches of all images in their order.

        crop_seed (0, 1, ...): streamed images go through RandomResizedCrop and a flip drawn from (crop_seed, index)
        alone, whatever the workers; torch's generators stay as they were. Images in memory come as they are.
        """
        index = torch.arange(len(self)).split(index) if isinstance(index, int) else index
        if not self.streamed:
            rows = torch.cat([torch.empty(0, dtype=torch.long), *index]).to(self.labels.device)           # a GPU waits once
            yield from ((self.images[batch], self.labels[batch]) for batch in rows.split([len(batch) for batch in index]))
            return
        loader = DataLoader(index, batch_size=None, num_workers=self.workers, generator=torch.Generator(),
                            collate_fn=partial(self._load, crop_seed),      # generator: not torch's global one
                            worker_init_fn=end_later)
        for images, labels in loader:
            if labels is None:
                break               # leaving the loop ends the workers; an exception would hold them for seconds
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
        image = rgb_image(self.sources[i])
        if crop_seed is None:
            return fit_image(image, self.shorter, self.image_size)
        with torch.random.fork_rng(devices=[]):     # torchvision's transforms draw from torch's global CPU generator
            torch.default_generator.manual_seed(int(np.random.SeedSequence((crop_seed, i)).generate_state(1)[0]))
            return TF.pil_to_tensor(self.random_crop(image))


def class_folders(folder):
    """Sorted names of the folders in a folder."""
    return sorted(entry.name for entry in os.scandir(folder) if entry.is_dir())


def image_folder(folder):
    """Files, labels and class names of <folder>/<class>/<image>."""
    try:
        found = ImageFolder(folder)
    except OSError as error:
        fail(f"{folder} is not laid out as <class>/<image>: {error}; fill or remove what is empty")
    return [path for path, _ in found.samples], found.targets, found.classes


def find_root(dataset, data_dir, download=False):
    """The folder that holds a data set: with train/ in it, or one of ARCHIVES (perhaps yet to be fetched)."""
    root = Path(data_dir, dataset) if dataset in DATASETS else Path(dataset)
    if (root / "train").is_dir():
        return root
    if dataset not in DATASETS:
        fail(f"--dataset {dataset}: no such data set or folder; name one of {', '.join(DATASETS)}, "
             f"or a folder that has train/<class>/<image> and val/")
    if dataset not in ARCHIVES:
        fail(f"--dataset {dataset}: there is no {root}/train/<class>/<image>; lay it out so or name another --data-dir")
    archive = Path(data_dir, ARCHIVES[dataset])
    if not (archive.is_dir() or download):
        fail(f"--dataset {dataset}: there is neither {root}/train/<class>/<image> nor {archive}; "
             f"name another --data-dir or fetch it with --download")
    return archive


def fetch_tiny(root):
    """Download and unpack Tiny-ImageNet as `root`, which is there only when complete."""
    root.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=root.parent) as folder:
        download_and_extract_archive(TINY_URL, folder, md5=TINY_MD5)
        os.replace(Path(folder, root.name), root)


def find_split(dataset, data_dir, split, download=False):
    """One split's images (files, or uint8 [N, H, W, 3]), labels and class names."""
    if dataset == "shapes":
        return *draw_shapes(split), list(SHAPES)
    root = find_root(dataset, data_dir, download)
    try:
        if root.name == ARCHIVES.get(dataset) and dataset in CIFAR:
            found = CIFAR[dataset](root.parent, split == "train", download=download)
            return found.data, found.targets, found.classes
        if not root.is_dir():
            fetch_tiny(root)
    except (OSError, RuntimeError) as error:    # no network, or other bytes than the authors'
        fail(f"--dataset {dataset}: {root} is damaged or cannot be fetched ({error}); remove it and use --download")
    train = root / "train"
    if split == "train":
        return image_folder(train)
    folder = next((root / name for name in ("val", "test") if (root / name).is_dir()), None)
    if folder is None:
        fail(f"{root} has train/ but neither val/ nor test/: add one with the same classes")
    annotations = folder / "val_annotations.txt"
    if annotations.is_file():                   # Tiny-ImageNet keeps file and class in a table
        rows = re.findall(r"^([^\t\n]+)\t([^\t\n]+)", annotations.read_text(), re.MULTILINE)
        rows.sort(key=lambda row: (row[1], row[0]))
        classes = sorted({name for _, name in rows})
        files = [str(folder / "images" / file) for file, _ in rows]
        labels = [classes.index(name) for _, name in rows]
    else:
        files, labels, classes = image_folder(folder)
    differing = set(classes).symmetric_difference(class_folders(train))
    if differing:
        fail(f"{root}: class {min(differing)} is in only one of train/ and {folder.name}/: add or remove it")
    return files, labels, classes


def find_size(dataset, data_dir):
    """The image size if none is asked for.  A folder's: that of its images if all are one square up to SMALL, or 224.

    Reads the headers of the training images, up to the first that decides.
    """
    if dataset in DATASETS:
        return DATASETS[dataset]["image_size"]

    def header(path):
        with opened(path) as image:
            return image.size

    train = find_root(dataset, data_dir) / "train"
    sizes = (header(os.path.join(folder, file)) for name in class_folders(train)
             for folder, _, files in os.walk(train / name, followlinks=True)
             for file in files if file.lower().endswith(IMG_EXTENSIONS))
    with unreadable_fails():
        width, height = next(sizes, (224, 224))
        return width if width == height <= SMALL and all(size == (width, height) for size in sizes) else 224


def preset_column(dataset, data_dir, image_size=None):
    """The name of DATASETS whose settings apply: its own, or for a folder the nearest in image size."""
    if dataset in DATASETS:
        return dataset
    find_root(dataset, data_dir)            # fails if it is no folder either
    size = image_size or find_size(dataset, data_dir)
    return "cifar100" if size <= 32 else "tiny" if size <= SMALL else "imagenet"


def load_split(dataset, data_dir, split, image_size=None, workers=0, download=False, holdout=False):
    """Split "train" or "test" of a named data set or of a folder, at image_size (default: find_size) pixels.
    holdout: every tenth training image of a class is "test", the others are "train", and the test set stays unread."""
    images, labels, classes = find_split(dataset, data_dir, "train" if holdout else split, download)
    if holdout:
        seen, rows = [0] * len(classes), []
        for row, label in enumerate(labels):
            seen[label] += 1
            if (seen[label] % 10 == 0) == (split == "test"):
                rows.append(row)
        if not rows:
            fail(f"--holdout: no class of --dataset {dataset} has ten training images; leave it out")
        images = images[rows] if isinstance(images, np.ndarray) else [images[row] for row in rows]
        labels = [labels[row] for row in rows]
    return Split(images, labels, classes, image_size or find_size(dataset, data_dir), workers)


def describe(dataset, data_dir, image_size=None, workers=0):
    """What the phases must know of a data set, fit for JSON: classes, image_size, mean [3], std [3], patch.

    Mean and std of a folder are those of all pixels of its training images at this size, 0..1, per channel.
    """
    size = image_size or find_size(dataset, data_dir)
    row = DATASETS[preset_column(dataset, data_dir, size)]
    classes = find_split(dataset, data_dir, "test")[2]
    if len(classes) < 2:
        fail(f"--dataset {dataset}: there is only one class, {classes[0]}; add another to tell it from")
    if dataset in DATASETS:
        mean, std = row["mean"], row["std"]
    else:
        mean, std = pixel_moments(load_split(dataset, data_dir, "train", size, workers))
    return dict(classes=classes, image_size=size, mean=list(mean), std=list(std), patch=row["patch"])


def pixel_moments(split, batch_size=256):
    """Mean and std [3] of every pixel of a split, on the 0..1 scale: exact, from a histogram of the bytes."""
    counts = sum(torch.stack([channel.flatten().bincount(minlength=256) for channel in images.unbind(1)])
                 for images, _ in split.batches(batch_size)).double()
    values, weights = torch.arange(256).double() / 255, counts / counts.sum(1, keepdim=True)
    mean = weights @ values
    variance = weights @ values ** 2 - mean ** 2
    return mean.tolist(), variance.clamp_min(1 / 255 ** 2).sqrt().tolist()      # a channel may be flat


def folder_name(name):
    """A class's name as that of a folder: what could lead elsewhere, or nowhere, is written %XX."""
    return re.sub(r'^\.|[%/\\:*?"<>|\x00-\x1f\x7f]', lambda found: f"%{ord(found[0]):02X}", name) or "%"


def list_folder(folder):
    """Labels [N], names of the class folders and relative paths [N] of the images <folder>/<class>/<id>.png."""
    folder = Path(folder).expanduser()      # as ImageFolder does
    files, labels, classes = image_folder(folder)
    return torch.tensor(labels), classes, [Path(file).relative_to(folder).as_posix() for file in files]


def load_folder(folder, image_size, workers=0):
    """Distilled images: uint8 [N, 3, S, S], and the three of `list_folder`."""
    labels, classes, files = list_folder(folder)
    paths = [Path(folder).expanduser() / file for file in files]
    return read_images(paths, image_size, image_size, workers), labels, classes, files
