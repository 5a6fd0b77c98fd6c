"""What the five scripts share; a room each, and no room imports another."""
import os
import sys


def fail(message):
    """End on a user's mistake: one line on stderr, exit code 2."""
    rank = os.environ.get("RANK", "0")                               # of torchrun
    sys.stderr.write(" ".join([f"[rank {rank}]"] * (rank != "0") + str(message).split()) + "\n")
    raise SystemExit(2)
