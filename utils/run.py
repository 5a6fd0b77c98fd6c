"""Bookkeeping of a phase: device, processes, seeds, folders, whole files, unfinished work, progress, the RESULT line."""
import ctypes
import fcntl
import hashlib
import io
import json
import math
import os
import platform
import re
import resource
import shlex
import shutil
import signal
import sys
import threading
import time
import warnings
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist
from torch import nn

from utils import fail

NEUTRAL = {"overwrite", "device", "workers", "data_dir", "run_dir", "download", "grid_every",
           "log_every", "groups_per_step", "cuda_graphs", "checkpoint_minutes", "recipe", "given"}
# arguments that leave the result as it is, up to rounding; recipe decides others, which do not, and given repeats some
TEACHER = ("weights", "backbone", "data", "top1", "tested", "args")            # what squeeze.py stores
AGAIN = "start again with --overwrite"


def begin(args):
    """The first act of a phase: SIGINT and SIGTERM end it behind the step at work (`Work`), torchrun's processes find each
    other.   -> device, folders (`run_paths`)"""
    Work.stopped_by = None
    warnings.filterwarnings("ignore", "Detected call of .lr_scheduler.step")       # work may go on at the end of an epoch
    if threading.current_thread() is threading.main_thread():
        for number in signal.SIGINT, signal.SIGTERM:
            signal.signal(number, stop)
    device = args.device
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        gpus = torch.cuda.device_count()
        if gpus and device in ("auto", "cuda"):
            device = f"cuda:{int(os.environ['LOCAL_RANK']) % gpus}"  # several may share one, which small networks leave idle
        elif device.startswith("cuda:"):
            fail(f"--device {device} would be that of every process; under torchrun use cuda, which is dealt to them")
        dist.init_process_group("gloo", timeout=timedelta(30))       # days: one may wait for another's work
    device = pick_device(device, args.precision)
    if device.type == "cuda":
        torch.cuda.set_device(device.index or 0)
    return device, run_paths(args)


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def world():
    """Number of processes, 1 without torchrun."""
    return dist.get_world_size() if dist.is_initialized() else 1


def dealt(work):
    """This process's share of a list or tensor: every `world`-th."""
    return work[rank()::world()]


def wait_for_all():
    """Returns when every process of torchrun has come here."""
    if world() > 1:
        arrived = dist.all_reduce(torch.zeros(1), async_op=True)
        while not arrived.is_completed():                            # not in `wait`, where no signal would be heard
            if Work.stopped_by:
                raise SystemExit(128 + Work.stopped_by)
            time.sleep(0.02)
        try:
            arrived.wait()
        except RuntimeError:
            raise SystemExit("another process has ended before its work was done") from None


@contextmanager
def one_first():
    """One process runs the block, and may leave files there, before the others do."""
    if rank():
        wait_for_all()
    yield
    if rank() == 0:
        wait_for_all()


def say(*words):
    """Print, once for all processes."""
    if rank() == 0:
        print(*words, flush=True)


def script(main):
    """Run a phase from the command line: what the system refuses, such as a folder that may not be read, is told in one
    line."""
    try:
        main()
    except OSError as error:
        fail(f"{error.filename or 'the output'}: {error.strerror or error}; make it usable or name another place")


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
    """The model in the layout that convolutions are fastest in, unless it has GroupNorms: these are slower by more."""
    if not any(isinstance(layer, nn.GroupNorm) for layer in model.modules()):
        model.to(memory_format=torch.channels_last)
    return model


def send(value, device):
    """A tensor, or dicts, lists and tuples of tensors and numbers, on the device; a GPU fetches it while the host goes on."""
    if isinstance(value, dict):
        return {key: send(part, device) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(send(part, device) for part in value)
    if not torch.is_tensor(value):
        return value
    if device.type == "cuda" and not value.is_cuda:
        value = value.pin_memory()
    return value.to(device, non_blocking=True)


class Graphed:
    """function(*tensors) -> tensors as a CUDA graph. The first two calls run as they are, the third is captured, and it and
    all others are replayed. The function must not ask the device for a value, nor its tensors change their shapes. What a
    replay returns is written over by the next. Graphs with one `pool` (torch.cuda.graph_pool_handle) share their memory,
    and return copies."""

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
        return [tensor.clone() for tensor in self.outputs] if self.pool else self.outputs


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
    """The folders of a run: runs/<dataset>[-holdout]/teachers/<teachers> and .../<method>-ipc<k>[-<tag>]/..."""
    root = Path(args.run_dir) / (Path(args.dataset).resolve().name + "-holdout" * args.holdout)
    run = root / f"{args.method}-ipc{args.ipc}{f'-{args.tag}' if args.tag else ''}"
    return SimpleNamespace(teachers=root / "teachers" / args.teachers, run=run, images=run / "images",
                           labels=run / "labels", eval=run / "eval")


@contextmanager
def writable(path):
    """What cannot be written ends the phase."""
    try:
        yield
    except OSError as error:
        fail(f"{path} cannot be written ({error.strerror or error}); make room there or name another --run-dir")


@contextmanager
def whole_file(path, suffix="tmp"):
    """Yields a path beside `path` to write to, and renames it when all is written: the file is whole or absent."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{suffix}")
    try:
        with writable(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            yield temporary
            with open(temporary, "rb") as file:
                os.fsync(file.fileno())                              # whole after a power cut too
            os.replace(temporary, path)
    finally:
        with suppress(OSError):                                      # nothing is left to remove when all went well
            temporary.unlink()


def save_json(path, value):
    with whole_file(path, f"{os.getpid()}.tmp") as temporary:        # two processes may end with the same summary
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
            digest.update(os.fsencode(part) if isinstance(part, str) else part)
    return digest.hexdigest()


def image_set(folder, files):
    """Fingerprint of the images of a folder, by their names in it."""
    folder = Path(folder).expanduser()
    return fingerprint(*(part for name in sorted(files) for part in (name, folder / name)))


def call(script, args, **instead):
    """The command of another phase with the flags that this call gave and all phases share, but for those `instead`."""
    words = ["python", *script.split()]
    for flag, value in (args.given | instead).items():
        if value not in (None, False):
            words += [f"--{flag.replace('_', '-')}", *map(str, value if isinstance(value, list) else [value] * (value is not True))]
    return shlex.join(words)


def need_files(args, folder, suffix, script):
    """A file for each backbone, or the command that makes those which are missing.   -> the command for others"""
    of_recipe = {"method": args.recipe, "recipe": None} if args.recipe else {}
    command = "run: " + call(script, args, **of_recipe, teachers=args.teachers, backbones=None)
    missing = [name for name in args.backbones if not (folder / f"{name}{suffix}").exists()]
    if missing and script == "squeeze.py" and "@" in "".join(missing):
        whole = " ".join(dict.fromkeys(name.partition("@")[0] for name in missing))
        fail(f"{folder / missing[0]}{suffix} is missing; {command} --backbones {whole}, with --save-epochs or --pruned for what "
             "@ names")
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
            model = build_model(record["backbone"], len(record["data"]["classes"]), record["data"]["image_size"],
                                record.get("widths"))
            model.load_state_dict(record.pop("weights"))
        except (AttributeError, KeyError, TypeError, RuntimeError, ValueError) as error:
            fail(f"{path} does not hold weights of {name} ({reason(error)}); train it again with squeeze.py --overwrite")
        models[name] = with_precision(model.eval().requires_grad_(False).to(device), device, args.precision)
        records[name] = record | {"fingerprint": fingerprint(path)}
        first = records[args.backbones[0]]["data"]
        if record["data"] != first:
            key = next(key for key in first if record["data"].get(key) != first[key])
            fail(f"{path} and {args.backbones[0]}.pt differ in {key}; train them again with squeeze.py --overwrite")
        kept = [records[one].get("kept", torch.empty(0)) for one in (name, args.backbones[0])]
        if not torch.equal(*kept):
            fail(f"{path} and {args.backbones[0]}.pt were trained on other images (--prune-ratio); train them again alike, "
                 "or name those that were")
    return models, records, first


def fingerprints(records):
    """Of records of `load_teachers`, for `check_origin`."""
    return {"weights": {name: record["fingerprint"] for name, record in records.items()}}


@torch.inference_mode()
def accuracy(model, batches, jointly=False):
    """Top-1 in % over batches of (network input, labels); jointly: over those of all processes."""
    model.eval()
    right = seen = 0
    for images, labels in batches:
        right, seen = right + (model(images).argmax(1) == labels.to(images.device)).sum(), seen + len(labels)
    counts = torch.tensor([int(right), seen])
    if jointly and world() > 1:
        dist.all_reduce(counts)
    return 100 * counts[0].item() / counts[1].item()


def check_models(flag, names, build_model, num_classes=10, image_size=224):
    """Every name is that of a network which takes such images; nothing is allocated."""
    for name in names:
        try:
            with torch.device("meta"):
                build_model(name, num_classes, image_size)
        except ValueError as error:
            fail(f"{flag} {name}: {error}")


def check_trained(split, records, paths):
    """Stop where a teacher was trained when there were more or fewer training images."""
    for name, record in records.items():
        if record.get("trained", len(split)) != len(split):
            fail(f"{paths.teachers / name}.pt was trained when there were {record['trained']} training images, now {len(split)}; "
                 "train it again with squeeze.py --overwrite")


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
    """Stop when what lies at `path` was made with other arguments.   args: of the phase, or those that matter as a dict"""
    now = args if isinstance(args, dict) else relevant(args)
    changed = [key for key in now if key in stored and stored[key] != now[key]]
    if changed:
        told = ", ".join(f"--{key.replace('_', '-')} {stored[key]} (now {now[key]})" for key in changed)
        fail(f"{path} was made with {told}; choose another --tag or --teachers, or {AGAIN}")


def check_origin(stored, now, path, remedy=AGAIN):
    """Stop when what lies at `path` was made from other files.   stored, now: {what: hash, or {backbone: hash}}"""
    for what in now:
        then, these = (made[what] if isinstance(made.get(what), dict) else {"": made.get(what)} for made in (stored, now))
        differing = [name for name in then | these if then.get(name) != these.get(name)]
        if differing:
            named = f" ({' '.join(sorted(differing))})" if all(differing) else ""
            fail(f"{path} was made from other {what}{named} than there are now; {remedy}")


def is_there(path, args):
    """Whether a result need not be made. What a kill left of its work goes."""
    if args.overwrite or not path.exists():
        return False
    folder = unfinished(path)
    with suppress(OSError), open(folder / "lock", "r+") as lock:
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(folder)
    return True


def unfinished(result):
    return result.with_name(f".{result.name}.unfinished")


def check_recovered(recovered, args, paths, data, records):
    """Stop unless recover.py's images are of these classes and, where it had teachers of this set, of these. Under another
    --recipe there may be others, but none of those it had may have changed."""
    path, had = paths.run / "result.json", recovered["made_from"].get("weights", {})
    check_classes(recovered["classes"], data["classes"], path, "the data set or the teachers now")
    if records and had and recovered["args"]["teachers"] == args.teachers:
        names = had.keys() & records.keys() if args.recipe else had.keys() | records.keys()
        check_origin({"weights": {name: had.get(name) for name in names}},
                     fingerprints({name: records[name] for name in names & records.keys()}), path, "name the same --backbones, "
                     f"run recover.py --overwrite, or name --images {paths.images} under another --tag")


def finished(path, args, made_from):
    """Whether the phase has its result already; says so and repeats the RESULT line."""
    if not is_there(path, args):
        return False
    result = load_json(path, AGAIN, ("args", "made_from"))
    check_same(result["args"], args, path)
    check_origin(result["made_from"], made_from, path)
    repeat(path)
    return True


def finished_before(path, args, **metrics):
    """`finished` for the summary of several backbones, which must have these arguments and metrics."""
    result = load_json(path, AGAIN) if path.exists() else {"args": {}}
    if any(result["args"].get(key) != args[key] for key in args) or any(result.get(key) != metrics[key] for key in metrics):
        return False
    repeat(path)
    return True


def repeat(path):
    """Say that a result exists, and print its line again."""
    say(f"already done: {path} (--overwrite starts again)")
    say("RESULT", json.dumps(load_json(path, AGAIN)))


def finish(path, phase, args, metrics, seconds, upstream=None, made_from=None):
    """Write the result file and print the same object on one line; once for all processes."""
    if rank():
        return None
    result = {"phase": phase, "dataset": Path(args.dataset).name, "ipc": args.ipc, "method": args.method, "tag": args.tag,
              **metrics, "seconds": round(seconds, 1), "processes": world(), "peak_memory": peak_memory(), "hardware": hardware(),
              "versions": {"python": platform.python_version(), "torch": torch.__version__},
              "args": relevant(args), "upstream": upstream or {}, "made_from": made_from or {}}
    save_json(path, result)
    say("RESULT", json.dumps(result))
    return result


def peak_memory():
    """Of this process so far, in MiB."""
    memory = {"host_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // (1024 if sys.platform != "darwin" else 1 << 20)}
    if torch.cuda.is_available():
        memory["cuda_mib"] = torch.cuda.max_memory_allocated() >> 20
    return memory


def hardware():
    """Name of the GPU that was used, or of the CPU and the threads on it."""
    if torch.cuda.is_initialized():
        return torch.cuda.get_device_name()
    name = None
    with suppress(OSError):
        name = re.search(r"^model name\s*:\s*(.+)$", (Path("/proc") / "cpuinfo").read_text(), re.MULTILINE)
    threads = torch.get_num_threads()
    return f"{name[1].strip() if name else platform.processor() or 'CPU'}, {threads} thread{'s' * (threads > 1)}"


def costs(path):
    """{backbone: its seconds and peak_memory} of the result file of squeeze.py or collect_stats.py, {} without one."""
    return load_json(path, AGAIN).get("costs", {}) if path.exists() else {}


def stop(number, frame):
    """On a signal: end, once the work's state is kept; at once where there is none, or at a second one. Launchers and
    terminals together may send the first one twice."""
    if not Work.going_on or (Work.stopped_by and world() == 1 and time.monotonic() > Work.stopped_at + 1):
        signal.signal(number, signal.SIG_IGN)
        raise SystemExit(128 + number)
    if not Work.stopped_by:
        Work.stopped_by, Work.stopped_at = number, time.monotonic()


class Work:
    """Unfinished work on a result: a hidden folder beside it holds who works, on what, and how far it is, and goes when the
    result is there. Stops where the work is another process's, or was begun with other arguments or files.

    with Work(result, args, made_from) as work:
        state = work.load()                         # as last kept, or None
        for ...:
            work.keep(lambda: state)                # every --checkpoint-minutes; at SIGINT or SIGTERM, and ends
        # write the result

    One work may have several pieces, each with a state of its own. torch's generators are kept beside a state.
    settings: what is compared instead of args; outputs: other files that the work writes, which go when it starts again;
    extends: the result is there and stays until a larger one takes its place.
    seconds(): spent on it, earlier processes included, up to what they kept last.
    """
    going_on, stopped_by, stopped_at = 0, None, 0

    def __init__(self, result, args, made_from=None, settings=None, outputs=(), extends=False):
        self.result, self.outputs, self.overwrite = Path(result), [] if extends else [Path(result), *outputs], args.overwrite
        self.folder = unfinished(self.result.with_stem(f"{self.result.stem}+") if extends else self.result)
        self.begun, self.period = self.folder / "begun.json", 60 * args.checkpoint_minutes
        self.identity = {"args": settings or relevant(args), "made_from": made_from or {}}

    def __enter__(self):
        self.earlier, self.kept, self.entered = 0, time.monotonic(), time.monotonic()
        if rank() == 0:
            self._begin()
        Work.going_on += 1
        wait_for_all()
        return self

    def _begin(self):
        if not self.overwrite and not self.begun.exists():
            if self.result in self.outputs and self.result.exists():     # it was not when this process began
                fail(f"{self.result} has just been made by another process; the same command repeats it")
            for old in self.outputs:
                if old.exists():
                    fail(f"{old} is there, but no word of what it was made with; move it away, or {AGAIN}, which removes it")
        with writable(self.result):
            self.folder.mkdir(parents=True, exist_ok=True)
            self.lock = open(self.folder / "lock", "a+")
            try:
                fcntl.lockf(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)                    # not inherited, as flock is
            except (BlockingIOError, PermissionError):
                self.lock.seek(0)
                fail(f"{self.result} is being made by process {self.lock.read()}; wait for it, or stop it")
            if self.begun.exists() and not self.overwrite:
                stored = load_json(self.begun, AGAIN, self.identity)
                check_same(stored["args"], self.identity["args"], self.result)
                check_origin(stored["made_from"], self.identity["made_from"], self.result)
                self.earlier = stored.get("seconds", 0)
            else:
                for old in [self.begun, *self.folder.glob("*.pt"), *self.outputs]:
                    old.unlink(missing_ok=True)
                    with suppress(OSError):
                        old.parent.rmdir()                           # of a class that is no more
                save_json(self.begun, self.identity)
            self.lock.truncate(0)
            print(os.getpid(), "on", platform.node(), end="", file=self.lock, flush=True)

    def read(self, piece="state"):
        """The state of a piece as it was last kept, or None."""
        kept = self._kept(piece)
        return kept and kept["state"]

    def load(self, piece="state"):
        """The same, and torch's generators are as they were."""
        if kept := self._kept(piece):
            first, *others = kept["generators"]
            torch.set_rng_state(first)
            if others and torch.cuda.is_initialized():
                torch.cuda.set_rng_state(others[0])
        return kept and kept["state"]

    def _kept(self, piece):
        path = self.folder / f"{piece}.pt"
        return load_torch(path, AGAIN, ("state", "generators")) if path.exists() else None

    def states(self):
        """Those of all pieces."""
        return [self.read(path.stem) for path in sorted(self.folder.glob("*.pt"))]

    def keep(self, state, piece="state"):
        """Save what state() gives if it is time to; after a signal at once, and end."""
        if Work.stopped_by or time.monotonic() - self.kept >= self.period:
            self.save(state(), piece)
            if Work.stopped_by:
                without = " without --overwrite" * self.overwrite
                sys.stderr.write(f"{self.result}: kept how far it is; the same command{without} goes on\n")
                raise SystemExit(128 + Work.stopped_by)

    def save(self, state, piece="state"):
        generators = [torch.get_rng_state(), *([torch.cuda.get_rng_state()] if torch.cuda.is_initialized() else [])]
        save_torch(self.folder / f"{piece}.pt", {"state": state, "generators": generators})
        if rank() == 0:
            save_json(self.begun, self.identity | {"seconds": self.seconds()})
        self.kept = time.monotonic()

    def seconds(self):
        return self.earlier + time.monotonic() - self.entered

    def drop(self, piece="state"):
        (self.folder / f"{piece}.pt").unlink(missing_ok=True)

    def __exit__(self, kind, error, trace):
        Work.going_on -= 1
        if rank() == 0:
            if kind is None:
                shutil.rmtree(self.folder, ignore_errors=True)
            self.lock.close()
        if Work.stopped_by and not Work.going_on and (kind is None or issubclass(kind, RuntimeError)):
            raise SystemExit(128 + Work.stopped_by) from None        # RuntimeError: a collective's other end has stopped


def check_training(finite, model, what, flag="--lr"):
    """Stop when a loss (of `Finite`) was not finite, or a weight is not.   flag: that of the learning rate"""
    if found := finite.first():
        fail(f"{what}: the loss is not finite in step {found[0]}; use a smaller {flag}")
    for name, value in model.state_dict().items():
        if not value.isfinite().all():
            fail(f"{what}: {name} is not finite after the last step; use a smaller {flag}")


class Finite:
    """When values first were not finite; a GPU is asked in `first` alone."""

    def __init__(self, names, device):
        self.names, self.steps = list(names), torch.full((len(names),), sys.maxsize, device=device)

    def see(self, step, *values):
        self.steps = torch.where(torch.stack(values).isfinite(), self.steps, self.steps.clamp(max=step))

    def first(self):
        """-> (step, names), or None"""
        steps = self.steps.tolist()
        return None if min(steps) == sys.maxsize else (
            min(steps), " and ".join(name for name, step in zip(self.names, steps) if step == min(steps)))


class Progress:
    """A line with the time left: redrawn on a terminal, a new one every half minute elsewhere."""

    def __init__(self, what, total, every=30):
        self.what, self.total, self.done, self.before = what, total, 0, 0
        self.terminal = sys.stdout.isatty()
        self.every = math.inf if rank() else 0.2 if self.terminal else every
        self.started = self.shown = time.time()

    def skip(self, count):
        """What an earlier process has done."""
        self.done, self.before = self.done + count, self.before + count

    def step(self, text="", count=1):
        self.done += count
        now = time.time()
        if now - self.shown < self.every and (self.done < self.total or rank()):
            return
        self.shown = now
        spent = now - self.started
        left = spent / (self.done - self.before) * (self.total - self.done)
        line = f"{self.what}  {self.done}/{self.total}  {clock(spent)}, {clock(left)} left  {text() if callable(text) else text}"
        last = "\n" if self.done >= self.total or not self.terminal else ""
        print(f"\r{line[:150]:<100}" if self.terminal else line, end=last or "", flush=True)


def clock(seconds):
    return f"{int(seconds) // 3600}:{int(seconds) // 60 % 60:02}:{int(seconds) % 60:02}"
