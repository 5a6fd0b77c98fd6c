"""The processes of torchrun, and the signals that end them."""
import signal
import sys
import time
from contextlib import contextmanager
from types import SimpleNamespace

import torch
import torch.distributed as dist

signals = SimpleNamespace(stopped_by=None, stopped_at=0, checkpoints=0)    # which came, when; open `Checkpoint`s


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def world_size():
    """Number of processes, 1 without torchrun."""
    return dist.get_world_size() if dist.is_initialized() else 1


def shard(work):
    """This process's share of a list or tensor: every `world_size`-th."""
    return work[rank()::world_size()]


def barrier():
    """Returns when every process of torchrun has come here."""
    if world_size() > 1:
        arrived = dist.all_reduce(torch.zeros(1), async_op=True)
        while not arrived.is_completed():                            # not in `wait`, where no signal would be heard
            if signals.stopped_by:
                raise SystemExit(128 + signals.stopped_by)
            time.sleep(0.02)
        try:
            arrived.wait()
        except RuntimeError:
            raise SystemExit("another process has ended before its work was done") from None


@contextmanager
def rank0_first():
    """One process runs the block, and may leave files there, before the others do."""
    if rank():
        barrier()
    yield
    if rank() == 0:
        barrier()


def print_rank0(*words):
    """Print, once for all processes."""
    if rank() == 0:
        print(*words, flush=True)


def warn(message):
    """One line on stderr, once for all processes."""
    if rank() == 0:
        sys.stderr.write(f"warning: {' '.join(message.split())}\n")


def stop(number, frame):
    """On a signal: end, once the work's state is kept; at once where there is none, or at a second one. Launchers and
    terminals together may send the first one twice."""
    if not signals.checkpoints or (signals.stopped_by and world_size() == 1 and time.monotonic() > signals.stopped_at + 1):
        signal.signal(number, signal.SIG_IGN)
        raise SystemExit(128 + number)
    if not signals.stopped_by:
        signals.stopped_by, signals.stopped_at = number, time.monotonic()
