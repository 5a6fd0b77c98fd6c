"""The pages: each command is one that the scripts take, each number is that of its file, each link leads
somewhere."""
import argparse
import ast
import re
import shlex
import subprocess
from importlib import import_module
from itertools import dropwhile, product
from pathlib import Path

import pytest
import torch
from PIL import Image

from utils import PHASES, figures, report
from utils.cli import parse_args
from utils.presets import METHODS

ROOT = Path(__file__).resolve().parents[1]
SIZES = {"README.md": 20_000, "utils/README.md": 30_000, "tests/README.md": 10_000,
         "tests/evidence/README.md": None, "tests/evidence/NOTES.md": 15_000}
PAGES = {name: (ROOT / name).read_text() for name in SIZES if (ROOT / name).exists()}
README = PAGES["README.md"]
BLOCK = re.compile(r"^```bash\n(.*?)^```", re.M | re.S)
FUNCTIONS = next(block for block in BLOCK.findall(README) if "distil()" in block)
INLINE = re.compile(r"`((?:python |torchrun |for |set |id=|distil |label )[^`]+)`|`((?:%s)\.py --[^`…]+)`"
                    % "|".join(PHASES))


def blocks():
    """Each block of commands and each command within a line, of all pages."""
    found = []
    for name, page in PAGES.items():
        # parsed by test_evidence.py, too
        marks = [pytest.mark.slow] * (name == "tests/evidence/README.md")
        for block in BLOCK.findall(page):
            found.append(pytest.param(block, id=f"{name}-" + re.sub(r"\W+", "-", block)[:40], marks=marks))
        for whole, script in INLINE.findall(page):
            found.append(pytest.param(FUNCTIONS + (whole or f"python {script}"),
                                      id=f"{name}-" + re.sub(r"\W+", "-", whole or script)[:40]))
    return found


def commands(block, folder):
    """Run a block with a `python` that only writes down its arguments.   -> lists of arguments"""
    log = folder / "log"
    for name in "python", "pip", "torchrun":
        write = f'for word; do printf "%s\\n" "$word" >>"{log}"; done; echo . >>"{log}"'
        (folder / name).write_text(f"#!/bin/sh\n{write}\n")
        (folder / name).chmod(0o755)
    subprocess.run(["bash", "-euc", block], check=True, cwd=folder, env={"PATH": f"{folder}:/usr/bin:/bin"})
    return [call.split("\n") for call in log.read_text().split("\n.\n") if call] if log.exists() else []


class Understood(Exception):
    """A parser took its arguments."""


@pytest.mark.parametrize("block", blocks())
def test_every_command_of_the_pages_is_understood(block, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folders = "path/to/folder", *set(re.findall("data/cifar10(?:0-[a-h]|-1?500)", block))     # of transfer_sets.py
    for folder, split, label in product(folders, ("train", "val"), ("ant", "bee")):
        (tmp_path / folder / split / label).mkdir(parents=True)
        Image.new("RGB", (32, 32)).save(tmp_path / folder / split / label / "1.png")
    calls = [list(dropwhile(lambda word: word.startswith("--"), call)) for call in commands(block, tmp_path)]
    assert calls or block == FUNCTIONS
    for first, *words in calls:
        if first.endswith(".py"):
            phase, words = first.removesuffix(".py"), [word for word in words if word != "--help"]
            parse_args(import_module(phase).get_parser(), phase, words)
        elif first == "-m" and words[0] not in ("pytest", "venv"):
            understood_by_module(*words)
        else:
            assert first in ("-m", "install")


def understood_by_module(name, *words):
    """`python -m name words`, up to its parser."""
    if name == "utils.figures" and words[0] in figures.FIGURES:
        figures.get_parser(words[0]).parse_args(words[1:])
        return
    original = argparse.ArgumentParser.parse_args

    def parse(self, *rest):
        original(self, *rest)
        raise Understood
    with pytest.MonkeyPatch.context() as patch, pytest.raises((Understood, SystemExit)) as end:
        patch.setattr(argparse.ArgumentParser, "parse_args", parse)
        import_module(name).main(list(words))
    assert end.type is Understood or end.value.code == 0 and "--help" in words


def test_every_flag_that_a_page_names_exists():
    modules = [import_module(name) for name in (*PHASES, "utils.report")]
    sources = "".join((ROOT / name).read_text() for name in ("utils/report.py", "utils/convert.py",
                                                             "utils/figures.py", "tests/bench.py")
                      if (ROOT / name).exists())
    known = {flag for module in modules if hasattr(module, "get_parser")
             for action in module.get_parser()._actions
             for flag in action.option_strings} | set(re.findall(r'"(--[a-z][\w-]*)"', sources))
    foreign = {"--index-url", "--nproc-per-node", "--nnodes", "--rdzv-backend", "--rdzv-endpoint", "--help"}
    for name in PAGES.keys() - {"tests/evidence/README.md"}:
        named = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", PAGES[name]))
        assert named <= known | foreign, (name, named - known - foreign)


def test_every_command_that_the_figures_begin_with_is_understood():
    lines = [shlex.split(line, comments=True)[3:] for line in figures.__doc__.splitlines()
             if line.startswith("    python -m")]
    assert [name for name, *_ in lines] == list(figures.FIGURES)
    for name, *words in lines:
        figures.get_parser(name).parse_args(words)


@pytest.mark.parametrize("phase", PHASES)
def test_every_script_begins_with_three_commands_that_it_understands(phase):
    module = import_module(phase)
    lines = [line.split("#")[0] for line in module.__doc__.splitlines()
             if line.startswith(f"python {phase}.py")]
    assert len(lines) == 3
    for line in lines:
        parse_args(module.get_parser(), phase, shlex.split(line)[2:])


@pytest.mark.parametrize("name", [name for name in PAGES if SIZES[name]])
def test_a_page_is_no_longer_than_agreed(name):
    assert len(PAGES[name].encode()) <= SIZES[name]


@pytest.mark.parametrize("name", PAGES)
def test_every_link_of_a_page_leads_to_a_file_and_a_heading(name):
    for target, anchor in re.findall(r"\]\((?!https?:)([^)#]*)#?([^)]*)\)", PAGES[name]):
        path = (ROOT / name).parent / target if target else ROOT / name
        assert path.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)", path.read_text(), re.M)
            assert anchor in {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
                              for heading in headings}, anchor


def table_rows(page, header):
    """The cells of the table of a page whose first column is `header`."""
    lines = page[re.search(rf"^\| {re.escape(header)} \|", page,
                           re.M).start():].split("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]


def quoted(cell, folder):
    """`file: function` and `function` of a cell.   -> (path, function)"""
    path = None
    for words in re.findall(r"`(.*?)`", cell):
        file, _, function = words.rpartition(": ")
        path = folder / file if file else path
        yield path, function


def test_the_equation_map_names_functions_that_say_which_equation_they_are():
    rows = table_rows(README, "Eq.")
    assert [int(row[0]) for row in rows] == list(range(1, 16))
    for number, _, where in rows:
        for path, function in quoted(where, ROOT):
            source = path.read_text()
            node, = [node for node in ast.parse(source).body if getattr(node, "name", None) == function]
            assert re.search(rf"\bEq\. {number}\b(?!\.\d)", ast.get_source_segment(source, node)), (number,
                                                                                                    function)


def test_every_equation_has_a_test_that_exists():
    rows = table_rows(PAGES["tests/README.md"], "Eq.")
    assert [int(row[0]) for row in rows] == list(range(1, 16))
    for _, tests in rows:
        for path, function in quoted(tests, ROOT / "tests"):
            assert re.search(rf"^def {function}\(", path.read_text(), re.M), function


def test_every_function_that_the_pages_name_exists():
    for name, page in PAGES.items():
        for file, function in re.findall(r"`((?:utils/|models/)?\w+\.py): (\w+)", page):
            path = ROOT / "tests" / file if file.startswith("test_") else ROOT / file
            assert re.search(rf"^(def|class) {function}\b", path.read_text(), re.M), (name, file, function)


NAMES = {"shapes": "shapes", "CIFAR-10": "cifar10", "CIFAR-100": "cifar100",
         "ConvNet-W64": "convnet_w64", "ConvNet-W128": "convnet_w128", "ResNet18": "resnet18"}
RESULTS = {     # data set, IPC, student -> the files of the paper's settings and of `best`
    ("shapes", 10, "ConvNet-W64"): ("", "-best"),
    ("CIFAR-10", 10, "ConvNet-W128"): ("", "-two"),
    ("CIFAR-10", 10, "ResNet18"): ("", "-two"),
    ("CIFAR-10", 50, "ConvNet-W128"): ("", "-two20"),
    ("CIFAR-10", 50, "ConvNet-W128, 250 epochs"): (None, "-two20-250"),
    ("CIFAR-10", 50, "ResNet18, `best`: 200 epochs"): ("", "-two20"),
    ("CIFAR-100", 1, "ConvNet-W128"): ("", "-full"),
    ("CIFAR-100", 1, "ResNet18, `best`: 300 epochs"): ("", "-unit"),
    ("CIFAR-100", 10, "ConvNet-W128, `best`: 100 epochs"): ("", "-best"),
    ("CIFAR-100", 10, "ResNet18"): ("", None),
}


@pytest.mark.parametrize("row", table_rows(README, "data set"), ids=lambda row: " ".join(row[:3]))
def test_every_result_of_the_readme_is_that_of_its_file(row):
    dataset, ipc, student, *shown, published = row
    files = RESULTS[dataset, int(ipc), student]
    network, *epochs = re.split(r", (?:`best`: )?", student)
    expected = []
    for tag, preset in zip(files, ("paper", "best")):
        name = f"{NAMES[dataset]}-gvbsm-ipc{ipc}{tag}-{NAMES[network]}.json"
        cell = report.load_json(ROOT / "tests/evidence" / name, "",
                                ()) if tag is not None else {"distilled": {}, "real": {}}
        sides = [cell[side].get("stored") for side in ("distilled", "real")]
        for result in sides:
            two = preset == "best" and result and len(result["args"]["backbones"]) == 2
            two = two and dataset != "shapes"
            free = preset == "best" and result and result["method"] == "gvbsm" and (
                result["upstream"].get("recover", {}).get("unit_gradients") is False)
            expected.append((report.accuracy(result) + " ¹" * two + " ²" * free) if result else "–")
        for result in filter(None, sides):
            assert result["args"]["preset"] == preset
            assert result["args"]["epochs"] == (int(epochs[0].split()[0]) if epochs and preset == "best"
                                                else 100 if dataset == "shapes" else 1000)
            seeds = 1 if result["top1_std"] == 0 and len(result["seeds"]) == 1 else len(result["seeds"])
            assert seeds == 1 or seeds == (2 if (dataset, ipc, network) == ("CIFAR-10", "50", "ConvNet-W128")
                                           else 3)
    assert shown == expected
    paper = report.PUBLISHED.get(("gvbsm", NAMES[dataset], NAMES[network], "stored"), {}).get(int(ipc), "–")
    assert published == ("–" if files[0] is None else paper)


def test_every_method_has_a_row_with_flags_that_every_phase_takes():
    rows = table_rows(README, "`--method`")
    assert [row[0] for row in rows] == list(METHODS)
    for method, _, flags in rows:
        for phase in PHASES:
            args = parse_args(import_module(phase).get_parser(), phase, shlex.split(flags.strip("`")))
            assert args.method == method


def python_block(page, word):
    block, = [block for block in re.findall(r"^```python\n(.*?)^```", PAGES[page], re.M | re.S)
              if word in block]
    return block


@pytest.mark.slow
def test_the_block_that_distils_from_python_runs_as_printed(capsys):
    block, space = python_block("README.md", "recover_batch"), {}
    assert len(block.splitlines()) <= 30
    torch.manual_seed(0)
    exec(block, space)
    assert len(capsys.readouterr().out.splitlines()) == 5
    low, high = ((bound - space["mean"]) / space["std"] for bound in (0, 1))
    distilled = space["distilled"].detach()
    assert distilled.shape == (1, 20, 3, 32, 32) and (low <= distilled).all() and (distilled <= high).all()


def test_the_block_that_trains_on_soft_labels_runs_as_printed(labelled):
    block, space = python_block("README.md", "DistilledDataset"), {}
    run = "runs/shapes/gvbsm-ipc10-best"
    assert run in block
    block = block.replace(run, str(labelled.run())).replace("num_classes=10, image_size=32",
                                                            "num_classes=4, image_size=16")
    exec(block, space)
    assert space["loss"].isfinite()
