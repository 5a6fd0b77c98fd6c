"""Files of tensors, and unfinished work that goes on after any kill."""
import argparse
import fcntl
import io
import os
import platform
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from pickle import UnpicklingError

import torch

from utils import fail
from utils.files import absent, load_json, reason, save_json, unfinished, whole_file, with_keys, writable
from utils.processes import barrier, rank, signals
from utils.provenance import AGAIN, check_inputs, check_same, relevant


def save_torch(path: Path, value: dict) -> None:
    buffer = io.BytesIO()                              # torch's writer raises no OSError on a full disk
    torch.save(value, buffer)
    with whole_file(path) as temporary:
        temporary.write_bytes(buffer.getbuffer())


def load_torch(path: str | Path, remedy: str, keys: Iterable[str] = ()) -> dict:
    """The dict of a checkpoint, which must have these keys. Tensors and plain values: no code runs."""
    try:
        return with_keys(torch.load(path, map_location="cpu", weights_only=True), keys)
    except FileNotFoundError:
        fail(f"{Path(path).absolute()} is {absent(path, remedy)}")
    except Exception as error:                                       # a damaged pickle may raise anything
        foreign = isinstance(error, (LookupError, UnpicklingError))
        why = "torch.save did not write it" if foreign else reason(error)
        if code := re.search(r"GLOBAL (\S+)", str(error)):
            why = f"it would run {code[1]}"
        fail(f"{path} is no whole checkpoint of plain weights ({why}); {remedy}")


def load_finished(path: Path, args: argparse.Namespace, inputs: dict | None = None,
                  settings: dict | None = None, keys: Iterable[str] = ()) -> dict | None:
    """The stored result, checked to be of these inputs and of the settings, by default all arguments that
    decide it; None where it is to be made.   keys: those that the file must have"""
    if args.overwrite or not path.exists():
        return None
    left = unfinished(path)                                          # by a kill after the last step
    with suppress(OSError), open(left / "lock", "r+") as lock:
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(left)
    load = load_json if path.suffix == ".json" else load_torch
    stored = load(path, AGAIN, ("args", *["made_from"] * (inputs is not None), *keys))
    check_same(stored["args"], settings or relevant(args), path)
    check_inputs(stored.get("made_from"), inputs or {}, path)
    return stored


class Checkpoint:
    """Unfinished work on a result. A hidden folder beside the result holds a lock, the arguments, and the
    state of each piece of the work; the folder goes when the work is done. Stops where another process is at
    work, or where the unfinished work has other arguments or inputs.

    Inside the block `load` gives a state as last saved, and `save_if_due` is called after each step; the
    result is written at the end.

    settings: compared instead of args; outputs: other files, removed when the work starts again; extends: the
    result exists and stays until a larger one replaces it
    """

    def __init__(self, result, args, inputs=None, settings=None, outputs=(), extends=False):
        self.result, self.overwrite = Path(result), args.overwrite
        self.outputs = [] if extends else [self.result, *outputs]
        self.folder = unfinished(self.result.with_stem(f"{self.result.stem}+") if extends else self.result)
        self.begun, self.period = self.folder / "begun.json", 60 * args.checkpoint_minutes
        self.identity = {"args": settings or relevant(args), "made_from": inputs or {},
                         "typed": getattr(args, "typed", [])}

    def __enter__(self):
        self.earlier, self.saved, self.entered = 0, time.monotonic(), time.monotonic()
        if rank() == 0:
            self._begin()
        signals.checkpoints += 1
        barrier()
        return self

    def _begin(self):
        old = next(filter(Path.exists, self.outputs), None)
        if old and not self.overwrite and not self.begun.exists():
            fail(f"{old} has no metadata that says how it was made, or another process has just made it; "
                 f"repeat the command, or move it away, or {AGAIN}, which removes it")
        with writable(self.result):
            self.folder.mkdir(parents=True, exist_ok=True)
            self.lock = open(self.folder / "lock", "a+")
            try:
                fcntl.lockf(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)       # unlike flock, not inherited
            except (BlockingIOError, PermissionError):
                self.lock.seek(0)
                fail(f"{self.result} is being made by process {self.lock.read()}; wait for it, or stop it")
            if self.begun.exists() and not self.overwrite:
                stored, mine = load_json(self.begun, AGAIN, ("args", "made_from")), self.identity
                check_same(stored["args"], mine["args"], self.result, stored.get("typed", ()), mine["typed"])
                check_inputs(stored["made_from"], mine["made_from"], self.result)
                self.earlier = stored.get("seconds", 0)
            else:
                for old in [self.begun, *self.folder.glob("*.pt"), *self.outputs]:
                    old.unlink(missing_ok=True)
                    with suppress(OSError):
                        old.parent.rmdir()                           # of a class that is no more
                save_json(self.begun, self.identity)
            self.lock.truncate(0)
            print(os.getpid(), "on", platform.node(), end="", file=self.lock, flush=True)

    def read(self, piece: str = "state", generators: bool = False):
        """The last saved state of a piece, or None.   generators: torch's continue from where they were"""
        path = self.folder / f"{piece}.pt"
        if not path.exists():
            return None
        stored = load_torch(path, AGAIN, ("state", "generators"))
        if generators:
            first, *others = stored["generators"]
            torch.set_rng_state(first)
            if others and torch.cuda.is_initialized():
                torch.cuda.set_rng_state(others[0])
        return stored["state"]

    def load(self, piece: str = "state"):
        """`read`; torch's generators go on from there."""
        return self.read(piece, generators=True)

    def states(self) -> list:
        """The states of all pieces."""
        return [self.read(path.stem) for path in sorted(self.folder.glob("*.pt"))]

    def save_if_due(self, state: Callable, piece: str = "state") -> None:
        """Save state() if it is time to; after a signal at once, and end."""
        if signals.stopped_by or time.monotonic() - self.saved >= self.period:
            self.save(state(), piece)
            if signals.stopped_by:
                without = " without --overwrite" * self.overwrite
                sys.stderr.write(f"{self.result}: progress saved; the same command{without} goes on\n")
                raise SystemExit(128 + signals.stopped_by)

    def save(self, state, piece: str = "state") -> None:
        generators = [torch.get_rng_state()]
        if torch.cuda.is_initialized():
            generators.append(torch.cuda.get_rng_state())
        save_torch(self.folder / f"{piece}.pt", {"state": state, "generators": generators})
        if rank() == 0:
            save_json(self.begun, self.identity | {"seconds": self.seconds()})
        self.saved = time.monotonic()

    def drop(self, piece: str = "state") -> None:
        (self.folder / f"{piece}.pt").unlink(missing_ok=True)

    def seconds(self) -> float:
        """Seconds of work, those of earlier processes included up to their last save."""
        return self.earlier + time.monotonic() - self.entered

    def __exit__(self, kind, error, trace):
        signals.checkpoints -= 1
        if rank() == 0:
            if kind is None:
                shutil.rmtree(self.folder, ignore_errors=True)
            self.lock.close()
        collective = kind and issubclass(kind, RuntimeError)         # its other processes have stopped
        if signals.stopped_by and not signals.checkpoints and (kind is None or collective):
            raise SystemExit(128 + signals.stopped_by) from None
