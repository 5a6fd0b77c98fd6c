"""Unfinished work: killed at any moment, stopped by a signal, or interrupted after a step, a phase goes on
with the same command to the bytes of a run that nobody disturbed. Processes are forked from one that has
imported the scripts."""
import json
import os
import random
import resource
import shutil
import signal
import sys
import time
from functools import partial
from importlib import import_module
from types import SimpleNamespace

import pytest
import torch

import recover
import squeeze
import train_eval
from tests.conftest import Project
from tests.helpers import PHASES, forkserver
from utils import provenance

pytestmark = pytest.mark.slow
LONG = {  # flags with which a phase takes a second or so
    "squeeze": "--epochs 20 --batch-size 4", "collect_stats": "--batch-size 2",
    "recover": "--iterations 60 --batch-size 4", "relabel": "--epochs 120",
    "train_eval": "--epochs 20 --batch-size 2 --whole-up-to 0 --student-seeds 0 1 --students convnet_w8 "
    "wrn10_1 --labels hard"}
FAST = "--checkpoint-minutes 0.0005"
STEPS = {  # what a phase calls once in each of its steps, and how often
    "squeeze": ("apply_view", 2 * 20 * 12), "collect_stats": ("normalize", 2 * 24),
    "recover": ("matching_gradient", 2 * 60),
    "relabel": ("label_epoch", 120), "train_eval": ("student_loss", 2 * 2 * 20 * 4)}


def work(phase, arguments, at=0, action=None, errors=os.devnull):
    """A phase; action() comes in step `at`."""
    sys.stdout, sys.stderr = open(os.devnull, "w"), open(errors, "w")
    torch.set_num_threads(1)
    steps(phase, at, action)
    import_module(phase).main(arguments)


def steps(phase, at, action, put=setattr):
    """From now on the steps of a phase are counted in the list that is returned."""
    module, calls = import_module(phase), []
    function = getattr(module, STEPS[phase][0])

    def counting(*args, **kwargs):
        calls.append(1)
        if len(calls) == at:
            action()
        return function(*args, **kwargs)

    put(module, STEPS[phase][0], counting)
    return calls


def start(project, phase, *flags, **how):
    process = forkserver.Process(target=work, args=(phase, project.arguments(phase, *flags)), kwargs=how)
    process.start()
    return process


def be_busy(event):
    event.set()
    time.sleep(600)


def fill_the_disk():
    """As far as this process can tell: no file may grow beyond a kilobyte."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))


@pytest.fixture(scope="module")
def undisturbed(beasts, new_project):
    """A project after all phases, what was there before each, and how long each took."""
    project, before, seconds = new_project(beasts), {}, {}
    for phase in PHASES:
        before[phase], started = project.files(), time.monotonic()
        process = start(project, phase, LONG[phase])
        process.join()
        assert process.exitcode == 0
        seconds[phase] = time.monotonic() - started
    return SimpleNamespace(project=project, before=before, seconds=seconds, outputs=project.outputs())


@pytest.fixture
def halfway(undisturbed, new_project):
    """halfway(phase): a project where the phases before this one have run."""
    def until(phase):
        project = new_project(undisturbed.project.dataset)
        for name, entry in undisturbed.before[phase].items():
            if entry:
                (project.root / name).parent.mkdir(parents=True, exist_ok=True)
                (project.root / name).write_bytes(entry[0])
        return project
    return until


def check(project, phase, undisturbed):
    expected = {name: content for name, content in undisturbed.outputs.items() if name in project.outputs()}
    assert project.outputs() == expected and len(expected) > len([e
                                                                  for e in undisturbed.before[phase].values()
                                                                  if e])


@pytest.mark.parametrize("phase", PHASES)
def test_a_phase_killed_at_random_moments_goes_on_to_the_same_bytes(phase, undisturbed, halfway):
    project, kills = halfway(phase), []
    while len(kills) < 3:
        process = start(project, phase, LONG[phase], FAST)
        while process.is_alive() and not list(project.root.rglob(".*.unfinished/*.pt")):
            time.sleep(0.001)
        moment = random.uniform(0, 0.2)
        process.join(moment)
        process.kill()
        process.join()
        kills.append(moment)
        if process.exitcode == 0:                                    # the moment was too late
            project, kills = halfway(phase), []
    assert list(project.root.rglob(".*.unfinished/begun.json")), kills
    process = start(project, phase, LONG[phase])
    process.join()
    assert process.exitcode == 0, kills
    check(project, phase, undisturbed)


@pytest.fixture
def counted(monkeypatch):
    """`steps` until the test ends."""
    return partial(steps, put=monkeypatch.setattr)


@pytest.mark.parametrize("phase, number, share", [
    ("squeeze", signal.SIGTERM, 2 / 3), ("collect_stats", signal.SIGINT, 1),
    ("recover", signal.SIGINT, 2 / 3), ("relabel", signal.SIGTERM, 1), ("train_eval", signal.SIGTERM, 2 / 3)])
def test_a_signal_ends_the_phase_behind_the_step_at_work_and_nothing_is_done_twice(
        phase, number, share, undisturbed, halfway, counted, capsys):
    project, at = halfway(phase), int(share * STEPS[phase][1])
    done = counted(phase, at, lambda: os.kill(os.getpid(), number))
    with pytest.raises(SystemExit) as end:
        import_module(phase).main(project.arguments(phase, LONG[phase]))
    assert end.value.code == 128 + number and len(done) == at
    assert "the same command goes on" in capsys.readouterr().err
    left = counted(phase, 0, None)
    project.call(phase, LONG[phase])
    assert at + len(left) == STEPS[phase][1]
    check(project, phase, undisturbed)


@pytest.mark.parametrize("phase, flags", [("squeeze", "--epochs 2 --batch-size 8"),
                                          ("collect_stats", "--batch-size 8")])
def test_images_that_are_streamed_by_workers_go_on_too(phase, flags, bare, monkeypatch):
    flags += " --backbones wrn10_1 --crop resized --workers 1"
    if phase == "squeeze":
        flags += " --image-size 72"
    else:
        bare.call("squeeze", "--backbones wrn10_1 --crop resized --epochs 1 --image-size 72")
    module, done = import_module(phase), []
    whole, normalize = Project(bare.root / "whole", bare.dataset), module.normalize
    if (bare.root / "runs").exists():
        shutil.copytree(bare.root / "runs", whole.root / "runs")
    whole.call(phase, flags)

    def interrupting(*args):
        done.append(1)
        if len(done) == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return normalize(*args)

    monkeypatch.setattr(module, "normalize", interrupting)
    with pytest.raises(SystemExit, match="143"):
        module.main(bare.arguments(phase, flags))
    assert len(done) == 4
    bare.call(phase, flags)
    name = "wrn10_1.pt" if phase == "squeeze" else "wrn10_1.stats.pt"
    assert (bare.teachers / name).read_bytes() == (whole.teachers / name).read_bytes()


@pytest.mark.parametrize("phase, flags, step, file", [
    ("squeeze", "--backbones efficientnet_b0 --epochs 2", 3, "teachers/supervised/efficientnet_b0.pt"),
    ("train_eval", "--students efficientnet_b0 --labels hard --epochs 3", 2,
     "gvbsm-ipc2/eval/efficientnet_b0-hard.json")])
def test_networks_that_draw_while_they_train_go_on_with_the_same_numbers(
        phase, flags, step, file, undisturbed, halfway, counted):
    whole, project = halfway("train_eval"), halfway("train_eval")
    flags += " --batch-size 16 --lr 0.003"
    whole.call(phase, flags)
    counted(phase, step, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(SystemExit):
        import_module(phase).main(project.arguments(phase, flags))
    project.call(phase, flags)
    one, other = (project.outputs()[f"runs/{project.dataset.name}/{file}"] for project in (whole, project))
    assert one == other


def test_the_groups_of_a_pass_stay_while_they_are_asked_for_alike(halfway, counted):
    whole, project, groups = halfway("recover"), halfway("recover"), "--groups-per-step 2"
    whole.call("recover", groups)
    counted("recover", 3, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(SystemExit):
        recover.main(project.arguments("recover", groups))
    left = counted("recover", 0, None)
    project.call("recover", groups)
    assert len(left) == 3 and project.outputs() == whole.outputs()
    counted("recover", 3, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(SystemExit):
        recover.main(project.arguments("recover", groups, "--overwrite"))
    left = counted("recover", 0, None)
    project.call("recover", "--groups-per-step 1")
    assert len(left) == 2 * 6                                        # from the start, each batch alone


def test_a_summary_of_other_backbones_or_weights_is_not_repeated(bare):
    first = bare.call("squeeze")
    (bare.teachers / "squeeze.json").rename(bare.root / "old")
    bare.call("squeeze", "--seed 1 --overwrite")
    (bare.root / "old").rename(bare.teachers / "squeeze.json")       # a kill came before the new one
    assert bare.call("squeeze", "--seed 1")["args"]["seed"] == 1 != first["args"]["seed"]


def test_unfinished_training_on_other_data(bare, counted):
    counted("squeeze", 3, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(SystemExit):
        squeeze.main(bare.arguments("squeeze"))
    (bare.dataset / "train/bee/3.png").unlink()
    assert "the images of the data set have changed since" in bare.mistake("squeeze")


def test_what_a_kill_left_behind_a_result_goes(project):
    result = project.call("recover")
    folder = project.run() / ".result.json.unfinished"
    folder.mkdir()
    (folder / "lock").write_text("1 on a machine")
    assert project.call("recover") == result and not folder.exists()


def test_more_student_seeds_train_what_is_new_alone(halfway, counted):
    whole, project = halfway("train_eval"), halfway("train_eval")
    flags = "--epochs 6 --batch-size 2 --whole-up-to 0 --student-seeds"
    whole.call("train_eval", flags, "0 2 1")
    first = project.call("train_eval", flags, "2")
    assert "made with --gamma 0.15 (now 0.3);" in project.mistake("train_eval", flags, "0 2 1 --gamma 0.3")
    path = project.run() / "eval/convnet_w8.json"
    path.write_text(json.dumps(first | {"seconds": 1000}))
    counted("train_eval", 9, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(SystemExit):
        train_eval.main(project.arguments("train_eval", flags, "0 2 1"))
    # it stays until there is more, and that too
    assert project.call("train_eval", flags, "2") == first | {"seconds": 1000}
    left = counted("train_eval", 0, None)
    assert 1000 < project.call("train_eval", flags, "0 2 1")["seconds"] < 1100
    assert len(left) == 2 * 6 * 4 - 9 and project.outputs() == whole.outputs()
    assert "--student-seeds [0, 2, 1] (now [0, 1])" in project.mistake("train_eval", flags, "0 1")


@pytest.mark.parametrize("phase", PHASES)
def test_a_full_disk_ends_the_phase_in_one_line_and_what_was_kept_stays(phase, undisturbed, halfway,
                                                                        tmp_path):
    project = halfway(phase)
    process = start(project, phase, LONG[phase], "--checkpoint-minutes 0", at=40, action=fill_the_disk,
                    errors=tmp_path / "errors")
    process.join()
    told = (tmp_path / "errors").read_text()
    assert process.exitcode == 2 and told.count("\n") == 1
    assert "cannot be written (File too large)" in told and str(project.root) in told and "--run-dir" in told
    process = start(project, phase, LONG[phase])
    process.join()
    assert process.exitcode == 0
    check(project, phase, undisturbed)


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_before_there_is_anything_to_keep_ends_at_once(number, code, bare, monkeypatch):
    monkeypatch.setattr(squeeze, "load_split", lambda *_: os.kill(os.getpid(), number))
    with pytest.raises(SystemExit) as end:
        squeeze.main(bare.arguments("squeeze"))
    assert end.value.code == code and not (bare.root / "runs").exists()


@pytest.mark.parametrize("phase, flags, told", [
    ("recover", "--alpha 0.5", "--alpha 0.8 (now 0.5)"),
    ("train_eval", "--gamma 0.5", "--gamma 0.15 (now 0.5)")])
def test_unfinished_work_goes_on_with_the_same_arguments_and_in_one_process_alone(
        phase, flags, told, undisturbed, halfway):
    project, busy = halfway(phase), forkserver.Event()
    process = start(project, phase, LONG[phase], at=1, action=partial(be_busy, busy))
    assert busy.wait(60)
    for again in "", "--overwrite":
        line = project.mistake(phase, LONG[phase], again)
        assert f"is being made by process {process.pid} " in line and "wait for it" in line
    process.kill()
    process.join()
    line = project.mistake(phase, LONG[phase], flags)
    assert told in line and "--overwrite" in line
    project.call(phase, LONG[phase])
    check(project, phase, undisturbed)
    project.call(phase, LONG[phase], flags, "--overwrite")
    assert project.outputs().keys() <= undisturbed.outputs.keys()


@pytest.mark.parametrize("phase", ["collect_stats", "recover", "relabel"])
def test_unfinished_work_goes_on_with_the_same_files_alone(phase, halfway, counted):
    project = halfway(phase)
    counted(phase, 5, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(SystemExit):
        import_module(phase).main(project.arguments(phase, LONG[phase]))
    path = project.teachers / "convnet_w8.pt"
    record = torch.load(path, weights_only=True)
    torch.save(record | {"top1": 99.0}, path)
    if phase == "recover":  # else the statistics are said to be of other weights
        path = project.teachers / "convnet_w8.stats.pt"
        stored = torch.load(path, weights_only=True)
        torch.save(stored | {"checkpoint": provenance.fingerprint(project.teachers / "convnet_w8.pt")}, path)
    if phase == "relabel":
        recovered = project.run() / "result.json"
        result = json.loads(recovered.read_text())
        result["made_from"]["weights"]["convnet_w8"] = provenance.fingerprint(path)
        recovered.write_text(json.dumps(result))
    line = project.mistake(phase, LONG[phase])
    assert "was made from other weights (convnet_w8) than the present ones" in line and "--overwrite" in line
