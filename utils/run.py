"""A phase's start, seeds and folders, its progress and its result."""
import argparse
import hashlib
import json
import os
import platform
import shlex
import shutil
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterable
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist

from utils import PHASES, fail
from utils.checkpoint import Checkpoint, load_finished
from utils.cli import call, describe_choice, run_folder
from utils.device import busy_cores, faster_in_bf16, hardware, peak_memory, pick_device
from utils.files import load_json, save_json
from utils.processes import print_rank0, rank, signals, stop, world_size
from utils.provenance import AGAIN, ASSUMED, relevant


def begin(args: argparse.Namespace) -> tuple[torch.device, SimpleNamespace]:
    """The first act of a phase: from here on SIGINT and SIGTERM end it after the current step (`Checkpoint`),
    and torchrun's processes know each other.   -> device, folders (`run_paths`)"""
    signals.stopped_by = None
    warnings.filterwarnings("ignore", "Detected call of .lr_scheduler.step")   # resumed after a last step
    with suppress(ValueError):                                       # not in the main thread
        for number in signal.SIGINT, signal.SIGTERM:
            signal.signal(number, stop)
    device = args.device
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        gpus = torch.cuda.device_count()
        if gpus and device in ("auto", "cuda"):
            device = f"cuda:{int(os.environ['LOCAL_RANK']) % gpus}"             # several may share one GPU
        elif device.startswith("cuda:"):
            fail(f"--device {device} would be that of every process; under torchrun use cuda, a GPU for each")
        dist.init_process_group("gloo", timeout=timedelta(days=30))  # one process may wait for another's work
    device = pick_device(device, args.precision)
    if args.precision == "auto":                                     # the result tells what ran
        args.precision = "bf16" if faster_in_bf16(device) else "tf32"
    if device.type == "cuda":
        torch.cuda.set_device(device.index or 0)
    elif note := busy_cores():
        print_rank0(note)
    print_rank0(describe_choice(args))
    return device, run_paths(args)


def script(main: Callable) -> None:
    """Run a phase; what the system refuses, such as a folder without permission, ends in one line of text."""
    try:
        main()
    except OSError as error:
        fail(f"{error.filename or 'the output'}: {error.strerror or error}; make it usable or name another")
    except KeyboardInterrupt:                                        # before `begin`, with nothing to save
        raise SystemExit(128 + signal.SIGINT) from None


def send(value, device: torch.device):
    """A tensor, or dicts, lists and tuples of tensors and numbers, on the device; a GPU fetches it while the
    host goes on."""
    if isinstance(value, dict):
        return {key: send(part, device) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(send(part, device) for part in value)
    if not torch.is_tensor(value):
        return value
    if device.type == "cuda" and not value.is_cuda:
        value = value.pin_memory()
    return value.to(device, non_blocking=True)


def generator(*key: str | int) -> torch.Generator:
    """A torch.Generator whose numbers depend on the key alone, words and non-negative integers."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))


def run_paths(args: argparse.Namespace) -> SimpleNamespace:
    """The folders of a run: runs/<dataset>/teachers/<teachers> and runs/<dataset>/<method>-ipc<k>[-<tag>]."""
    root = run_folder(args)
    run = root / f"{args.method}-ipc{args.ipc}{f'-{args.tag}' if args.tag else ''}"
    return SimpleNamespace(teachers=root / "teachers" / args.teachers, run=run, images=run / "images",
                           labels=run / "labels", eval=run / "eval")


class Run:
    """A result of a phase and the work on it, which goes on after any kill.

    run = Run("relabel", args, result, inputs)       # touches no file
    if run.finished():                               # stops if it has other arguments or inputs
        return
    with run.work() as checkpoint:                   # continues unfinished work
        run.start(total, "epochs")                   # the progress line
        state = checkpoint.load()                    # as last saved, or None
        for ...:
            run.step(lambda: state)                  # progress; saves when due; after a signal saves and ends
        run.finish({"top1": 40.0}, "40.0 % of the test images")

    result: the result file; inputs: {what: hash, or {backbone: hash}} of what it is made from
    """

    def __init__(self, phase, args, result, inputs=None):
        self.phase, self.args, self.result = phase, args, Path(result)
        known = args.data_set.get("fingerprint")
        self.inputs = (inputs or {}) | ({"data": known} if known else {})

    def finished(self) -> bool:
        """Whether the result exists; repeats its RESULT line."""
        stored = load_finished(self.result, self.args, self.inputs)
        return stored is not None and self._repeat(stored)

    def unchanged(self, settings: dict, **metrics) -> bool:
        """Whether the summary of several files has these settings and metrics; if so, repeats its RESULT line,
        else the caller writes it again."""
        stored = load_json(self.result, AGAIN) if self.result.exists() else {"args": {}}
        return (settings.items() <= (ASSUMED | stored["args"]).items() and metrics.items() <= stored.items()
                and self._repeat(stored))

    def _repeat(self, stored):
        print_rank0(f"already done: {self.result.absolute()} (--overwrite starts again)")
        self._tell(stored)
        return True

    def costs(self) -> dict[str, dict]:
        """{backbone: seconds and peak_memory} in the result file, {} without one."""
        return load_json(self.result, "remove it").get("costs", {}) if self.result.exists() else {}

    def work(self, data: dict | None = None, outputs: Iterable[Path] = (),
             extends: bool = False) -> Checkpoint:
        """The `Checkpoint` of this result.   data: more hashes that unfinished work is compared by"""
        inputs = self.inputs | (data or {})
        self.checkpoint = Checkpoint(self.result, self.args, inputs, None, outputs, extends)
        return self.checkpoint

    def start(self, total: int, unit: str) -> None:
        """Show a progress line of `total` units."""
        self.progress = Progress(self.phase, total, unit)

    def step(self, state: Callable, piece: str = "state", text: Callable = str, count: int = 1) -> None:
        """`count` more units are done: show that and text(); save state() as that of `piece` if it is due."""
        self.progress.step(text, count)
        self.checkpoint.save_if_due(state, piece)

    def finish(self, metrics: dict, summary: str | Callable, upstream: dict | None = None,
               seconds: float | None = None) -> dict | None:
        """Process 0 writes the result file, and prints three lines for people and a short RESULT for scripts.
        summary: what came out, a line or a function of the result; upstream: {phase: arguments}; seconds: by
        default those of the work"""
        if rank():
            return None
        args, folder = self.args, self.result.absolute().parent
        seconds = self.checkpoint.seconds() if seconds is None else seconds
        result = {"phase": self.phase, "dataset": Path(args.dataset).resolve().name, "ipc": args.ipc,
                  "method": args.method, "tag": args.tag, **metrics, "seconds": round(seconds, 1),
                  "processes": world_size(), "peak_memory": peak_memory(), "hardware": hardware(),
                  "versions": {"python": platform.python_version(), "torch": torch.__version__},
                  "args": relevant(args), "upstream": upstream or {}, "made_from": self.inputs,
                  "data_set": args.data_set}
        save_json(self.result, result)
        picture = f", picture {folder / 'grid.png'}" * (self.phase == "recover")
        following = f"python -m utils.report {shlex.quote(str(self.result.parents[2]))}"
        if self.phase != PHASES[-1]:
            theirs = {flag: getattr(args, flag, None) for flag in ("images", "class_map")}
            following = call(f"{PHASES[PHASES.index(self.phase) + 1]}.py", args, **theirs)
        print(f"{self.phase}: {summary(result) if callable(summary) else summary}, in {clock(seconds)}")
        print(f"files: {folder}{picture}\nnext:  {following}")
        self._tell(result)
        return result

    def _tell(self, result):
        """What scripts read of a result on one line, numbers rounded; the file has everything."""
        keys = ("phase", "dataset", "ipc", "method", "tag", "student", "labels", "images", "top1", "top1_std",
                "seconds")
        text = json.dumps({key: result[key] for key in keys if key in result})
        short = json.loads(text, parse_float=lambda number: round(float(number), 2))
        print_rank0("RESULT", json.dumps(short | {"file": str(self.result.absolute())}))


class Progress:
    """A line with the time left: redrawn on a terminal, in the longest form that fits its width, elsewhere new
    every half minute.
    what: the phase or training; unit: what is counted, such as images"""

    def __init__(self, what, total, unit):
        self.what, self.total, self.unit, self.done, self.before = what, total, unit, 0, 0
        self.terminal = sys.stdout.isatty()
        self.started = self.shown = time.time()

    def skip(self, count: int) -> None:
        """An earlier process has done `count` units."""
        self.done, self.before = self.done + count, self.before + count

    def step(self, text: Callable = str, count: int = 1) -> None:
        """`count` more units are done.   text(): what to show beside them"""
        self.done += count
        now, every, rest = time.time(), 0.2 if self.terminal else 30, self.total - self.done
        if rank() or now - self.shown < every and rest > 0:
            return
        self.shown, spent = now, now - self.started
        count = f"{self.done:.10g}/{self.total:.10g} {self.unit}"
        left = f"{clock(spent / max(self.done - self.before, 1e-9) * rest)} left"
        line = f"{self.what}  {count}  {clock(spent)}, {left}  {text()}".rstrip()
        if self.terminal:
            width = shutil.get_terminal_size().columns - 1           # the last column may wrap
            forms = (line, f"{self.what}  {count}  {clock(spent)}, {left}", f"{self.what}  {count}, {left}",
                     f"{count}, {left}")
            line = next((form for form in forms if len(form) <= width), forms[-1][:width])
            line = f"\r{line:<{width}}"
        print(line, end="" if self.terminal and rest > 0 else "\n", flush=True)


def clock(seconds: float) -> str:
    return f"{int(seconds) // 3600}:{int(seconds) // 60 % 60:02}:{int(seconds) % 60:02}"
