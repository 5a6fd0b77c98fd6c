"""The README's commands are those that the scripts take, and what it points to exists."""
import re
import shlex
import subprocess
from importlib import import_module
from itertools import dropwhile
from pathlib import Path

import pytest

from utils import figures
from utils.cli import parse_args
from utils.data import preset_column

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
PHASES = "squeeze", "collect_stats", "recover", "relabel", "train_eval"
BLOCKS = re.findall(r"^```bash\n(.*?)^```", README, re.M | re.S)
FUNCTION = next(block for block in BLOCKS if block.startswith("distil()"))


def commands(block, tmp_path):
    """Run a block of the README with a `python` that only writes down its arguments.   -> lists of arguments"""
    log = tmp_path / "log"
    for name in "python", "pip", "torchrun":
        write = f'for word; do printf "%s\\n" "$word" >>"{log}"; done; echo . >>"{log}"'
        (tmp_path / name).write_text(f"#!/bin/sh\n{write}\n")
        (tmp_path / name).chmod(0o755)
    path = f"{tmp_path}:/usr/bin:/bin"
    subprocess.run(["bash", "-euc", FUNCTION + block], check=True, cwd=tmp_path, env={"PATH": path})
    return [call.split("\n") for call in log.read_text().split("\n.\n") if call] if log.exists() else []


@pytest.mark.parametrize("block", [pytest.param(block, id=re.sub(r"\W+", "-", block)[:40]) for block in BLOCKS])
def test_every_command_of_the_readme_is_understood(block, tmp_path):
    calls = [list(dropwhile(lambda word: word.startswith("--"), call)) for call in commands(block, tmp_path)]
    for _, _, name, *words in [call for call in calls if call[:2] == ["-m", "utils.figures"]]:
        figures.get_parser(name).parse_args(words)
    calls = [call for call in calls if call[0].endswith(".py")]
    assert calls or "-m" in block or block == FUNCTION
    for script, *argv in calls:
        phase = script.removesuffix(".py")
        parse_args(import_module(phase).get_parser(), phase, argv, preset_column)


def test_every_command_that_the_figures_begin_with_is_understood():
    lines = [shlex.split(line, comments=True)[3:] for line in figures.__doc__.splitlines() if line.startswith("    python -m")]
    assert [name for name, *_ in lines] == list(figures.FIGURES)
    for name, *words in lines:
        figures.get_parser(name).parse_args(words)


@pytest.mark.parametrize("phase", PHASES)
def test_every_script_begins_with_three_commands_that_it_understands(phase):
    module = import_module(phase)
    lines = [line.split("#")[0] for line in module.__doc__.splitlines() if line.startswith(f"python {phase}.py")]
    assert len(lines) == 3
    for line in lines:
        parse_args(module.get_parser(), phase, shlex.split(line)[2:], preset_column)


def test_every_test_and_function_the_equation_map_names_exists():
    section = re.search(r"^## Equations\n(.*?)^## ", README, re.M | re.S)[1]
    rows = [line.split("|") for line in section.splitlines() if re.match(r"\| \d", line)]
    assert {int(n) for row in rows for low, _, high in [row[1].strip().partition("-")]
            for n in range(int(low), int(high or low) + 1)} == set(range(1, 16))
    for _, _, _, functions, tests, _ in rows:
        for column, folder in (functions, ROOT), (tests, ROOT / "tests"):
            name = None
            for quoted in re.findall(r"`(.*?)`", column):
                name, _, function = quoted.rpartition(": ") if ".py" in quoted else (name, "", quoted)
                name, function = (name, function) if name else (function, "")
                pattern = rf"^(def|class) {function}\b" if function else ""
                assert re.search(pattern, (folder / name).read_text(), re.M), quoted
