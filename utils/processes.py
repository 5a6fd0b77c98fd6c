"""The processes of torchrun, and the signals that end them."""
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import torch
import torch.distributed as dist

# stopped_by: the signal that came, at the time stopped_at; checkpoints: how many `Checkpoint`s are open
signals = SimpleNamespace(stopped_by=None, stopped_at=0, checkpoints=0)


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Number of processes, 1 without torchrun."""
    return dist.get_world_size() if dist.is_initialized() else 1


def shard(work):
    """This process's share of a list or tensor: every `world_size`-th."""
    return work[rank()::world_size()]


def barrier() -> None:
    """Wait until every process of torchrun has come here."""
    if world_size() > 1:
        arrived = dist.all_reduce(torch.zeros(1), async_op=True)
        while not arrived.is_completed():                            # `wait` would delay signals
            if signals.stopped_by:
                raise SystemExit(128 + signals.stopped_by)
            time.sleep(0.02)
        try:
            arrived.wait()
        except RuntimeError:
            raise SystemExit("another process has ended before its work was done") from None


@contextmanager
def rank0_first() -> Iterator[None]:
    """Process 0 runs the block, and may write files in it, before the others do."""
    if rank():
        barrier()
    yield
    if rank() == 0:
        barrier()


def print_rank0(*words: str) -> None:
    """Print, once for all processes."""
    if rank() == 0:
        print(*words, flush=True)


def warn(message: str) -> None:
    """One line on stderr, once for all processes."""
    if rank() == 0:
        sys.stderr.write(f"warning: {' '.join(message.split())}\n")


def stop(number: int, frame) -> None:
    """Handler of SIGINT and SIGTERM. An open `Checkpoint` ends the process once it has saved; without one, or
    at a second signal, it ends at once. Launchers and terminals may send the first twice within a second."""
    second = signals.stopped_by and world_size() == 1 and time.monotonic() > signals.stopped_at + 1
    if not signals.checkpoints or second:
        signal.signal(number, signal.SIG_IGN)
        raise SystemExit(128 + number)
    if not signals.stopped_by:
        signals.stopped_by, signals.stopped_at = number, time.monotonic()
