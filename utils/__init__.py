"""What the five scripts share; a room each, and no room imports another."""
import os
import sys


def fail(message):
    """End on a user's mistake: one line on stderr, exit code 2."""
    rank = os.environ.get("RANK", "0")                               # of torchrun
    print(*[f"[rank {rank}]"] * (rank != "0"), *str(message).split(), file=sys.stderr, flush=True)
    raise SystemExit(2)
