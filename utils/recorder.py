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
    """Images while they are optimised, and when they are done: for each pass `begin`, `step` after every
    iteration, `write`; at the end `finish`.   run: a `Run` at work, with a progress line"""

    def __init__(self, run, data, log=True):
        folder, ipc = run.result.parent, run.args.ipc
        self.run, self.data, self.ipc, self.images = run, data, ipc, folder / "images"
        self.log = Log(folder, {"args": relevant(run.args)}) if log else None
        self.grid = Grid(folder / "grid.png", len(data["classes"]), ipc, data["image_size"])

    def file(self, label: int, index: int) -> Path:
        return self.images / folder_name(self.data["classes"][label]) / f"{index:05d}.png"

    def load_existing(self, batches: list[list[tuple[int, int]]]) -> bool:
        """Whether all these images exist; brings those that do into the picture."""
        files = {key: self.file(*key) for batch in batches for key in batch}
        found = [key for key, path in files.items() if path.exists()]
        for key in self.grid.images.keys() & found:
            self.grid.add([key], read_images([files[key]], *2 * [self.data["image_size"]], workers=0))
        return len(found) == len(files)

    def begin(self, numbers: list[int], batches: list[list[tuple[int, int]]], iterations: int,
              backbones: list[str] | None = None) -> dict | None:
        """numbers: of the batches [(class, index), ...] optimised together; backbones: by iteration
        -> saved state, or None"""
        self.numbers, self.iterations, self.backbones = numbers, iterations, backbones
        self.keys = [key for batch in batches for key in batch]
        self.piece, self.nonfinite = f"batch{numbers[0]}", None
        state = self.run.checkpoint.read(self.piece)
        if not state or state["numbers"] != numbers:                 # another --groups-per-step
            return None
        self.run.progress.skip(len(numbers) * state["iterations"])
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
            means = {name: value.item() / len(self.numbers) for name, value in losses.items()}
            self.log.write({"iteration": t, "batches": self.numbers, **backbone, **means})
        if t % GRID_EVERY == 0:
            self.show(images)
        first, count = next(iter(losses)), len(self.numbers)
        batch = f"batch {self.numbers[0]}" + f"-{self.numbers[-1]}" * (count > 1)

        def checked():
            self.check()
            return state() | {"numbers": self.numbers}

        self.run.step(checked, self.piece, lambda: f"{batch}  {first} {losses[first].item() / count:.3f}",
                      count)

    def check(self) -> None:
        if found := self.nonfinite.first():
            t, term = found
            backbone = f" backbone {self.backbones[t]}," if self.backbones else ""
            fail(f"{term} is not finite in iteration {t},{backbone} batches {self.numbers}; use a smaller "
                 "--lr")

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

    def keep(self, images: dict[tuple[int, int], Tensor]) -> None:
        """Write images that stay as they are.   images: {(class, index): normalised [3, S, S]}"""
        for key, image in images.items() if rank() == 0 else ():
            image = to_uint8(image[None], self.data["mean"], self.data["std"])
            save_png(self.file(*key), image[0])
            self.grid.add([key], image)

    def copy(self, split: Split, chosen: list[Tensor]) -> None:
        """Write the chosen real images of a split, class by class.   chosen: [LongTensor [ipc]]"""
        self.run.start(len(chosen), "classes")
        for label, rows in enumerate(chosen):
            keys, images = [(label, index) for index in range(len(rows))], split.read(rows)
            for key, image in zip(keys, images):
                save_png(self.file(*key), image)
            self.grid.add(keys, images)
            # no state: choosing again is quick
            self.run.step(lambda: {}, text=lambda: self.data["classes"][label])

    def finish(self, records: dict[str, dict], statistics: dict[str, dict]) -> dict | None:
        """When all processes are done: one log, one picture of all their images, and the result file.
        records, statistics: {backbone: what is stored}"""
        barrier()
        if rank():
            return None
        keys = [(label, index) for label in range(len(self.data["classes"])) for index in range(self.ipc)]
        if self.log:
            self.log.merge()
        if world_size() > 1:                                         # those of other processes
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
        self.path, self.columns, rows = path, min(ipc, 10), min(num_classes, 20)
        self.images = {(i * num_classes // rows, index): torch.full((3, size, size), 0.5)
                       for i in range(rows) for index in range(self.columns)}

    def add(self, keys: list[tuple[int, int]], images: Tensor) -> None:
        """keys: list of (class, index), images uint8 [B, 3, S, S]."""
        for key, image in zip(keys, images):
            if key in self.images:
                self.images[key] = image.cpu().float() / 255

    def save(self) -> None:
        if rank() == 0:
            from torchvision.utils import save_image              # late, slow to import
            with whole_file(self.path) as temporary:
                save_image(list(self.images.values()), temporary, nrow=self.columns, format="png")


class Log:
    """log.jsonl in the folder of a run: `first`, and a line for each entry, which has "batches" and
    "iteration". Each process writes into a file of its own; `merge`, first and last, makes one of all."""

    def __init__(self, folder, first):
        self.folder, self.first = folder, first
        self.path = folder / f"log{f'-{rank()}' if rank() else ''}.jsonl"
        if rank() == 0:
            self.merge()

    def write(self, entry: dict) -> None:
        with writable(self.path), open(self.path, "a") as file:
            file.write(json.dumps(entry) + "\n")

    def merge(self) -> None:
        found = logged(self.folder)
        with whole_file(self.path) as temporary:
            entries = [self.first, *(found[key] for key in sorted(found))]
            temporary.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
        for path in self.folder.glob("log-*.jsonl"):
            path.unlink()


def logged(folder: Path) -> dict[tuple[int, int], dict]:
    """{(first batch, iteration): entry} of a run's logs. Of entries that were logged again after a kill one
    stays; a line that it cut short goes."""
    found = {}
    for path in sorted(folder.glob("log*.jsonl")):
        for line in path.read_text(errors="replace").splitlines():
            with suppress(ValueError, KeyError, TypeError, IndexError):      # `Log.first`, or cut short
                entry = json.loads(line)
                found[entry["batches"][0], entry["iteration"]] = entry
    return found
