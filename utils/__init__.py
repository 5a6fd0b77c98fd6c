"""What the five scripts share. Scripts meet through files and never import each other."""
import os
import sys
from typing import NoReturn

PHASES = "squeeze", "collect_stats", "recover", "relabel", "train_eval"


def fail(message: str | Exception) -> NoReturn:
    """End on a user's mistake: one line on stderr, exit code 2."""
    rank = os.environ.get("RANK", "0")                               # of torchrun
    told = " ".join(str(message).split())
    sys.stderr.write(f"{told}\n" if rank == "0" else f"[rank {rank}] {told}\n")
    raise SystemExit(2)


def one_of(name: str, value: str, first: str, second: str) -> None:
    """ValueError for another value."""
    if value not in (first, second):
        raise ValueError(f"{name} {value!r} is neither {first!r} nor {second!r}")
