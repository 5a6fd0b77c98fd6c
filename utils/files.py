"""Whole files: a result is there in full or not at all, and says why it cannot be read."""
import json
import os
import shlex
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from utils import fail


@contextmanager
def writable(path: Path) -> Iterator[None]:
    """Inside the block, a file that cannot be written ends the phase."""
    try:
        yield
    except OSError as error:
        fail(f"{path} cannot be written ({error.strerror or error}); make room there or name another "
             "--run-dir")


@contextmanager
def whole_file(path: str | Path, suffix: str = "tmp") -> Iterator[Path]:
    """Yields a path beside `path` to write to, and renames it at the end: the file is whole or absent."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{suffix}")
    try:
        with writable(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            yield temporary
            with open(temporary, "rb") as file:
                os.fsync(file.fileno())                              # whole after a power cut too
            os.replace(temporary, path)
    finally:
        with suppress(OSError):                                      # it exists only after an error
            temporary.unlink()


def save_json(path: Path, value: dict) -> None:
    with whole_file(path, f"{os.getpid()}.tmp") as temporary:        # two processes may write one summary
        temporary.write_text(json.dumps(value, indent=1) + "\n")


def load_json(path: str | Path, remedy: str, keys: Iterable[str] = ("args",)) -> dict:
    """The object of a result file, which must have these keys."""
    try:
        return with_keys(json.loads(Path(path).read_text()), keys)
    except FileNotFoundError:
        fail(f"{Path(path).absolute()} is {absent(path, remedy)}")
    except (OSError, ValueError) as error:
        fail(f"{path} is no whole result file ({reason(error)}); {remedy}")


def absent(path: str | Path, remedy: str) -> str:
    """Why a result is not there, and the remedy: that, or to go on with the command that began it."""
    left, begun = unfinished(Path(path)), []
    with suppress(OSError, ValueError, AttributeError):
        begun = json.loads((left / "begun.json").read_text()).get("typed")
    if begun:
        return f"unfinished; run again: {shlex.join(word for word in begun if word != '--overwrite')}"
    return f"{'unfinished' if left.exists() else 'missing'}; {remedy}"


def with_keys(value, keys: Iterable[str]) -> dict:
    if not isinstance(value, dict):
        raise ValueError(f"it holds a {type(value).__name__}, not a dict")
    if missing := [key for key in keys if key not in value]:
        raise ValueError(f"it lacks {' '.join(missing)}")
    return value


def reason(error: Exception) -> str:
    """An exception's first line, or its kind where it says nothing."""
    return (str(error) or type(error).__name__).splitlines()[0][:100]


def unfinished(result: Path) -> Path:
    return result.with_name(f".{result.name}.unfinished")
