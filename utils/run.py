"""Bookkeeping of a phase: device, seeds, folders, whole files, checkpoints, progress, and the RESULT line."""
import ctypes
import hashlib
import io
import json
import os
import platform
import resource
import sys
import time
from contextlib import contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from torch import nn

from utils import fail

NEUTRAL = {"overwrite", "device", "workers", "data_dir", "run_dir", "download", "grid_every",
           "log_every", "groups_per_step", "cuda_graphs"}
# arguments that leave the result as it is, up to rounding
TEACHER = ("weights", "backbone", "data", "top1", "args")            # what squeeze.py stores


def pick_device(name, precision="tf32"):
    """torch.device of --device; auto: cuda where there is one, else cpu. precision other than fp32: its float32 matrix
    products and convolutions take their factors as TF32 (10 bits of mantissa), on a GPU that can."""
    available = ["cuda"] * torch.cuda.is_available() + ["cpu"]
    name = available[0] if name == "auto" else name
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
        if device.type not in available:
            raise RuntimeError
    except (RuntimeError, AssertionError):
        fail(f"--device {name} is not to be had here; use auto or one of: {' '.join(available)}")
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = precision != "fp32"
    if device.type == "cpu":
        keep_freed_memory()
    return device


def with_precision(model, device, precision):
    """The model; at bf16 its layers run under autocast, and its outputs are float32 again."""
    if precision == "bf16":
        forward = torch.autocast(device.type, torch.bfloat16)(model.forward)
        model.forward = lambda images: forward(images).float()
    return model


def channels_last(model):
    """The model in the layout that convolutions are fastest in, unless it trains GroupNorms: these are slower by more."""
    if not any(isinstance(layer, nn.GroupNorm) and layer.weight.requires_grad for layer in model.modules()):
        model.to(memory_format=torch.channels_last)
    return model


def send(value, device):
    """A tensor, or a dict of tensors, on the device; a GPU fetches it while the host goes on."""
    if isinstance(value, dict):
        return {key: send(part, device) for key, part in value.items()}
    if device.type == "cuda" and not value.is_cuda:
        value = value.pin_memory()
    return value.to(device, non_blocking=True)


class Graphed:
    """function(*tensors) -> tensors as a CUDA graph. The first two calls run as they are, the third is captured, and it and
    all others are replayed. The function must not ask the device for a value, nor its tensors change their shapes. Graphs
    with one `pool` (torch.cuda.graph_pool_handle) share their memory."""

    def __init__(self, function, pool=None):
        self.function, self.pool, self.graph, self.calls = function, pool, None, 0

    def __call__(self, *inputs):
        self.calls += 1
        if self.calls < 3:                                           # libraries set themselves up
            return self.function(*inputs)
        if self.graph is None:
            self.inputs, self.graph = [tensor.clone() for tensor in inputs], torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph, pool=self.pool):
                self.outputs = self.function(*self.inputs)
        for mine, tensor in zip(self.inputs, inputs):
            mine.copy_(tensor)
        self.graph.replay()
        return [tensor.clone() for tensor in self.outputs]           # the pool's next graph writes over them


def keep_freed_memory():
    """Let glibc keep what a step frees for the next one: handing pages back and faulting them in again took half of the
    CPU time of a training step."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt:                                                      # not in every C library
        mallopt(-3, 1 << 30)                                         # M_MMAP_THRESHOLD, bytes
        mallopt(-1, 1 << 30)                                         # M_TRIM_THRESHOLD


def generator(*key):
    """A torch.Generator whose numbers depend on the key alone, words and non-negative integers."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))


def run_paths(args):
    """The folders of a run: runs/<dataset>/teachers/<teachers> and runs/<dataset>/<method>-ipc<k>[-<tag>]/..."""
    root = Path(args.run_dir) / Path(args.dataset).resolve().name
    run = root / f"{args.method}-ipc{args.ipc}{f'-{args.tag}' if args.tag else ''}"
    return SimpleNamespace(teachers=root / "teachers" / args.teachers, run=run, images=run / "images",
                           labels=run / "labels", eval=run / "eval")


@contextmanager
def whole_file(path):
    """Yields a path beside `path` to write to, and renames it when all is written: the file is whole or absent."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        os.replace(temporary, path)
    except OSError as error:
        fail(f"{path} cannot be written ({error.strerror or error}); make room there or name another --run-dir")
    finally:
        with suppress(OSError):                                      # nothing is left to remove when all went well
            temporary.unlink()


@contextmanager
def array_file(path, shape, dtype):
    """Yields a function that appends rows to an .npy file of this shape, whole or absent as by `whole_file`.

    Not through a memory map, whose pages count as the process's own and whose errors, such as a full disk, kill it.
    """
    with whole_file(path) as temporary, open(temporary, "wb") as file:
        np.lib.format.write_array_header_1_0(
            file, {"descr": np.dtype(dtype).str, "fortran_order": False, "shape": tuple(shape)})
        yield lambda rows: file.write(np.ascontiguousarray(rows, dtype))


def save_json(path, value):
    with whole_file(path) as temporary:
        temporary.write_text(json.dumps(value, indent=1) + "\n")


def load_json(path, remedy, keys=("args",)):
    """The object of a result file, which must have these keys."""
    try:
        return with_keys(json.loads(Path(path).read_text()), keys)
    except FileNotFoundError:
        fail(f"{path} is missing; {remedy}")
    except (OSError, ValueError) as error:
        fail(f"{path} is no whole result file ({reason(error)}); {remedy}")


def with_keys(value, keys):
    if not isinstance(value, dict) or not value.keys() >= set(keys):
        raise ValueError(f"it lacks {' '.join(keys)}")
    return value


def reason(error):
    """An exception's first line, or its kind where it says nothing."""
    return (str(error) or type(error).__name__).splitlines()[0][:100]


def save_torch(path, value):
    buffer = io.BytesIO()                   # torch's own writer turns a full disk into an error that is no OSError
    torch.save(value, buffer)
    with whole_file(path) as temporary:
        temporary.write_bytes(buffer.getbuffer())


def load_torch(path, remedy, keys=()):
    """The dict of a checkpoint, which must have these keys; tensors and plain values only: nothing in the file can run."""
    try:
        return with_keys(torch.load(path, map_location="cpu", weights_only=True), keys)
    except FileNotFoundError:
        fail(f"{path} is missing; {remedy}")
    except Exception as error:                                       # a damaged pickle may raise anything
        fail(f"{path} is no whole checkpoint of plain weights ({reason(error)}); {remedy}")


def fingerprint(*parts):
    """sha256 of files (paths), texts and arrays, one after another."""
    digest = hashlib.sha256()
    for part in parts:
        if isinstance(part, Path):
            with open(part, "rb") as file:
                while block := file.read(1 << 20):
                    digest.update(block)
        else:
            digest.update(part.encode() if isinstance(part, str) else part)
    return digest.hexdigest()


def need_files(args, folder, suffix, script):
    """A file for each backbone, or the command that makes those which are missing.   -> the command for others"""
    command = f"run: python {script} --dataset {args.dataset} --teachers {args.teachers}"
    missing = [name for name in args.backbones if not (folder / f"{name}{suffix}").exists()]
    if missing:
        fail(f"{folder / missing[0]}{suffix} is missing; {command} --backbones {' '.join(missing)}")
    return command


def load_teachers(args, folder, build_model, device):
    """The backbones of --backbones, frozen and in eval mode, and what their checkpoints agree on.
    -> {name: model}, {name: checkpoint without weights, plus its fingerprint}, data dict(classes, image_size, ...)"""
    models, records = {}, {}
    again = need_files(args, folder, ".pt", "squeeze.py")
    for name in args.backbones:
        path = folder / f"{name}.pt"
        record = load_torch(path, f"{again} --backbones {name} --overwrite", TEACHER)
        try:
            model = build_model(record["backbone"], len(record["data"]["classes"]), record["data"]["image_size"])
            model.load_state_dict(record.pop("weights"))
        except (KeyError, TypeError, RuntimeError, ValueError) as error:
            fail(f"{path} does not hold weights of {name} ({reason(error)}); train it again with squeeze.py --overwrite")
        models[name] = with_precision(model.eval().requires_grad_(False).to(device), device, args.precision)
        records[name] = record | {"fingerprint": fingerprint(path)}
        first = records[args.backbones[0]]["data"]
        if record["data"] != first:
            key = next(key for key in first if record["data"].get(key) != first[key])
            fail(f"{path} and {args.backbones[0]}.pt differ in {key}; train them again with squeeze.py --overwrite")
    return models, records, first


@torch.inference_mode()
def accuracy(model, batches):
    """Top-1 in % over batches of (network input, labels)."""
    model.eval()
    right = torch.cat([model(images).argmax(1) == labels.to(images.device) for images, labels in batches])
    return 100 * right.sum().item() / len(right)


def check_models(flag, names, build_model, num_classes=10, image_size=224):
    """Every name is that of a network which takes such images; nothing is allocated."""
    for name in names:
        try:
            with torch.device("meta"):
                build_model(name, num_classes, image_size)
        except ValueError as error:
            fail(f"{flag} {name}: {error}")


def check_classes(found, expected, where, other):
    """Class names and their order must agree wherever two artefacts meet."""
    if list(found) != list(expected):
        pair = next(((a, b) for a, b in zip(found, expected) if a != b), None)
        what = f"class {pair[0]!r} stands where {pair[1]!r} does" if pair else f"{len(found)} classes, not {len(expected)}"
        fail(f"{where} and {other} differ in their classes ({what}); use the same data set for both")


def relevant(args):
    """The arguments that decide the result, as plain values."""
    return json.loads(json.dumps({key: value for key, value in vars(args).items() if key not in NEUTRAL}, default=str))


def check_same(stored, args, path):
    """Stop when what lies at `path` was made with other arguments."""
    now = relevant(args)
    changed = [key for key in now if key in stored and stored[key] != now[key]]
    if changed:
        told = ", ".join(f"--{key.replace('_', '-')} {stored[key]} (now {now[key]})" for key in changed)
        fail(f"{path} was made with {told}; choose another --tag or --teachers, or start again with --overwrite")


def finished(path, args, upstream=None, made_from=""):
    """Whether the phase has its result already; says so and repeats the RESULT line. With upstream, the arguments of the
    earlier phases as they are now, a result that was `made_from` other ones is refused."""
    if args.overwrite or not path.exists():
        return False
    result = load_json(path, "start again with --overwrite", ("args", "upstream"))
    check_same(result["args"], args, path)
    if upstream is not None and result["upstream"] != upstream:
        fail(f"{path} was made from other {made_from} than there are now; start again with --overwrite")
    repeat(path)
    return True


def repeat(path):
    """Say that a result exists, and print its line again."""
    print(f"already done: {path} (--overwrite starts again)")
    print("RESULT", json.dumps(load_json(path, "start again with --overwrite")), flush=True)


def finish(path, phase, args, metrics, started, upstream=None):
    """Write the result file and print the same object on one line."""
    memory = {"host_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // (1024 if sys.platform != "darwin" else 1 << 20)}
    if torch.cuda.is_available():
        memory["cuda_mib"] = torch.cuda.max_memory_allocated() >> 20
    result = {"phase": phase, "dataset": Path(args.dataset).name, "ipc": args.ipc, "method": args.method, "tag": args.tag,
              **metrics, "seconds": round(time.time() - started, 1), "peak_memory": memory,
              "versions": {"python": platform.python_version(), "torch": torch.__version__},
              "args": relevant(args), "upstream": upstream or {}}
    save_json(path, result)
    print("RESULT", json.dumps(result), flush=True)
    return result


class Progress:
    """A line with the time left: redrawn on a terminal, a new one every half minute elsewhere."""

    def __init__(self, what, total, every=30):
        self.what, self.total, self.done = what, total, 0
        self.terminal = sys.stdout.isatty()
        self.every = 0.2 if self.terminal else every
        self.started = self.shown = time.time()

    def step(self, text="", count=1):
        self.done += count
        now = time.time()
        if now - self.shown < self.every and self.done < self.total:
            return
        self.shown = now
        spent = now - self.started
        left = spent / self.done * (self.total - self.done)
        line = f"{self.what}  {self.done}/{self.total}  {clock(spent)}, {clock(left)} left  {text() if callable(text) else text}"
        last = "\n" if self.done >= self.total or not self.terminal else ""
        print(f"\r{line[:150]:<100}" if self.terminal else line, end=last or "", flush=True)


def clock(seconds):
    return f"{int(seconds) // 3600}:{int(seconds) // 60 % 60:02}:{int(seconds) % 60:02}"
