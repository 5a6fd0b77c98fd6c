"""Shared by the tests of the scripts: a small data set in a folder, teachers of it, and calls of the phases.

python -m pytest                               the fast tests
python -m pytest -m slow                       the others: kills, torchrun, large networks, every method
python -m pytest -m "slow or not slow"         all
"""
import io
import itertools
import json
import os
import shutil
import signal
import sys
import warnings
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from importlib import import_module
from pathlib import Path

# the same bytes in every process; threads of tiny tensors only wait for each other
os.environ["OMP_NUM_THREADS"] = "1"

import numpy as np
import pytest
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for pytest without "python -m" as well

CLASSES = "10", "9", "ant", "bee"                                        # sorted as text, not as numbers
ALWAYS = "--ipc 2 --backbones convnet_w8 wrn10_1 --device cpu --workers 0 --precision tf32"
FLAGS = {
    "squeeze": "--epochs 2 --batch-size 16 --crop pad2 --schedule constant --weight-decay 0",
    "collect_stats": "--batch-size 20 --crop pad2",
    "recover": "--iterations 6 --batch-size 4",
    "relabel": "--epochs 3",
    "train_eval": "--epochs 3 --students convnet_w8",
}
# a second a test
LARGE = {"vgg11_bn", "resnet18", "resnet50", "resnet101", "regnet_x_8gf", "swin_t", "efficientnet_b0",
         "mobilenetv2", "mobilenetv2_05"}


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: takes long; left out unless -m, or the test itself, is named")
    if not config.option.markexpr and not any("::" in name for name in config.args):
        config.option.markexpr = "not slow"


@contextmanager
def own_handlers():
    """A phase in this process takes over SIGINT and SIGTERM; afterwards they are pytest's again. A phase that
    Ctrl-C has ended takes pytest with it."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    except SystemExit as end:
        if end.code == 128 + signal.SIGINT:
            raise KeyboardInterrupt from end
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    for item in items:
        if hasattr(item, "callspec") and LARGE & {value for value in item.callspec.params.values()
                                                  if isinstance(value, str)}:
            item.add_marker("slow")


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call():
    with own_handlers():
        return (yield)


def words(flags):
    return [word for flag in flags for word in (flag.split() if isinstance(flag, str) else [str(flag)])]


class Project:
    """A folder with a data set in data/beasts and the results in runs/."""

    def __init__(self, root, dataset):
        self.root, self.dataset, self.printed = root, dataset, ""
        self.results = root / "runs" / Path(dataset).name
        self.teachers = self.results / "teachers" / "supervised"
        self.classes = CLASSES

    def files(self):
        """{relative path: bytes and time of change, or nothing for a folder}"""
        return {path.relative_to(self.root).as_posix(): (path.read_bytes(), path.stat().st_mtime_ns)
                if path.is_file() else None for path in self.root.rglob("*")}

    def outputs(self):
        """{file: bytes} of all results, of JSON what does not depend on time and memory; nothing unfinished
        is left."""
        found = {}
        for path in sorted(self.root.rglob("*")):
            if path.is_file() and self.dataset not in path.parents:
                assert ".unfinished" not in str(path) and not path.name.endswith(".tmp")
                content = path.read_bytes()
                if path.suffix == ".json":
                    content = {key: value for key, value in json.loads(content).items()
                               if key not in ("seconds", "peak_memory", "costs")}
                found[path.relative_to(self.root).as_posix()] = content
        return found

    def run(self, name="gvbsm-ipc2"):
        return self.results / name

    def arguments(self, phase, *flags):
        return words((ALWAYS, "--dataset", Path(self.dataset), "--run-dir", self.root / "runs", FLAGS[phase],
                      *flags))

    def call(self, phase, *flags):
        """main() of a phase; a str holds several flags, later ones replace earlier ones.   -> its last result
        file"""
        out = io.StringIO()
        with redirect_stdout(out), own_handlers():
            import_module(phase).main(self.arguments(phase, *flags))
        self.printed = out.getvalue()
        assert self.printed.splitlines()[-1].startswith("RESULT ")
        line = json.loads(self.printed.splitlines()[-1].removeprefix("RESULT "))
        return json.loads(Path(line["file"]).read_text())

    def chain(self, *flags, first="squeeze"):
        """All phases from `first` on, with the same flags.   -> {phase: result}"""
        phases = list(FLAGS)[list(FLAGS).index(first):]
        return {phase: self.call(phase, *flags) for phase in phases}

    def mistake(self, phase, *flags):
        """main() ends with code 2, one line on stderr, and all files as they were.   -> that line"""
        before, err = self.files(), io.StringIO()
        with (warnings.catch_warnings(record=True) as warned, pytest.raises(SystemExit) as end,
              own_handlers(), redirect_stderr(err), redirect_stdout(io.StringIO())):
            import_module(phase).main(self.arguments(phase, *flags))
        assert end.value.code == 2 and not warned
        assert err.getvalue().count("\n") == 1 and err.getvalue().endswith("\n")
        assert self.files() == before
        return err.getvalue()

    def images(self, name="gvbsm-ipc2"):
        """The distilled images of a run, class by class.   -> integers [N, S, S, 3]"""
        files = sorted((self.run(name) / "images").glob("*/*.png"))
        return np.stack([np.asarray(Image.open(file)) for file in files]).astype(int)

    def log(self, name="gvbsm-ipc2"):
        """The lines of log.jsonl."""
        return [json.loads(line) for line in open(self.run(name) / "log.jsonl")]


def write_images(folder, count, size=16, classes=CLASSES):
    """A split of `count` PNG a class, noise about a colour of the class."""
    rng = np.random.default_rng(count)
    for label, name in enumerate(classes):
        (folder / name).mkdir(parents=True)
        for i in range(count):
            colour = 40 * np.array([label, 5 - label, (2 * label) % 5])
            pixels = (colour + rng.normal(20, 30, (size, size, 3))).clip(0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{i}.png")


@pytest.fixture
def seed():
    torch.manual_seed(0)


@pytest.fixture
def interrupt(monkeypatch):
    """interrupt(module, name, n): call n of module.name from now on raises InterruptedError."""
    def at(module, name, n):
        function, calls = getattr(module, name), itertools.count(1)

        def raising(*args, **kwargs):
            if next(calls) == n:
                raise InterruptedError
            return function(*args, **kwargs)

        monkeypatch.setattr(module, name, raising)
    return at


@pytest.fixture
def double():
    """Networks and images in float64: Adam makes whole steps of what is mere rounding."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture(scope="session")
def beasts(tmp_path_factory):
    """A data set: 4 classes of 12 training and 6 test images of 16 pixels."""
    folder = tmp_path_factory.mktemp("data") / "beasts"
    write_images(folder / "train", 12)
    write_images(folder / "test", 6)
    return folder


@pytest.fixture(scope="session")
def new_project(tmp_path_factory):
    """Project(dataset) in a folder of its own."""
    return lambda dataset: Project(tmp_path_factory.mktemp("project"), dataset)


@pytest.fixture(scope="session")
def squeezed(beasts, new_project):
    """A project with backbones and their statistics, which no test may change."""
    project = new_project(beasts)
    project.call("squeeze")
    project.call("collect_stats")
    return project


@pytest.fixture(scope="session")
def labelled(squeezed, new_project):
    """`squeezed` with distilled images and labels, which no test may change either."""
    project = new_project(squeezed.dataset)
    shutil.copytree(squeezed.root / "runs", project.root / "runs")
    project.call("recover")
    project.call("relabel")
    return project


@pytest.fixture
def bare(beasts, tmp_path):
    """A project of one's own, with data alone."""
    shutil.copytree(beasts, tmp_path / "beasts")
    return Project(tmp_path, tmp_path / "beasts")


@pytest.fixture
def project(squeezed, tmp_path):
    """A project of one's own, with teachers; the data set is shared."""
    shutil.copytree(squeezed.root / "runs", tmp_path / "runs")
    return Project(tmp_path, squeezed.dataset)


@pytest.fixture
def recovered(labelled, tmp_path):
    """`project` with distilled images."""
    shutil.copytree(labelled.root / "runs", tmp_path / "runs", ignore=shutil.ignore_patterns("labels"))
    return Project(tmp_path, labelled.dataset)


@pytest.fixture
def relabelled(labelled, tmp_path):
    """`project` with distilled images and labels."""
    shutil.copytree(labelled.root / "runs", tmp_path / "runs")
    return Project(tmp_path, labelled.dataset)
