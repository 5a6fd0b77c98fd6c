"""The soft-label files of a run: relabel.py writes them, train_eval.py and other training loops read them.

One row for each mixed sample; sample i of an epoch is image i under crop[i] and flip[i], with the box, or by
mixup a share, of image p = partner[i] under crop[p] and flip[p]. utils/README.md makes it in numpy.

    logits.npy     float16 [epochs, N, classes]   mean of the teachers' logits of the mixed sample, Eq. 8
    crop.npy       int16 [epochs, N, 4]           top, left, height, width in pixels: the crop of image i
    flip.npy       bool [epochs, N]               whether image i is mirrored
    partner.npy    int32 [epochs, N]              the image that is mixed in
    box.npy        int16 [epochs, N, 4]           top, left, height, width of CutMix's box
    ratio.npy      float32 [epochs, N]            the share of image i
    result.json    classes, mean and std of the pixels, arguments, hashes
"""
import argparse
import json
import os
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from utils.augment import apply_epoch, draw_epoch
from utils.data import load_folder, read_class_map
from utils.files import whole_file, writable
from utils.losses import ensemble_logits
from utils.provenance import image_set
from utils.run import generator, send
from utils.train import full_batch

DRAWN = {"crop": (np.int16, (4,)), "flip": (np.bool_, ()), "partner": (np.int32, ()), "box": (np.int16, (4,)),
         "ratio": (np.float32, ())}                     # {name: (dtype, shape of a mixed sample's row)}


class LabelWriter:
    """The label files of `epochs` epochs of `count` images. One process calls `create`, then any writes any
    epoch, and one moves the finished files. No row goes through a memory map: its pages count as the
    process's own, and a full disk kills the process."""

    def __init__(self, folder, epochs, count, classes):
        kinds = {"logits": (np.float16, (classes,)), **DRAWN}
        self.files = {key: (Path(folder, f"{key}.npy"), np.dtype(dtype), (epochs, count, *row))
                      for key, (dtype, row) in kinds.items()}

    def create(self) -> None:
        """All zeros, which take no room on the disk."""
        for path, dtype, shape in self.files.values():
            with whole_file(path) as temporary:
                np.lib.format.open_memmap(temporary, "w+", dtype, shape)

    def write(self, epoch: int, logits: Tensor, draw: dict[str, Tensor]) -> None:
        """logits: [N, classes]; draw: from `draw_epoch`"""
        for key, (path, dtype, shape) in self.files.items():
            rows = np.ascontiguousarray((logits if key == "logits" else draw[key]).numpy(), dtype)
            with writable(path), open(path, "r+b") as file:
                file.seek((epoch - shape[0]) * rows.nbytes, os.SEEK_END)     # epochs end the file
                file.write(rows)

    def sync(self) -> None:
        """What is written stays after a power cut."""
        for path, _, _ in self.files.values():
            with writable(path), open(path, "r+b") as file:
                os.fsync(file.fileno())

    def move(self, folder: Path) -> None:
        for path, _, _ in self.files.values():
            with writable(folder), suppress(FileNotFoundError):      # moved already, before a kill
                os.replace(path, Path(folder, path.name))


def draw_labels(args: argparse.Namespace, size: int, count: int, epoch: int) -> dict[str, Tensor]:
    """`draw_epoch` of `count` images of `size` pixels, by relabel.py's arguments."""
    batch_size = full_batch(count, args.whole_up_to, args.batch_size)
    return draw_epoch(count, size, batch_size, args.mix, generator("relabel", args.seed, epoch),
                      (args.crop_floor, 1.0), args.flip)


class OnlineLabels:
    """Labels made while a student trains.   draw(count, epoch): crops, flips and mixing of `count` images;
    teachers: label each mixed batch, by its own norms (Eq. 8), none for hard labels; seen: the classes whose
    logits are kept, by default all"""

    def __init__(self, draw, mix, count, teachers=(), logit_norm=True, seen=slice(None)):
        self.draw, self.mix, self.count, self.teachers, self.logit_norm, self.seen = (
            draw, mix, count, teachers, logit_norm, seen)

    def epoch(self, epoch: int) -> dict[str, Tensor]:
        return self.draw(self.count, epoch)

    @torch.no_grad()
    def soft_logits(self, epoch: int, batch: Tensor, mixed: Tensor) -> Tensor:
        """Of mixed samples [B, 3, S, S] of images `batch` [B].   -> [B, classes], [0] without teachers"""
        if not self.teachers:
            return mixed.new_zeros(0)
        logits = torch.stack([teacher(mixed) for teacher in self.teachers])
        return ensemble_logits(logits, self.logit_norm)[:, self.seen]

    def of(self, rows: Tensor, seen: Tensor) -> "tuple[Tensor, OnlineLabels]":
        """For the images `rows` (booleans [N]) and the classes `seen` alone.   -> LongTensor [n], labels"""
        rows = rows.nonzero().flatten()
        return rows, OnlineLabels(self.draw, self.mix, len(rows), self.teachers, self.logit_norm, seen)


class StoredLabels:
    """The labels in a folder: what was drawn in an epoch, and the logits of its mixed samples.
    mix: how they were mixed; used: how many of the epochs a training uses, by default all.   ValueError where
    a file is missing or damaged"""

    def __init__(self, folder, mix, used=None):
        self.mix, self.used = mix, used
        try:
            self.drawn = {key: np.load(Path(folder, f"{key}.npy"), mmap_mode="r", allow_pickle=False)
                          for key in ("logits", *DRAWN)}
        except (OSError, ValueError, EOFError) as error:
            raise ValueError(f"{folder} does not hold whole labels ({error}); run relabel.py "
                             "--overwrite") from None
        self.logits = self.drawn.pop("logits")

    def epoch(self, epoch, rows=slice(None)) -> dict[str, Tensor]:
        """What was drawn in an epoch, a number or one for each of rows, for these images: as from
        `draw_epoch`, without "order"."""
        draw = {key: torch.from_numpy(np.array(array[epoch, rows])) for key, array in self.drawn.items()}
        return {key: value.long() if key in ("crop", "partner", "box") else value
                for key, value in draw.items()}

    def soft_logits(self, epoch, batch: Tensor, mixed: Tensor) -> Tensor:
        """As stored for images `batch` [B]; mixed: for its device and dtype.   -> [B, classes]"""
        logits = torch.from_numpy(self.logits[epoch, batch.numpy()])
        return send(logits, mixed.device).to(mixed)

    def of(self, rows: Tensor, seen: Tensor) -> "tuple[Tensor, SeenLabels]":
        """As `OnlineLabels.of`."""
        labels = SeenLabels(self, self.used, rows, seen)
        return labels.rows, labels


class SeenLabels:
    """`StoredLabels` for the images `rows` (booleans [N]) and the classes `seen` alone. A sample with a
    partner outside of these images would show a later class, and its label fits only the whole mixture. So
    each image cycles through those of its first `epochs` samples whose partner is among them; an image
    without any is left out.

    self.rows: LongTensor [n], the images that are left. ValueError if none is
    """

    def __init__(self, stored, epochs, rows, seen):
        partner, rows = stored.drawn["partner"][:epochs], rows.numpy().copy()
        fits = rows[partner[:, rows]]                                # [epochs, n]: is the partner among them?
        while not fits.any(0).all():                                 # who goes is no partner any more
            rows[rows.nonzero()] = fits.any(0)
            fits = rows[partner[:, rows]]
        if not rows.any():
            raise ValueError("no stored sample of the first classes is free of classes to come; use fewer "
                             "steps, --labels online, or relabel.py with more --epochs or --mix none")
        self.stored, self.mix, self.seen = stored, stored.mix, seen
        # place [N]: the position in self.rows of each image; count [n]: how many epochs fit an image;
        # fitting [epochs, n]: all epochs, those that fit first
        self.rows, self.place = torch.from_numpy(rows.nonzero()[0]), torch.from_numpy(rows.cumsum() - 1)
        self.count, self.fitting = fits.sum(0), np.argsort(~fits, axis=0, kind="stable")

    def stored_epoch(self, epoch: int) -> np.ndarray:
        """The stored epoch that each image's sample is from.   -> [n]"""
        return self.fitting[epoch % self.count, np.arange(len(self.rows))]

    def epoch(self, epoch: int) -> dict[str, Tensor]:
        draw = self.stored.epoch(self.stored_epoch(epoch), self.rows.numpy())
        return draw | {"partner": self.place[draw["partner"]]}

    def soft_logits(self, epoch: int, batch: Tensor, mixed: Tensor) -> Tensor:
        epochs = self.stored_epoch(epoch)[batch.numpy()]
        return self.stored.soft_logits(epochs, self.rows[batch], mixed)[:, self.seen.to(mixed.device)]


class DistilledDataset(torch.utils.data.Dataset):
    """One labelled epoch of a run as a torch Dataset: what train_eval.py trains on, on a CPU to the bit.

    dataset[i] -> the mixed sample of image i, float32 [3, S, S], normalised; the teachers' logits, float32
    [classes]; the class of image i (y of Eq. 11), int. The mixing is part of the stored sample, so batches
    may have any size and order. `epochs` epochs are stored; `set_epoch` also reaches DataLoader workers that
    are alive. ValueError where labels or images are missing or damaged, or do not belong together.

    run: a folder such as runs/cifar10/gvbsm-ipc10; images: by default the folder that was labelled
    """

    def __init__(self, run: str | Path, epoch: int = 0, images: str | Path | None = None):
        self.folder = Path(run, "labels")
        try:
            result = json.loads((self.folder / "result.json").read_text())
            self.mix, data, hashes = result["args"]["mix"], result["data"], result["made_from"]
            images = Path(images or result["args"].get("images") or Path(run, "images"))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{self.folder} holds no finished labels ({error}); run relabel.py") from None
        try:
            class_map = read_class_map(result["args"].get("class_map"))
            found = load_folder(images, data["image_size"], 0, data["classes"], class_map)
        except SystemExit:
            raise ValueError(f"{images} cannot be read, for the reason on stderr") from None
        self.images, number, _, files = found
        if image_set(images, files) != hashes["images"]:
            raise ValueError(f"{self.folder} was made for other images than {images}; run relabel.py "
                             "--overwrite")
        self.classes, self.targets = data["classes"], number.tolist()
        self.mean_std = torch.tensor([data["mean"], data["std"]])
        self.labels = StoredLabels(self.folder, self.mix)
        self.epochs, self.epoch = len(self.labels.logits), torch.tensor(0).share_memory_()
        self.set_epoch(epoch)

    def set_epoch(self, epoch: int) -> None:
        """Choose the labelled epoch, 0 .. epochs - 1."""
        if not 0 <= epoch < self.epochs:
            raise ValueError(f"epoch {epoch} is not among the {self.epochs} in {self.folder}; use epoch % "
                             f"{self.epochs}")
        self.epoch.fill_(epoch)

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        return self.__getitems__([range(len(self))[i]])[0]           # -1 is the last; IndexError beyond

    def __getitems__(self, rows):
        """Several samples at once, for a DataLoader."""
        epoch, rows = self.epoch.item(), list(map(int, rows))
        if self.labels is None:                                      # in a worker that was not forked
            self.labels = StoredLabels(self.folder, self.mix)
        batch = torch.tensor(rows)
        # an image of `rows` and its partner are len(rows) places apart
        pairs = torch.cat([batch, torch.from_numpy(self.labels.drawn["partner"][epoch, rows])])
        draw = self.labels.epoch(epoch, pairs.numpy())
        draw["partner"] = torch.arange(len(pairs)).roll(-len(rows))
        mixed = apply_epoch(self.images[pairs], draw, torch.arange(len(rows)), self.mix, self.mean_std)
        logits = self.labels.soft_logits(epoch, batch, mixed)
        return [(mixed[i], logits[i], self.targets[row]) for i, row in enumerate(rows)]

    def __getstate__(self):
        return self.__dict__ | {"labels": None}          # a copied memory map holds the whole file
