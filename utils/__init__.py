"""What the five scripts share; a room each, and no room imports another."""
import sys


def fail(message):
    """End on a user's mistake: one line on stderr, exit code 2."""
    print(" ".join(str(message).split()), file=sys.stderr)
    raise SystemExit(2)
