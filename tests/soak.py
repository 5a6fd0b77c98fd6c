"""recover.py on `shapes`, killed many times in a row and continued, against the bytes of a run that nobody
disturbed.

    python -m tests.soak [--kills 30] [--processes 2]

Not part of the tests: some minutes. Prints each kill, and ends with code 1 if a byte differs.
"""
import argparse
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

ROOT = Path(__file__).resolve().parents[1]
FLAGS = "--dataset shapes --backbones convnet_w32 wrn10_1 --device cpu"


def command(phase, folder, *flags, processes=1):
    launcher = ["-m", "torch.distributed.run", "--standalone",
                f"--nproc-per-node={processes}"] if processes > 1 else []
    return [sys.executable, *launcher, ROOT / f"{phase}.py", *FLAGS.split(), "--run-dir", folder, *flags]


def results(folder):
    return {path.relative_to(folder): path.read_bytes() for kind in ("*.png", "log*.jsonl")
            for path in folder.rglob(kind)}


def how_far(folder):
    kept = [torch.load(path, weights_only=True)["state"] for path in folder.rglob("batch*.pt")]
    return f"{len(list(folder.rglob('images/*/*.png')))} images done, of others " + (
        ", ".join(f"batches {state['numbers']} at iteration {state['iterations']}" for state in kept)
        or "nothing kept")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--iterations", type=int, default=3000)
    parser.add_argument("--processes", type=int, default=1, help="of torchrun, in the run that is killed")
    args = parser.parse_args(argv)
    flags, quiet = ["--iterations", str(args.iterations)], {"stdout": subprocess.DEVNULL,
                                                            "stderr": subprocess.DEVNULL}
    os.environ["OMP_NUM_THREADS"] = "1"
    with TemporaryDirectory() as root:
        whole, killed = Path(root, "whole"), Path(root, "killed")
        for phase in "squeeze", "collect_stats":
            subprocess.run(command(phase, whole), check=True, **quiet)
        subprocess.run(["cp", "-r", whole, killed], check=True)
        started = time.monotonic()
        subprocess.run(command("recover", whole, *flags), check=True, **quiet)
        seconds = time.monotonic() - started
        print(f"undisturbed: {seconds:.0f} s", flush=True)
        for kill in range(args.kills):
            process = subprocess.Popen(command("recover", killed, *flags, "--checkpoint-minutes", "0.005",
                                               processes=args.processes), start_new_session=True, **quiet)
            time.sleep(moment := random.uniform(1, 6 + seconds / args.kills))
            if process.poll() is not None:
                print("it was done before; take more --iterations")
                return 1
            for pid in [process.pid, *children(process.pid)]:
                os.kill(pid, signal.SIGKILL)
            process.wait()
            print(f"kill {kill + 1} after {moment:.2f} s; {how_far(killed)}", flush=True)
        subprocess.run(command("recover", killed, *flags), check=True, **quiet)
        one, other = results(whole), results(killed)
        differing = sorted(str(name) for name in one.keys() | other.keys() if one.get(name)
                           != other.get(name))
        print(f"{len(one)} files, {len(differing)} differ: {' '.join(differing[:5])}")
        return bool(differing)


def children(pid):
    """Processes that a process has started."""
    listed = subprocess.run(["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True).stdout
    return [int(child) for child in listed.split()]


if __name__ == "__main__":
    sys.exit(main())
