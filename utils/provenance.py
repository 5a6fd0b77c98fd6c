"""What a result comes from: fingerprints of files, the arguments that decide it, and what may meet what."""
import argparse
import hashlib
import json
import os
import shlex
from pathlib import Path

from utils import fail

# arguments that leave a result as it is, up to rounding; recipe sets other flags, given and typed repeat them
NEUTRAL = {"overwrite", "device", "workers", "data_dir", "run_dir", "download",
           "groups_per_step", "cuda_graphs", "checkpoint_minutes", "recipe", "given", "typed", "data_set",
           "weights_file"}
# by files that are older than these flags
ASSUMED = {"objective": "supervised", "weights": None, "flip": True, "stay": 0.0}
AGAIN = "start again with --overwrite"


def fingerprint(*parts) -> str:
    """sha256 of files (paths), texts and arrays, one after another."""
    digest = hashlib.sha256()
    for part in parts:
        if isinstance(part, Path):
            with open(part, "rb") as file:
                while block := file.read(1 << 20):
                    digest.update(block)
        else:
            digest.update(os.fsencode(part) if isinstance(part, str) else part)
    return digest.hexdigest()


def image_set(folder: str | Path, files: list[str]) -> str:
    """Fingerprint of the images of a folder, by their names in it."""
    return fingerprint(*(part for name in sorted(files) for part in (name, Path(folder, name))))


def fingerprints(records: dict[str, dict]) -> dict[str, dict[str, str]]:
    """Hashes of checkpoints of `load_teachers`, for `check_inputs`."""
    return {"weights": {name: record["fingerprint"] for name, record in records.items()}}


def data_hash(data: dict, count: int) -> dict[str, str]:
    """Of the training images, for `check_inputs`: what `describe` says of them, and how many they are."""
    return {"data": fingerprint(json.dumps([data, count]))}


def check_data(then: str | None, args: argparse.Namespace, path: Path) -> None:
    """Stop where what lies at `path` was made of other data.   then: a hash, or None"""
    now = getattr(args, "data_set", {}).get("fingerprint")
    if then and now and then != now:
        fail(f"the images of --dataset {args.dataset} have changed since {path} was made; run all phases "
             "from squeeze.py on with --overwrite, or name another --run-dir")


def relevant(args: argparse.Namespace) -> dict:
    """The arguments that decide the result, as plain values."""
    decisive = {key: value for key, value in vars(args).items() if key not in NEUTRAL}
    return json.loads(json.dumps(decisive, default=str))


def same(key: str, one, other) -> bool:
    """Whether two values of an argument mean the same. None as image_size was found out; a data set's folder
    may have moved, and `cli.check_data_set` compares what it holds; one path has several spellings."""
    if key == "image_size" and None in (one, other):
        return True
    if key == "dataset":
        return Path(one).resolve().name == Path(other).resolve().name
    if key in ("images", "class_map") and one and other:
        return Path(one).resolve() == Path(other).resolve()
    return one == other


def check_same(stored: dict, settings: dict, path: Path, begun=(), typed=()) -> None:
    """Stop when the result or the unfinished work at `path` has other settings.
    stored, settings: {argument: value}; begun, typed: the command that began unfinished work and this one, as
    words, () for a result"""
    stored = ASSUMED | stored
    changed = [key for key in settings if key in stored and not same(key, stored[key], settings[key])]
    if not changed:
        return
    flags = {key: f"--{key.replace('_', '-')}" for key in changed}
    chosen = [key for key in changed if {flags[key], flags[key].replace("--", "--no-")} & {*begun, *typed}]
    told = ", ".join(f"{flags[key]} {stored[key]} (now {settings[key]})" for key in chosen or changed)
    add = f" with --precision {stored['precision']}" if changed == ["precision"] else ""
    if begun:
        fail(f"{path} is unfinished: `{shlex.join(begun)}` began it with {told}; repeat that command{add}, or "
             f"{AGAIN}")
    other = "another --teachers" if path.parent.parent.name == "teachers" else "another --tag"
    if path.parent.name in ("labels", "eval"):
        other += " in all phases from recover.py on"
    repeat = f"repeat the command{add}, " if add else ""
    fail(f"{path} was made with {told}; {repeat}choose {other}, or {AGAIN}")


def check_inputs(stored: dict, now: dict, path: Path, remedy: str = AGAIN) -> None:
    """Stop where `path` was made from other files.   stored, now: {kind: hash or {name: hash}}"""
    for kind, found in now.items():
        if kind in ("data", "class map") and kind not in stored:     # older than these fingerprints
            continue
        before, found = ({name: one for name, one in value.items() if one} if isinstance(value, dict)
                         else {"": value} for value in (stored.get(kind), found))
        changed = sorted(name for name in before | found if before.get(name) != found.get(name))
        if changed and kind == "data":
            fail(f"the images of the data set have changed since {path} was made; run all phases from "
                 "squeeze.py on with --overwrite, or name another --run-dir")
        if changed and before.keys() != found.keys():
            had, has = (" ".join(sorted(names)) or "none" for names in (before, found))
            fail(f"{path} was made from {kind} of {had}, not of {has}; {remedy}")
        if changed:
            names = f" ({' '.join(changed)})" if all(changed) else ""
            fail(f"{path} was made from other {kind}{names} than the present ones; {remedy}")


def check_classes(found: list[str], expected: list[str], where: str | Path, other: str | Path,
                  remedy: str = "use the same data set for both") -> None:
    """Stop unless two files or folders have the same classes in the same order."""
    if list(found) != list(expected):
        what = next((f"class {a!r} stands where {b!r} does" for a, b in zip(found, expected) if a != b),
                    f"{len(found)} classes, not {len(expected)}")
        fail(f"{where} and {other} differ in their classes ({what}); {remedy}")
