"""Two processes of torchrun, with gloo on CPUs, make what one makes. Where torchrun itself does not matter,
they are forked with what it would tell them."""
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from importlib import import_module
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F

from models import build_model
from tests.helpers import assert_near
from utils import ddp, processes

ROOT = Path(__file__).resolve().parents[1]


def torchrun(project, phase, *flags, processes=2):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}",
               ROOT / f"{phase}.py", *project.arguments(phase, *flags)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def work(rank, port, phase, arguments, printed):
    """A phase as one of two processes of torchrun."""
    os.environ |= dict(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2",
                       MASTER_ADDR="localhost", MASTER_PORT=str(port))
    sys.stdout = open(f"{printed}-{rank}", "w")
    torch.set_num_threads(1)
    import_module(phase).main(arguments)
    sys.stdout.close()


def together(project, phase, *flags):
    """A phase in two processes.   -> its RESULTs"""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    printed = project.root / phase
    arguments = port, phase, project.arguments(phase, *flags), printed
    mp.start_processes(work, arguments, nprocs=2, start_method="forkserver")
    return results_in(Path(f"{printed}-0").read_text())


def results_in(text):
    lines = [json.loads(line.removeprefix("RESULT ")) for line in text.splitlines()
             if line.startswith("RESULT ")]
    results = [json.loads(Path(line["file"]).read_text()) for line in lines]
    assert results and all(result["processes"] == 2 for result in results)
    return results


def made(project, *kinds):
    return {path.relative_to(project.root).as_posix(): path.read_bytes()
            for kind in kinds for path in project.results.rglob(kind)}


def copy(project, new_project):
    other = new_project(project.dataset)
    shutil.copytree(project.root / "runs", other.root / "runs")
    return other


@pytest.mark.slow
def test_squeeze_trains_as_one_process_up_to_rounding(project, new_project):
    """At a small learning rate, at which rounding does not grow; batches of 5 images, and a last one of 2."""
    flags = ("--epochs 2 --batch-size 5 --lr 0.001 --overwrite --save-epochs 1:1:1 --pruned 1 --prune-ratio "
             "0.34 "
             "--score-trials 3 --score-epochs 2 --score-batch-size 20")
    project.call("squeeze", flags)
    both = new_project(project.dataset)
    result, = together(both, "squeeze", flags)
    for name in (name + kind for name in ("convnet_w8", "wrn10_1") for kind in ("", "@1", "@pruned1")):
        one, two = (torch.load(each.teachers / f"{name}.pt", weights_only=True) for each in (project, both))
        assert torch.equal(one["kept"], two["kept"]) and len(one["kept"]) == 32
        if "@" not in name:
            assert all(torch.equal(one["forgetting"][key], two["forgetting"][key])
                       for key in ("events", "learned"))
        assert two["top1"] == result["top1"][name] == pytest.approx(one["top1"], abs=100 / 24 + 1e-6)
        for key, value in one["weights"].items():
            torch.testing.assert_close(two["weights"][key], value, rtol=2e-3, atol=2e-4)


@pytest.mark.slow
def test_statistics_are_those_of_one_process(project, new_project):
    both = copy(project, new_project)
    flags = "--overwrite --batch-size 7 --class-statistics"
    project.call("collect_stats", flags)
    process = torchrun(both, "collect_stats", flags)
    out, err = process.communicate(timeout=600)
    assert process.returncode == 0 and results_in(out), err
    for name in "convnet_w8", "wrn10_1":
        one, two = (torch.load(each.teachers / f"{name}.stats.pt", weights_only=True)
                    for each in (project, both))
        for kind in "statistics", "class_statistics":
            for layer in one[kind]:
                for mine, theirs in zip(one[kind][layer], two[kind][layer], strict=True):
                    torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_images_labels_and_accuracies_have_the_bytes_of_one_process(project, new_project):
    both = copy(project, new_project)
    for phase, flags in [("recover", "--ipc 3"), ("relabel", "--ipc 3"),
                         ("train_eval", "--ipc 3 --students convnet_w8 wrn10_1 --student-seeds 0 1 2")]:
        project.call(phase, flags)
        results = together(both, phase, flags)
        assert len(results) == (2 if phase == "train_eval" else 1)
    kinds = "*.png", "*.npy", "log*.jsonl"
    assert made(both, *kinds) == made(project, *kinds) and len(made(both, *kinds)) == 3 * 4 + 1 + 6 + 1
    for name in "convnet_w8", "wrn10_1":
        one, two = (json.loads((each.run("gvbsm-ipc3") / f"eval/{name}.json").read_text())
                    for each in (project, both))
        assert one["top1_by_epoch"] == two["top1_by_epoch"] and one["made_from"] == two["made_from"]
    assert not list(both.root.rglob("*.unfinished"))


@pytest.mark.slow
def test_classes_in_steps_give_the_accuracies_of_one_process(project, new_project):
    flags = "--protocol continual --steps 2 --orders 2"
    for phase in "recover", "relabel":
        project.call(phase)
    both = copy(project, new_project)
    expected, (result,) = project.call("train_eval", flags), together(both, "train_eval", flags)
    timeless = {key: value for key, value in expected.items() if "top1" in key or "curve" in key}
    assert timeless.items() <= result.items() and len(result["curves"]) == 2


def wait_for(pattern, folder, process):
    while not (found := list(folder.rglob(pattern))):
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    return found[0]


@pytest.mark.slow
def test_a_process_that_dies_ends_all_and_a_restart_with_any_number_goes_on(project, new_project):
    both, flags = copy(project, new_project), "--iterations 100 --checkpoint-minutes 0.001 --batch-size 2"
    process = torchrun(both, "recover", flags)
    lock = wait_for("lock", both.root, process)
    wait_for("batch*.pt", both.root, process)
    os.kill(int(lock.read_text().split()[0]), signal.SIGKILL)
    out, err = process.communicate(timeout=600)
    assert process.returncode == 1 and "Signal 9 (SIGKILL)" in err and "RESULT" not in out
    assert list(both.root.rglob("batch*.pt"))
    both.call("recover", flags)
    project.call("recover", flags)
    assert made(both, "*.png", "log*.jsonl") == made(project, "*.png", "log*.jsonl")


@pytest.mark.slow
def test_a_signal_to_torchrun_keeps_the_work_of_every_process(project, new_project):
    both, flags = copy(project, new_project), "--iterations 4000 --batch-size 4"
    process = torchrun(both, "recover", flags)
    for log in "log.jsonl", "log-1.jsonl":
        path = wait_for(log, both.root, process)
        while path.read_text().count("\n") < 2:                      # at work
            time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=600)
    assert process.returncode and err.count("the same command goes on") == 2
    assert len(list(both.root.rglob("batch*.pt"))) == 2


@pytest.mark.slow
def test_a_mistake_is_told_and_ends_all(project):
    process = torchrun(project, "recover", "--teachers nobody")
    out, err = process.communicate(timeout=600)
    lines = [line for line in err.splitlines() if "nobody/convnet_w8.pt is missing" in line]
    assert process.returncode == 1 and 1 <= len(lines) <= 2
    assert err.count("Traceback (most recent call last)") == 1       # torchrun's own


# DistributedDataParallel and the norms over all processes, in float64

CASES = ("wrn10_1", 8), ("wrn10_1", 7), ("resnet18", 6), ("convnet_w8", 5)


def joint_steps(rank, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    torch.set_num_threads(1)
    for name, count in CASES:
        model, images, labels = example(name, count)
        network = ddp.in_parallel(model, torch.device("cpu"))
        for _ in range(2):
            loss = F.cross_entropy(network(ddp.share(images)), ddp.share(labels))
            (loss * ddp.share_weight(len(ddp.share(images)), count)).backward()
            step(model)
        if rank == 0:
            torch.save(model.state_dict(), folder / f"{name}-{count}.pt")
    dist.destroy_process_group()


def example(name, count):
    torch.manual_seed(0)
    return build_model(name, 4, 16).double(), torch.randn(count, 3, 16, 16).double(), torch.arange(count) % 4


@torch.no_grad()
def step(model):
    for parameter in model.parameters():
        parameter -= 0.05 * parameter.grad
        parameter.grad = None


@pytest.mark.slow
def test_two_steps_in_parallel_are_those_of_one_process(tmp_path):
    mp.start_processes(joint_steps, (tmp_path,), nprocs=2, start_method="forkserver")
    for name, count in CASES:
        model, images, labels = example(name, count)
        for _ in range(2):
            F.cross_entropy(model(images), labels).backward()
            step(model)
        joint = torch.load(tmp_path / f"{name}-{count}.pt", weights_only=True)
        for key, value in model.state_dict().items():
            torch.testing.assert_close(joint[key], value, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("rows, world", [(8, 2), (7, 3), (2, 2)])
def test_shares_make_up_a_batch_and_their_weights_the_mean(rows, world, monkeypatch):
    batch, losses = torch.arange(rows), torch.rand(rows, dtype=torch.float64)
    monkeypatch.setattr(processes, "world_size", lambda: world)
    monkeypatch.setattr(ddp, "world_size", lambda: world)
    parts = []
    for number in range(world):
        monkeypatch.setattr(processes, "rank", lambda: number)
        parts.append(ddp.share(batch))
    assert sorted(torch.cat(parts).tolist()) == batch.tolist()
    mean = sum(losses[part].mean() * ddp.share_weight(len(part), rows) for part in parts) / world
    assert_near(mean, losses.mean(), 1e-12)


def test_a_batch_too_small_for_all_is_everybodys(monkeypatch):
    monkeypatch.setattr(processes, "world_size", lambda: 4)
    monkeypatch.setattr(ddp, "world_size", lambda: 4)
    assert ddp.share(torch.arange(3)).tolist() == [0, 1, 2] and ddp.share_weight(3, 3) == 1
