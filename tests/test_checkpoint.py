"""Properties of `Checkpoint`: a saved state comes back, whatever ended the process, and only to the work that
it belongs to."""
import json
import os
import random
import resource
import signal
import sys
import time
from types import SimpleNamespace

import pytest
import torch

from utils.checkpoint import Checkpoint
from utils.processes import signals


@pytest.fixture(autouse=True)
def no_signal():
    yield
    signals.stopped_by, signals.checkpoints = None, 0


@pytest.fixture
def begin(tmp_path):
    """begin(...): a Checkpoint of one result, with the arguments and inputs of a phase."""
    def checkpoint(lr=0.1, weights="a", overwrite=False, minutes=0, **how):
        args = SimpleNamespace(lr=lr, overwrite=overwrite, checkpoint_minutes=minutes)
        return Checkpoint(tmp_path / "result.json", args, {"weights": weights}, **how)
    return checkpoint


@pytest.fixture
def child(tmp_path):
    """child(function): what a forked process printed on stderr, and how it ended: its exit code, or minus the
    signal."""
    def forked(function, at_work=lambda pid: None):
        if not (pid := os.fork()):
            code = 1
            try:
                sys.stderr = open(tmp_path / "errors", "w", buffering=1)
                function()
                code = 0
            except SystemExit as end:
                code = end.code
            finally:
                os._exit(code)
        at_work(pid)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        return (tmp_path / "errors").read_text(), code
    return forked


class Crash(Exception):
    pass


def crashed(checkpoint, *states, piece="state"):
    """Work that keeps states and then breaks."""
    with pytest.raises(Crash), checkpoint as work:
        for state in states:
            work.save_if_due(lambda: state, piece)
        raise Crash


def told(capsys, checkpoint):
    """The line with which a checkpoint refuses to go on."""
    with pytest.raises(SystemExit) as end, checkpoint:
        pass
    line = capsys.readouterr().err
    assert end.value.code == 2 and line.count("\n") == 1
    return line


def test_new_work_has_no_state_and_finished_work_leaves_nothing(begin, tmp_path):
    with begin() as work:
        assert work.load() is None and work.states() == []
        work.save_if_due(lambda: 1)
        assert len(list(tmp_path.iterdir())) == 1
    assert not list(tmp_path.iterdir())


def test_a_state_comes_back_with_torchs_generator(begin):
    torch.manual_seed(0)
    with pytest.raises(Crash), begin() as work:
        torch.rand(5)
        work.save_if_due(lambda: {"step": 3, "weights": torch.eye(2)})
        expected = torch.rand(5)
        raise Crash
    torch.manual_seed(7)
    with begin() as work:
        other = torch.get_rng_state()
        assert work.read()["step"] == 3 and torch.equal(torch.get_rng_state(), other)
        state = work.load()
        assert state["step"] == 3 and torch.equal(state["weights"], torch.eye(2))
        assert torch.equal(torch.rand(5), expected)


@pytest.mark.parametrize("minutes, kept", [(0, 3), (60, None)])
def test_a_state_is_asked_for_and_saved_when_it_is_time(minutes, kept, begin):
    asked = []
    with pytest.raises(Crash), begin(minutes=minutes) as work:
        for step in 1, 2, 3:
            work.save_if_due(lambda: asked.append(step) or step)
        raise Crash
    assert asked == ([1, 2, 3] if kept else [])
    with begin() as work:
        assert work.load() == kept


def test_pieces_have_states_of_their_own(begin):
    with pytest.raises(Crash), begin() as work:
        for piece, state in ("a", 1), ("b", 2), ("a", 3):
            work.save_if_due(lambda: state, piece)
        work.save_if_due(lambda: 4, "c")
        work.drop("c")
        raise Crash
    with begin() as work:
        assert (work.load("a"), work.load("b"), work.load("c")) == (3, 2, None) and work.states() == [3, 2]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("overwrite, words", [(False, "progress saved; the same command goes on"),
                                              (True, "the same command without --overwrite")])
def test_after_a_signal_the_next_step_is_kept_at_once_and_ends_the_process(number, overwrite, words, begin,
                                                                           capsys):
    with pytest.raises(SystemExit) as end, begin(minutes=60, overwrite=overwrite) as work:
        work.save_if_due(lambda: 1)
        signals.stopped_by = number
        work.save_if_due(lambda: 2)
    assert end.value.code == 128 + number and words in capsys.readouterr().err
    signals.stopped_by = None
    with begin() as work:
        assert work.load() == 2


def test_killed_at_any_moment_the_state_is_whole_and_no_older_than_was_said(begin, child, tmp_path):
    """A child keeps ever larger states and says so after each; a state that is loaded is one of them, or the
    next."""
    last, said = 0, tmp_path / "said"
    said.write_text("0")

    def count():
        with begin() as work:
            step = (work.load() or {"step": 0})["step"]
            while True:
                step += 1
                work.save_if_due(lambda: {"step": step, "weights": torch.full((20_000,), float(step))})
                os.pwrite(file, f"{step:09}".encode(), 0)

    def kill(pid):
        while int(said.read_text()) <= last:
            time.sleep(0.001)
        time.sleep(random.uniform(0, 0.02))
        os.kill(pid, signal.SIGKILL)

    file = os.open(said, os.O_RDWR)
    for _ in range(8):
        assert child(count, kill)[1] == -signal.SIGKILL
        with pytest.raises(Crash), begin(minutes=60) as work:
            state = work.load()
            assert 0 <= state["step"] - int(said.read_text()) <= 1 and (state["weights"]
                                                                        == state["step"]).all()
            last = state["step"]
            raise Crash
    os.close(file)


def test_a_full_disk_is_told_in_a_line_and_what_was_kept_stays(begin, child, tmp_path):
    def fill():
        with begin() as work:
            work.save_if_due(lambda: torch.zeros(9))
            # no file may grow beyond it
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
            work.save_if_due(lambda: torch.ones(9))

    errors, code = child(fill)
    assert code == 2 and errors.count("\n") == 1
    assert "cannot be written (File too large)" in errors and str(tmp_path) in errors
    assert "--run-dir" in errors
    with begin() as work:
        assert torch.equal(work.load(), torch.zeros(9))


@pytest.mark.parametrize("changes, words", [
    ({"lr": 0.5}, ["--lr 0.1 (now 0.5)", "--overwrite"]),
    ({"weights": "b"}, ["other weights", "--overwrite"])])
def test_unfinished_work_goes_on_with_the_same_arguments_and_inputs_alone(changes, words, begin, capsys):
    crashed(begin(), 1)
    line = told(capsys, begin(**changes))
    assert all(word in line for word in words)
    with begin(**changes, overwrite=True) as work:
        assert work.load() is None


def test_starting_again_removes_what_was_kept_and_written(begin, tmp_path):
    crashed(begin(outputs=[tmp_path / "labels.npy"]), 1)
    for name in "result.json", "labels.npy":
        (tmp_path / name).write_text("old")
    with pytest.raises(Crash), begin(overwrite=True, outputs=[tmp_path / "labels.npy"]) as work:
        assert work.load() is None and not list(tmp_path.glob("*.*"))[1:]
        raise Crash


@pytest.mark.parametrize("name", ["result.json", "labels.npy"])
def test_what_nobody_knows_the_making_of_is_not_touched(name, begin, tmp_path, capsys):
    (tmp_path / name).write_text("old")
    assert name in told(capsys, begin(outputs=[tmp_path / "labels.npy"]))
    assert (tmp_path / name).read_text() == "old"


def test_a_result_that_is_extended_stays_until_the_larger_one_is_there(begin, tmp_path):
    (tmp_path / "result.json").write_text("small")
    crashed(begin(extends=True), 1)
    with begin(extends=True) as work:
        assert work.load() == 1 and (tmp_path / "result.json").read_text() == "small"


def test_two_processes_do_not_work_on_one_result(begin, child, tmp_path, capsys):
    def hold():
        with begin() as work:
            work.save_if_due(lambda: 1)
            (tmp_path / "ready").touch()
            time.sleep(60)

    def meet(pid):
        while not (tmp_path / "ready").exists():
            time.sleep(0.001)
        for overwrite in False, True:
            line = told(capsys, begin(overwrite=overwrite))
            assert f"is being made by process {pid} " in line and "wait for it" in line
        os.kill(pid, signal.SIGKILL)

    child(hold, meet)
    with begin() as work:
        assert work.load() == 1


def test_the_seconds_of_all_processes_add_up(begin, tmp_path):
    crashed(begin(), 1)
    begun, = tmp_path.glob(".*/begun.json")
    begun.write_text(json.dumps(json.loads(begun.read_text()) | {"seconds": 1000}))
    with begin() as work:
        assert 1000 < work.seconds() < 1010


@pytest.mark.parametrize("content", [b"", b"half", b"404: Not Found\n"])
@pytest.mark.parametrize("name", ["begun.json", "state.pt"])
def test_damaged_unfinished_work_is_named(name, content, begin, tmp_path, capsys):
    crashed(begin(), 1)
    path, = tmp_path.glob(f".*/{name}")
    path.write_bytes(content)
    with pytest.raises(SystemExit) as end, begin() as work:
        work.load()
    line = capsys.readouterr().err
    assert end.value.code == 2 and line.count("\n") == 1 and name in line and "--overwrite" in line
