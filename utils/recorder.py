"""What one sees of images while recover.py makes them: log.jsonl, grid.png, progress and their files."""
import json
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from utils import fail
from utils.augment import to_uint8
from utils.data import Split, folder_name, read_images
from utils.files import whole_file, writable
from utils.processes import barrier, rank, world_size
from utils.provenance import image_set, relevant
from utils.train import NonFinite

GRID_EVERY = 500                                                     # iterations between two pictures


class Recorder:
    """Images while they are optimised, and when they are done.

    recorder = Recorder(run, folder, data, ipc)
    state = recorder.begin(numbers, batches, iterations)             # of unfinished work, or None
    for t, losses, state in recover_batch(..., resume=state):
        recorder.step(t, losses, images, state)                      # log, picture, progress, saved state
    recorder.write(images)                                           # the files
    recorder.finish(records, statistics)                             # result.json

    run: a `Run` at work, with a progress line; batches: lists of (class, index)
    """

    def __init__(self, run, folder, data, ipc, log=True):
        self.run, self.data, self.ipc, self.images = run, data, ipc, folder / "images"
        self.log = Log(folder, {"args": relevant(run.args)}) if log else None
        self.grid = Grid(folder / "grid.png", len(data["classes"]), ipc, data["image_size"])

    def file(self, label: int, index: int) -> Path:
        return self.images / folder_name(self.data["classes"][label]) / f"{index:05d}.png"

    def load_existing(self, batches: list[list[tuple[int, int]]]) -> bool:
        """Whether all these images exist; brings those that do into the picture."""
        files = {key: self.file(*key) for batch in batches for key in batch}
        found = {key: path for key, path in files.items() if path.exists()}
        for key, path in found.items():
            if self.grid.place(*key):
                self.grid.add([key], read_images([path], *2 * [self.data["image_size"]], workers=0))
        return len(found) == len(files)

    def begin(self, numbers: list[int], batches: list[list[tuple[int, int]]], iterations: int,
              backbones: list[str] | None = None) -> dict | None:
        """numbers: of the batches optimised together; backbones: by iteration   -> saved state, or None"""
        self.numbers, self.iterations, self.backbones = numbers, iterations, backbones
        self.keys = [key for batch in batches for key in batch]
        self.piece, self.nonfinite = f"batch{numbers[0]}", None
        state = self.run.checkpoint.read(self.piece)
        if state and state["numbers"] != numbers:                    # another --groups-per-step
            state = None
        self.run.progress.skip(len(numbers) * state["iterations"] if state else 0)
        return state

    def step(self, t: int, losses: dict[str, Tensor], images: Tensor, state: Callable) -> None:
        """Iteration t: losses, sums over the batches; images [G, B, 3, S, S]; state(): to resume from."""
        finite = [name for name in losses if name not in ("gradient", "kept")]  # these follow from the rest
        self.nonfinite = self.nonfinite or NonFinite([*finite, "pixel"], images.device)
        self.nonfinite.update(t, *(losses[name] for name in finite), images.detach().sum())
        every = max(1, self.iterations // 100)
        if t % every == 0 or t + 1 == self.iterations:
            self.check()
            backbone = {"backbone": self.backbones[t]} if self.backbones else {}
            self.log.write({"iteration": t, "batches": self.numbers, **backbone,
                            **{name: value.item() / len(self.numbers) for name, value in losses.items()}})
        if t % GRID_EVERY == 0:
            self.show(images)
        first = next(iter(losses))
        self.run.step(lambda: f"batch {self.numbers[0]}{f'-{self.numbers[-1]}' * (len(self.numbers) > 1)}  "
                      f"{first} {losses[first].item() / len(self.numbers):.3f}", lambda: self.checked(state),
                      self.piece, len(self.numbers))

    def check(self) -> None:
        if found := self.nonfinite.first():
            t, term = found
            backbone = f" backbone {self.backbones[t]}," if self.backbones else ""
            fail(f"{term} is not finite in iteration {t},{backbone} batches {self.numbers}; use a smaller "
                 "--lr")

    def checked(self, state: Callable) -> dict:
        self.check()
        return state() | {"numbers": self.numbers}

    def show(self, images: Tensor) -> Tensor:
        """Bring images [G, B, 3, S, S] into the picture.   -> uint8 [G*B, 3, S, S]"""
        images = to_uint8(images.flatten(0, 1), self.data["mean"], self.data["std"])
        self.grid.add(self.keys, images)
        self.grid.save()
        return images

    def write(self, images: Tensor) -> None:
        """Save the finished images [G, B, 3, S, S]; their state is not needed any more."""
        for key, image in zip(self.keys, self.show(images)):
            save_png(self.file(*key), image)
        self.run.checkpoint.drop(self.piece)

    def copy(self, split: Split, chosen: list[Tensor]) -> None:
        """Write the chosen real images of a split, class by class.   chosen: [LongTensor [ipc]]"""
        self.run.start(len(chosen), "classes")
        for label, rows in enumerate(chosen):
            keys, images = [(label, index) for index in range(len(rows))], split.read(rows)
            for key, image in zip(keys, images):
                save_png(self.file(*key), image)
            self.grid.add(keys, images)
            self.run.step(self.data["classes"][label], dict)         # no state: choosing again is quick

    def finish(self, records: dict[str, dict], statistics: dict[str, dict]) -> dict | None:
        """When all processes are done: one log, one picture of all their images, and the result file.
        records, statistics: {backbone: what is stored}"""
        barrier()
        if rank():
            return None
        keys = [(label, index) for label in range(len(self.data["classes"])) for index in range(self.ipc)]
        if self.log:
            self.log.merge()
        if world_size() > 1:
            self.load_existing([keys])
        self.grid.save()
        files = [self.file(*key).relative_to(self.images).as_posix() for key in keys]
        metrics = {"images": len(files), "classes": self.data["classes"],
                   "image_set": image_set(self.images, files)}
        if records:
            metrics["teacher_top1"] = {name: record["top1"] for name, record in records.items()}
        upstream = {phase: {name: one.get("args") for name, one in stored.items()}
                    for phase, stored in (("squeeze", records), ("collect_stats", statistics)) if stored}
        summary = f"{len(files)} images of {len(self.data['classes'])} classes"
        return self.run.finish(metrics, summary, upstream)


def save_png(path: Path, image: Tensor) -> None:
    """image: uint8 [3, S, S]."""
    with whole_file(path) as temporary:
        Image.fromarray(image.permute(1, 2, 0).cpu().numpy()).save(temporary, format="png")


class Grid:
    """grid.png: a row for each of up to 20 classes with up to 10 of its images; grey where none is yet."""

    def __init__(self, path, num_classes, ipc, size):
        self.path, self.columns = path, min(ipc, 10)
        self.rows = [i * num_classes // min(num_classes, 20) for i in range(min(num_classes, 20))]
        self.images = torch.full((len(self.rows), self.columns, 3, size, size), 0.5)

    def place(self, label: int, index: int) -> tuple[int, int] | None:
        """Row and column of an image, None where it is not shown."""
        return (self.rows.index(label), index) if label in self.rows and index < self.columns else None

    def add(self, batch: list[tuple[int, int]], images: Tensor) -> None:
        """batch: list of (class, index), images uint8 [B, 3, S, S]."""
        for key, image in zip(batch, images):
            if place := self.place(*key):
                self.images[place] = image.cpu().float() / 255

    def save(self) -> None:
        if rank() == 0:
            from torchvision.utils import save_image              # late, slow to import
            with whole_file(self.path) as temporary:
                save_image(self.images.flatten(0, 1), temporary, nrow=self.columns, format="png")


class Log:
    """log.jsonl in the folder of a run: `first`, and a line for each entry, which has "batches" and
    "iteration"; what was logged before a restart is not logged again. Each process writes into a file of its
    own until they are merged."""

    def __init__(self, folder, first):
        self.folder, self.first = folder, first
        self.path = folder / f"log{f'-{rank()}' if rank() else ''}.jsonl"
        self.written = self._entries("log*.jsonl")
        self._write_whole(self._entries(self.path.name))             # without a line that a kill cut short

    def write(self, entry: dict) -> None:
        if (entry["batches"][0], entry["iteration"]) not in self.written:
            with writable(self.path), open(self.path, "a") as file:
                file.write(json.dumps(entry) + "\n")

    def merge(self) -> None:
        self._write_whole(self._entries("log*.jsonl"))
        for path in self.folder.glob("log-*.jsonl"):
            path.unlink()

    def _entries(self, files):
        found = {}
        for path in self.folder.glob(files):
            for line in path.read_text(errors="replace").splitlines():
                with suppress(ValueError, KeyError, TypeError, IndexError):  # `first`, or what was cut short
                    entry = json.loads(line)
                    found[entry["batches"][0], entry["iteration"]] = line
        return found

    def _write_whole(self, entries):
        with whole_file(self.path) as temporary:
            lines = [json.dumps(self.first), *(entries[key] for key in sorted(entries))]
            temporary.write_text("".join(f"{line}\n" for line in lines))
