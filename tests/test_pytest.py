"""How the tests themselves run: Ctrl-C stops them, whatever a phase did with signals before or does at that
moment."""
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

IN_A_TEST = """
@pytest.fixture(scope="session")
def random(beasts, new_project):
    return new_project(beasts).call("recover", "--method random")

def test_first(random):
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(9)
"""
IN_A_PHASE = """
def test_first(bare, monkeypatch):
    monkeypatch.setattr(squeeze, "load_split", lambda *_, **__: os.kill(os.getpid(), signal.SIGINT))
    squeeze.main(bare.arguments("squeeze"))
"""


@pytest.mark.slow
@pytest.mark.parametrize("text", [IN_A_TEST, IN_A_PHASE], ids=["in a test", "in a phase"])
def test_control_c_stops_pytest(text, tmp_path):
    test = tmp_path / "test_interrupted.py"
    test.write_text("import os, signal, time, pytest, squeeze\n" + text + "\ndef test_second():\n    pass\n")
    command = [sys.executable, "-m", "pytest", "-p", "tests.conftest", "-p", "no:cacheprovider", test]
    ended = subprocess.run(command, cwd=Path(__file__).resolve().parents[1], capture_output=True, text=True,
                           timeout=120,      # a shell's background job would ignore SIGINT
                           preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL))
    assert ended.returncode == pytest.ExitCode.INTERRUPTED, ended.stdout
    assert "KeyboardInterrupt" in ended.stdout and "passed" not in ended.stdout
    assert "failed" not in ended.stdout
