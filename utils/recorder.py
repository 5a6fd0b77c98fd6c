"""What one sees of images while recover.py makes them: log.jsonl, grid.png, the progress line, and their
files."""
import json
from contextlib import suppress

import torch
from PIL import Image
from torchvision.utils import save_image

from utils import fail
from utils.augment import to_uint8
from utils.checkpoint import whole_file, writable
from utils.data import folder_name, read_images
from utils.processes import barrier, rank, world_size
from utils.provenance import relevant
from utils.train import NonFinite

GRID_EVERY = 500                                                     # iterations between two pictures


class Recorder:
    """Images while they are optimised, and when they are done.

    recorder = Recorder(run, folder, data, ipc)
    state = recorder.begin(batch, members, iterations)               # of unfinished work, or None
    for t, losses, state in recover_batch(..., resume=state):
        recorder.step(t, losses, images, state)                      # log, picture, progress, saved state
    recorder.write(images)                                           # the files
    recorder.close()

    run: a `Run` at work, with a progress line; members: [(class, index)] of the images
    """

    def __init__(self, run, folder, data, ipc, log=True):
        self.run, self.data, self.images = run, data, folder / "images"
        self.log = Log(folder, {"args": relevant(run.args)}) if log else None
        self.grid = Grid(folder / "grid.png", len(data["classes"]), ipc, data["image_size"])

    def file(self, label, index):
        return image_path(self.images, self.data, label, index)

    def existing(self, members):
        """Whether all these images exist; those that do are in the picture."""
        files = {member: self.file(*member) for member in members}
        found = {member: path for member, path in files.items() if path.exists()}
        self.grid.read(found)
        return len(found) == len(files)

    def begin(self, batches, members, iterations, backbones=None):
        """batches: numbers of the image batches that are optimised together; backbones: names by iteration
        -> the saved state of the same batches, or None"""
        self.batches, self.members, self.iterations, self.backbones = batches, members, iterations, backbones
        self.piece, self.nonfinite = f"batch{batches[0]}", None
        state = self.run.checkpoint.read(self.piece)
        if state and state["numbers"] != batches:                    # another --groups-per-step
            state = None
        self.run.progress.skip(len(batches) * state["iterations"] if state else 0)
        return state

    def step(self, t, losses, images, state):
        """Iteration t: losses {name: scalar tensor, sum over the batches}; images [G, B, 3, S, S]; state():
        to resume from."""
        finite = [name for name in losses if name not in ("gradient", "kept")]
        self.nonfinite = self.nonfinite or NonFinite([*finite, "pixel"], images.device)
        self.nonfinite.update(t, *(losses[name] for name in finite), images.detach().sum())
        every = max(1, self.iterations // 100)
        if t % every == 0 or t + 1 == self.iterations:
            self.check()
            backbone = {"backbone": self.backbones[t]} if self.backbones else {}
            self.log.write({"iteration": t, "batches": self.batches, **backbone,
                            **{name: value.item() / len(self.batches) for name, value in losses.items()}})
        if t % GRID_EVERY == 0:
            self.show(to_uint8(images.flatten(0, 1), self.data["mean"], self.data["std"]))
        first = next(iter(losses))
        self.run.step(lambda: f"batch {'-'.join(map(str, dict.fromkeys((self.batches[0], self.batches[-1]))))}  "
                      f"{first} {losses[first].item() / len(self.batches):.3f}", lambda: self.checked(state),
                      self.piece, len(self.batches))

    def check(self):
        if found := self.nonfinite.first():
            t, term = found
            backbone = f" backbone {self.backbones[t]}," if self.backbones else ""
            fail(f"{term} is not finite in iteration {t},{backbone} batches {self.batches}; use a smaller "
                 f"--lr")

    def checked(self, state):
        self.check()
        return state() | {"numbers": self.batches}

    def show(self, images):
        self.grid.add(self.members, images)
        self.grid.save()

    def write(self, images):
        """Save the finished images [G, B, 3, S, S]; their state is not needed any more."""
        images = to_uint8(images.flatten(0, 1), self.data["mean"], self.data["std"])
        for member, image in zip(self.members, images):
            save_png(self.file(*member), image)
        self.run.checkpoint.drop(self.piece)
        self.show(images)

    def write_real(self, label, images):
        """Save the chosen images [ipc, 3, S, S], uint8, of a class."""
        for index, image in enumerate(images):
            save_png(self.file(label, index), image)
        self.grid.add([(label, index) for index in range(len(images))], images)

    def close(self, members=()):
        """When all processes are done: one log, and one picture with the images of all, `members`."""
        barrier()
        if rank() == 0:
            self.log.merge()
            if world_size() > 1:
                self.existing(members)
            self.grid.save()


def image_path(folder, data, label, index):
    return folder / folder_name(data["classes"][label]) / f"{index:05d}.png"


def save_png(path, image):
    """image: uint8 [3, S, S]."""
    with whole_file(path) as temporary:
        Image.fromarray(image.permute(1, 2, 0).cpu().numpy()).save(temporary, format="png")


class Grid:
    """grid.png: a row for each of up to 20 classes with up to 10 of its images; grey where there is none
    yet."""

    def __init__(self, path, num_classes, ipc, size):
        self.path, self.columns = path, min(ipc, 10)
        self.rows = [i * num_classes // min(num_classes, 20) for i in range(min(num_classes, 20))]
        self.images = torch.full((len(self.rows), self.columns, 3, size, size), 0.5)

    def add(self, batch, images):
        """batch: list of (class, index), images uint8 [B, 3, S, S]."""
        for (label, index), image in zip(batch, images):
            if label in self.rows and index < self.columns:
                self.images[self.rows.index(label), index] = image.cpu().float() / 255

    def read(self, files):
        """The same, of {(class, index): file}."""
        for (label, index), file in files.items():
            if label in self.rows and index < self.columns:
                self.add([(label, index)], read_images([file], *2 * self.images.shape[-1:], workers=0))

    def save(self):
        if rank() == 0:
            with whole_file(self.path) as temporary:
                save_image(self.images.flatten(0, 1), temporary, nrow=self.columns, format="png")


class Log:
    """log.jsonl in the folder of a run: `first`, and a line for each entry, which has "batches" and
    "iteration"; none twice, whatever an earlier process wrote. Each process writes into a file of its own
    until they are merged."""

    def __init__(self, run, first):
        self.run, self.first, self.path = run, first, run / f"log{f'-{rank()}' if rank() else ''}.jsonl"
        self.written = self._entries("log*.jsonl")
        self._write_whole(self._entries(self.path.name))

    def write(self, entry):
        if (entry["batches"][0], entry["iteration"]) not in self.written:
            with writable(self.path), open(self.path, "a") as file:
                file.write(json.dumps(entry) + "\n")

    def merge(self):
        self._write_whole(self._entries("log*.jsonl"))
        for path in self.run.glob("log-*.jsonl"):
            path.unlink()

    def _entries(self, files):
        found = {}
        for path in self.run.glob(files):
            for line in path.read_text(errors="replace").splitlines():
                with suppress(ValueError, KeyError, TypeError, IndexError):  # `first`, or what was cut short
                    entry = json.loads(line)
                    found[entry["batches"][0], entry["iteration"]] = line
        return found

    def _write_whole(self, entries):
        with whole_file(self.path) as temporary:
            lines = [json.dumps(self.first), *(entries[key] for key in sorted(entries))]
            temporary.write_text("".join(f"{line}\n" for line in lines))
