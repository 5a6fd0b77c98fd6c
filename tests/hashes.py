"""Every method through all phases, small, and sha256 of each image, label file, weight and accuracy: what a
change of the code must leave as it is.

python -m tests.hashes before.txt        # at one commit
python -m tests.hashes after.txt         # at another, on the same machine, with as many threads
diff before.txt after.txt
"""
import argparse
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import redirect_stderr, redirect_stdout, suppress
from functools import cache
from importlib import import_module
from io import StringIO
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from utils import PHASES, data

ROOT = Path(__file__).resolve().parents[1]
SMALL = {
    "squeeze": "--epochs 2 --batch-size 32",
    "collect_stats": "--batch-size 50",
    "recover": "--iterations 12",
    "relabel": "--epochs 3",
    "train_eval": "--epochs 3 --student-seeds 0 1 --evaluations 2",
}
TWO, ONE = "--backbones convnet_w8 wrn10_1", "--backbones wrn10_1"
MOCO, SCORES = "--batch-size 32 --queue 64 --probe-epochs 2", "--score-trials 2 --score-epochs 2"
POOL = "--backbones wrn10_1@1 wrn10_1@2"
CASES = {   # name: {phase, or * for all: flags}
    "gvbsm": {"*": TWO},
    "best": {"*": f"{TWO} --preset best --tag best"},
    "classes": {"*": f"{TWO} --tag classes --teachers classes", "collect_stats": "--class-statistics",
                "recover": "--class-statistics --init real --flip --roll 3 --crop pad2",
                "train_eval": "--labels online"},
    "plain": {"*": f"{TWO} --tag plain", "recover": "--statistics plain --groups-per-step 2",
              "train_eval": "--labels hard"},
    "crops": {"*": f"{TWO} --tag crops", "recover": "--init crops --mosaic 2 --unit-gradients --choice cycle",
              "train_eval": "--protocol continual --steps 2 --orders 2 --student-seeds 0"},
    "random": {"*": f"{TWO} --method random", "train_eval": "--protocol prune --students wrn10_1 "
               "--student-seeds 0"},
    "herding": {"*": f"{TWO} --method herding"},
    "kcenter": {"*": f"{TWO} --method kcenter"},
    "forgetting": {"*": f"{TWO} --method forgetting"},
    "sre2l": {"*": f"{ONE} --method sre2l"},
    "cda": {"*": f"{ONE} --method cda"},
    "scdd": {"*": f"{ONE} --method scdd", "squeeze": MOCO},
    "teddy": {"*": "--method teddy", "squeeze": f"{ONE} --save-epochs 1:2:1 --pruned 2",
              "collect_stats": POOL, "recover": f"{POOL} --subset 2", "relabel": POOL, "train_eval": POOL},
    "dm": {"*": f"{ONE} --method dm", "recover": "--iterations 3 --batch-size 8"},
    "bilp": {"*": f"{ONE} --method bilp", "squeeze": SCORES,
             "recover": "--iterations 3 --batch-size 8 --adaptive-period 2"},
}


def flags(case, phase, runs):
    shared = f"--dataset shapes --ipc 2 --device cpu --precision tf32 --workers 0 --run-dir {runs}"
    students = "--students convnet_w8" * (phase == "train_eval")
    return f"{shared} {SMALL[phase]} {students} {CASES[case]['*']} {CASES[case].get(phase, '')}".split()


@cache
def few_shapes(split, drawn=data.draw_shapes):
    """`shapes` with 20 training and 10 test images a class."""
    images, labels = drawn(split)
    rows = torch.arange(len(labels)).view(len(data.SHAPES),
                                          -1)[:, :20 if split == "train" else 10].flatten().numpy()
    return images[rows], labels[rows]


def run(case, runs):
    """All phases of a case in this process; what is there already is not made again."""
    for phase in PHASES:
        with redirect_stdout(StringIO()) as out, redirect_stderr(out):
            try:
                import_module(phase).main(flags(case, phase, runs))
            except SystemExit as end:
                if end.code:
                    raise SystemExit(f"{case}, {phase}.py: {out.getvalue()}") from None


def one_phase(case, phase, runs):
    """A process with one phase of a case, on the few shapes."""
    return [sys.executable, "-c", "import sys; from tests import hashes; hashes.main(sys.argv[1:])",
            "--phase", case, phase, str(runs)]


def interrupted(runs):
    """`gvbsm`, each phase killed once when its unfinished work is there, and continued."""
    for phase in PHASES:
        command = one_phase("gvbsm", phase, runs)
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while process.poll() is None and not list(Path(runs).rglob(".*.unfinished/*.pt")):
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()
        subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)


def torchrun(runs):
    """`gvbsm` by two processes."""
    for phase in PHASES:
        command = one_phase("gvbsm", phase, runs)
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2",
                  "--no-python"]
        subprocess.run(launch + command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL,
                       stderr=subprocess.DEVNULL)


def digest(value, into):
    """Feed tensors and plain values, whatever their nesting, to a hash."""
    if isinstance(value, dict):
        for key in sorted(value, key=str):
            digest(str(key), into)
            digest(value[key], into)
    elif isinstance(value, (list, tuple)):
        for part in value:
            digest(part, into)
    elif torch.is_tensor(value):
        into.update(repr((tuple(value.shape), value.dtype)).encode())
        into.update(value.contiguous().view(-1).view(torch.uint8).numpy().tobytes() if value.numel() else b"")
    else:
        into.update(repr(value).encode())


ARTEFACTS = {".png", ".npy", ".pt", ".json"}
# of a .pt
WEIGHTS = "weights", "top1", "forgetting", "kept", "widths", "statistics", "class_statistics", "scores"
METRICS = "top1", "top1_per_seed", "top1_by_epoch", "first_bn_variance", "images", "image_set"  # of a .json


def hashes(runs):
    """{path: sha256 of what was computed}, whatever else a file says of its making."""
    found = {}
    for path in sorted(path for path in Path(runs).rglob("*") if path.suffix in ARTEFACTS and path.is_file()):
        into = hashlib.sha256()
        if path.suffix == ".pt":
            stored = torch.load(path, weights_only=True)
            digest({key: stored[key] for key in WEIGHTS if key in stored}, into)
        elif path.suffix == ".json":
            stored = json.loads(path.read_text())
            digest({key: stored[key] for key in METRICS if key in stored}, into)
        else:
            into.update(path.read_bytes())
        found[path.relative_to(runs).as_posix()] = into.hexdigest()
    return found


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", nargs="?", help="file for the hashes; standard output without it")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--no-processes", action="store_true",
                        help="leave out the killed run and the one by torchrun")
    parser.add_argument("--phase", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    data.draw_shapes = few_shapes
    torch.set_num_threads(1)
    if args.phase:
        case, phase, runs = args.phase
        often = ["--checkpoint-minutes", "0"] * ("killed" in runs)
        return import_module(phase).main(flags(case, phase, runs) + often)
    lines = []
    with TemporaryDirectory() as folder:
        os.environ["OMP_NUM_THREADS"] = "1"
        others = {} if args.no_processes else {"killed": interrupted, "torchrun": torchrun}
        with ThreadPoolExecutor() as pool:
            waiting = [pool.submit(others[name], Path(folder, name)) for name in others]
            for case in args.cases:
                started = time.time()
                run(case, Path(folder, "all"))
                print(f"{case}: {time.time() - started:.1f} s", file=sys.stderr)
            for one in waiting:
                one.result()
        for name in ["all", *others]:
            lines += [f"{value}  {name}/{path}" for path, value in hashes(Path(folder, name)).items()]
    text = "".join(f"{line}\n" for line in lines)
    with suppress(TypeError):
        Path(args.out).write_text(text)
    print(f"{len(lines)} artefacts, all together {hashlib.sha256(text.encode()).hexdigest()}")
    if not args.out:
        print(text, end="")


if __name__ == "__main__":
    main()
