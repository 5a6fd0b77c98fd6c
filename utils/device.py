"""The machine: which device a phase runs on, whether bfloat16 saves time there, and what it used of it."""
import ctypes
import os
import platform
import resource
import sys
import time
from contextlib import suppress
from pathlib import Path

import torch
import torch.distributed as dist

from utils import fail
from utils.processes import rank, world_size


def pick_device(name: str, precision: str = "tf32") -> torch.device:
    """torch.device of --device; auto: cuda where there is one, else cpu. precision other than fp32: matrix
    products and convolutions in float32 use TF32 (10 bits of mantissa) on a GPU"""
    available = ["cuda"] * torch.cuda.is_available() + ["cpu"]
    try:
        device = torch.device(available[0] if name == "auto" else name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError):
        device = None
    if device is None or device.type not in available:
        fail(f"--device {name} is not available; use auto or one of: {' '.join(available)}")
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = precision != "fp32"
    if device.type == "cpu":
        keep_freed_memory()
    return device


def keep_freed_memory() -> None:
    """Let glibc keep what a step frees for the next one: handing pages back and faulting them in again took
    half of the CPU time of a training step."""
    with suppress(AttributeError):                                   # not in every C library
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-3, 1 << 30)                                         # M_MMAP_THRESHOLD, bytes
        mallopt(-1, 1 << 30)                                         # M_TRIM_THRESHOLD


def faster_in_bf16(device: torch.device) -> bool:
    """Whether bfloat16 saves time: the device multiplies it in hardware, and on a CPU a training step of a
    convolution takes at most 0.8 of the time in float32. avx512_bf16 alone does not tell: of two processors
    that have it, one took a third of the time and the other a third more. Rank 0 decides for all."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    units = (getattr(torch.cpu, f"_is_{unit}_supported", bool) for unit in ("avx512_bf16", "amx_tile"))
    faster = torch.tensor(any(has() for has in units) and rank() == 0)
    if faster:
        seconds = [[conv_step_seconds(narrow) for narrow in (False, True)] for _ in range(5)]
        full, narrow = map(min, zip(*seconds))
        faster.fill_(narrow < 0.8 * full)
    if world_size() > 1:
        dist.broadcast(faster, 0)
    return bool(faster)


def conv_step_seconds(narrow: bool) -> float:
    """Seconds of a 3x3 convolution forward and backward, in bfloat16 or float32; draws no random number."""
    images = torch.ones(64, 64, 16, 16).to(memory_format=torch.channels_last)
    weight = torch.ones(64, 64, 3, 3).to(memory_format=torch.channels_last).requires_grad_()
    started = time.perf_counter()
    with torch.autocast("cpu", torch.bfloat16, enabled=narrow):
        total = torch.nn.functional.conv2d(images, weight, padding=1).sum(dtype=torch.float32)
    total.backward()
    return time.perf_counter() - started


def busy_cores() -> str | None:
    """A line for people where more threads are at work than there are cores, since threads that wait for each
    other then cost more than they give; None with one thread, or where the system does not say."""
    with suppress(OSError, AttributeError):                          # not Linux
        load, _, _, running, _ = (Path("/proc") / "loadavg").read_text().split()
        cores, running = len(os.sched_getaffinity(0)), int(running.partition("/")[0])
        # the load average goes on counting the phase before
        if torch.get_num_threads() > 1 and min(float(load) + 0.5, running) > cores:
            return (f"note: {float(load):.0f} processes run on {cores} cores; OMP_NUM_THREADS=1 may be "
                    "several times faster")
    return None


def peak_memory() -> dict[str, int]:
    """Of this process so far, in MiB."""
    unit = 1 << 20 if sys.platform == "darwin" else 1024             # bytes there, KiB elsewhere
    memory = {"host_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // unit}
    if torch.cuda.is_available():
        memory["cuda_mib"] = torch.cuda.max_memory_allocated() >> 20
    return memory


def hardware() -> str:
    """Name of the GPU that was used, or of the CPU and the threads on it."""
    if torch.cuda.is_initialized():
        return torch.cuda.get_device_name()
    name, threads = platform.processor() or "CPU", torch.get_num_threads()
    with suppress(OSError, StopIteration):
        lines = (Path("/proc") / "cpuinfo").read_text().splitlines()
        name = next(line for line in lines if line.startswith("model name")).partition(":")[2].strip()
    return f"{name}, {threads} thread{'s' * (threads > 1)}"
