"""Folders <folder>/<class>/.../<image> as people have them: what lies in them, and pixels of any mode that
Pillow reads.

Hidden files and folders (a leading dot) and those that systems leave behind are passed over; other files that
are no images are counted.
"""
import errno
import hashlib
import io
import os
import stat
import unicodedata
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError

from utils import fail
from utils.processes import warn

LEFT_BEHIND = {"__MACOSX", "@eaDir", "__pycache__", "lost+found", "$RECYCLE.BIN", "System Volume Information",
               "Thumbs.db", "desktop.ini"}
Image.init()
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)     # twice as large is an error
NO_PICTURES = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "PDF", "WMF"}
EXTENSIONS = tuple(extension for extension, name in Image.registered_extensions().items()
                   if name in Image.OPEN and name not in NO_PICTURES)
WHITES = 255, 1023, 4095, 16383, 65535          # of 8, 10, 12, 14 and 16 bits
MANY_FILES, MANY_BYTES = 100_000, 2 << 30       # up to both, every file is read once by `survey`
SAMPLE = 1000                                   # images looked at where not all are


class UnreadableImage(Exception):
    """A file that is no image, or a damaged one, or one of too many pixels."""


@contextmanager
def unreadable_fails() -> Iterator[None]:
    try:
        yield
    except UnreadableImage as error:
        fail(error)


@contextmanager
def opened(path: str | Path, content: bytes | None = None) -> Iterator[Image.Image]:
    """PIL's lazy image of a file (of its bytes, where these are given); UnreadableImage."""
    try:
        with Image.open(path if content is None else io.BytesIO(content)) as image:
            yield image
    except Exception as error:          # a decoder may raise anything on a damaged file
        why = "of no kind that Pillow knows" if isinstance(error, UnidentifiedImageError) else error
        raise UnreadableImage(f"{path} cannot be read as an image ({why}): replace or remove it") from error


def rgb_image(source, white: dict[str, int] | None = None) -> Image.Image:
    """PIL image in RGB of a file, or of uint8 [H, W, 3], turned as its EXIF tag says.  Behind transparent
    pixels lies white.

    white: {"I": value, "F": value} of `white_levels`, what is white in files of more than 8 bits; without it
    65535 and 1.
    """
    if isinstance(source, np.ndarray):
        return Image.fromarray(source)
    with opened(source) as image:
        image, mode = ImageOps.exif_transpose(image), image.mode[0]
        if mode in "IF":                # PIL would clip at 255
            values, level = np.asarray(image), (white or {}).get(mode, {"I": 65535, "F": 1}[mode])
            if not (0 <= values.min() and values.max() <= level):    # nor is any not a number
                raise ValueError(f"pixels of {values.min():g} .. {values.max():g}, where the training images "
                                 f"have 0 .. {level}")
            values = values // 257 if level == 65535 else (values * (255 / level)).round()
            image = Image.fromarray(values.astype(np.uint8))
        elif "A" in image.getbands() or "transparency" in image.info:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return image.convert("RGB")


def fit_image(image: Image.Image, shorter: int, size: int) -> torch.Tensor:
    """uint8 [3, size, size]: the shorter side resized (bilinear, antialiased), the centre cut out."""
    if image.size != (size, size) or shorter != size:
        from torchvision.transforms.v2 import functional as TF    # late, slow to import
        image = TF.center_crop(TF.resize(image, [shorter]), [size])
    return pixels(image)


def pixels(image: Image.Image) -> torch.Tensor:
    """uint8 [3, H, W] of an RGB image."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def read_images(sources, shorter: int, size: int, workers: int,
                white: dict[str, int] | None = None) -> torch.Tensor:
    """uint8 [N, 3, size, size] of files or of uint8 [N, H, W, 3]; by threads: PIL decodes without the GIL."""
    if isinstance(sources, np.ndarray) and sources.shape[1:3] == (size, size):
        return torch.from_numpy(sources).permute(0, 3, 1, 2).contiguous()
    images = torch.empty(len(sources), 3, size, size, dtype=torch.uint8)
    with unreadable_fails(), ThreadPoolExecutor(max(1, workers)) as pool:
        for i, image in enumerate(pool.map(lambda source: fit_image(rgb_image(source, white), shorter, size),
                                           sources)):
            images[i] = image
    return images


def sampled(files: list[str]) -> list[str]:
    """At most SAMPLE of the files, evenly spaced."""
    return files[::-(-len(files) // SAMPLE) or 1]


def white_levels(files: list[str], white: dict[str, int] | None = None) -> dict[str, int]:
    """What is white in the images of more than 8 bits among the files, the smallest range that holds them
    all, or `white`, that of the training images. Far darker images are a warning.
    -> {"I" (integers): 255, 1023, 4095, 16383 or 65535, "F": 1 or 255}; fails for pixels in no such range"""
    found = {"I": {}, "F": {}}                                       # {mode: {file: its own range}}
    colours = {}                                                     # {file: highest}, upper 8 of 16 bits
    for file in sampled(files):
        with suppress(UnreadableImage), opened(file) as image:       # whoever needs its pixels tells
            if (mode := image.mode[0]) in "IF":
                low, high = image.getextrema()
                levels = (1, 255) if mode == "F" else WHITES
                fitting = [level for level in levels if 0 <= low and high <= level]
                if not fitting:
                    fail(f"{file} has pixels of {low:g} .. {high:g}; write them as floats of 0 .. 1, or as "
                         f"integers of 8 to 16 bits")
                if high:                                             # a black one tells nothing
                    found[mode][file] = fitting[0]
            elif image.mode == "RGB" and ";16" in str(image.tile):
                colours[file] = max(high for _, high in image.getextrema())
    if colours and 0 < max(colours.values()) < 16:
        warn(f"{len(colours)} images of 16 bits a colour, such as {next(iter(colours))}, use at most 12 of "
             "them, and are read as nearly black; write all in the range of 16 bits, or of 8")
    white = white or {mode: max(levels.values()) for mode, levels in found.items() if levels}
    for mode, levels in found.items():
        if dark := [file for file, level in levels.items() if 16 * level <= white.get(mode, 0)]:
            warn(f"{len(dark)} images, such as {dark[0]}, have pixels of 0 .. {levels[dark[0]]} where others "
                 f"have 0 .. {white[mode]}, and are read as nearly black; write all in one range")
    return white


def visible(name: str) -> bool:
    return not name.startswith(".") and name not in LEFT_BEHIND


def class_folders(folder: Path) -> list[str]:
    """Sorted names of the visible folders in a folder."""
    return sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and visible(entry.name))


def leads_back(root: str, name: str) -> bool:
    """Whether a folder in `root` is a link to one on the way to it: a walk would go round for ever."""
    path, way = Path(root, name), [Path(root), *Path(root).parents]
    return path.is_symlink() and any(place.resolve().is_relative_to(path.resolve()) for place in way)


def walk(folder: str | Path) -> tuple[list[str], list[str], list[str]]:
    """Files below a folder, sorted as by torchvision.   -> images, others, hidden files and folders"""
    rows, hidden = [], []
    for root, folders, files in os.walk(folder, followlinks=True):
        hidden += [os.path.join(root, name) for name in folders + files if not visible(name)]
        folders[:] = [name for name in folders if visible(name) and not leads_back(root, name)]
        rows.append((root, sorted(filter(visible, files))))
    found = [os.path.join(root, file) for root, files in sorted(rows) for file in files]
    images = [file for file in found if file.lower().endswith(EXTENSIONS)]
    return images, [file for file in found if not file.lower().endswith(EXTENSIONS)], hidden


def same_letters(name: str) -> str:
    """A name with accents composed, since one system composes them and another does not."""
    return unicodedata.normalize("NFC", name)


def list_images(folder: Path,
                classes: list[str] | None = None) -> tuple[list[str], list[int], list[str], dict]:
    """Files [N], labels [N] and class names of <folder>/<class>/<image>, numbered by their sorted names or as
    `classes`, the same names, are; and what was passed over: {"hidden": [path], "other": [path]}."""
    try:
        names = class_folders(folder)
        loose, other, hidden = walk(folder) if not names else ([], [], [])
    except OSError as error:
        tensors = ", which python -m utils.convert makes of .pt and .npz files" * os.path.isfile(folder)
        fail(f"{os.path.abspath(folder)} cannot be read ({error.strerror or error}); name a folder of "
             f"<class>/<image>{tensors}")
    if not names:
        found = (f"{len(loose)} images without a folder for their class" if loose else
                 f"{len(other)} files, none of them an image")
        fail(f"{folder} is not laid out as <class>/<image>: it holds {found}; make a folder for each class")
    if "images" in names and Path(folder, "result.json").is_file():
        fail(f"{folder} is a run; name its images, {Path(folder, 'images')}")
    letters = list(map(same_letters, names))
    if twice := next((name for name in names if letters.count(same_letters(name)) > 1), None):
        fail(f"{folder} has two folders that both read {twice!r}, with accents composed and not; join them")
    beside = sorted(entry.path for entry in os.scandir(folder) if not entry.is_dir()
                    or not visible(entry.name))
    passed = {"hidden": [path for path in beside if not visible(os.path.basename(path))],
              "other": [path for path in beside if visible(os.path.basename(path))]}
    number = {same_letters(name): label for label, name in enumerate(classes or names)}
    rows = []
    for name in names:
        images, other, hidden = walk(os.path.join(folder, name))
        passed["other"], passed["hidden"] = passed["other"] + other, passed["hidden"] + hidden
        if not images:
            others = f", but {len(other)} other files such as {other[0]}" if other else ""
            fail(f"{os.path.join(folder, name)} holds no image that Pillow reads{others}; fill or remove it"
                 + ", or convert or rename them to .png or the like" * bool(other))
        rows.append((number[same_letters(name)], images))
    rows.sort(key=lambda row: row[0])
    return ([file for _, images in rows for file in images],
            [label for label, images in rows for _ in images], list(classes or names), passed)


def not_read(passed: dict[str, list]) -> list[str]:
    """A line for each kind of files that `list_images` passed over.   passed: {kind: [count, one of them]}"""
    kinds = {"hidden": "hidden", "other": "no images, or of no class"}
    return [f"not read: {count} files or folders that are {kinds[kind]}, such as {example[0]}"
            for kind, (count, *example) in passed.items() if count]


def damaged_end(path: str, content: bytes) -> bool:
    """Whether a file seems cut short, so that only decoding it tells."""
    kind, end = os.path.splitext(path)[1].lower(), content[-64:]
    mark = {".jpg": b"\xff\xd9", ".jpeg": b"\xff\xd9", ".jfif": b"\xff\xd9", ".png": b"IEND"}.get(kind)
    return mark is None or mark not in end


def look_at(path: str, whole: bool) -> tuple[tuple[int, int], bytes, bool]:
    """-> (width, height) of an image; sha256 of the file if all is read, to see that it can be decoded;
    whether it has more frames than one"""
    content = Path(path).read_bytes() if whole else None
    with opened(path, content) as image:
        if whole and damaged_end(path, content):
            image.load()
        return (image.size, hashlib.sha256(content).digest() if whole else b"",
                getattr(image, "is_animated", False))


def stamp(files: list[str], root: Path) -> str:
    """Fingerprint of the files' names, sizes and times, which is quick; of too many, of the names alone."""
    digest = hashlib.sha256()
    for file in files:
        digest.update(os.fsencode(os.path.relpath(file, root)) + b"\0")
        if len(files) <= MANY_FILES:
            status = os.stat(file)
            if not stat.S_ISREG(status.st_mode):
                raise OSError(errno.EINVAL, "no regular file", file)
            digest.update(f"{status.st_size} {status.st_mtime_ns}".encode())
    return digest.hexdigest()


def survey(files: list[str], root: Path, workers: int = 2) -> tuple[list[tuple[int, int]], str, list[bytes]]:
    """What the images of a data set are, from each file up to MANY_FILES files and MANY_BYTES, or from the
    headers of a sample. A file that cannot be read ends it.   -> [(width, height)], fingerprint of names and
    contents, else of names and sizes, above MANY_FILES of names alone; sha256 of each file where all are
    read, else []"""
    whole = len(files) <= MANY_FILES and sum(map(os.path.getsize, files)) <= MANY_BYTES
    looked_at = files if len(files) <= MANY_FILES else sampled(files)
    with unreadable_fails(), ThreadPoolExecutor(max(1, workers)) as pool:
        seen = list(pool.map(lambda file: look_at(file, whole), looked_at))
    if several := [file for file, (_, _, frames) in zip(looked_at, seen) if frames]:
        warn(f"{len(several)} images, such as {several[0]}, have several frames, of which the first is read")
    digest = hashlib.sha256()
    for i, file in enumerate(files):
        digest.update(os.fsencode(os.path.relpath(file, root)) + b"\0")
        digest.update(seen[i][1] if whole else b"" if len(files) > MANY_FILES
                      else str(os.path.getsize(file)).encode())
    return ([size for size, _, _ in seen], digest.hexdigest(),
            [content for _, content, _ in seen] if whole else [])
