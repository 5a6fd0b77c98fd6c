"""What a result comes from: fingerprints of files, the arguments that decide it, and what may meet what."""
import hashlib
import json
import os
import shlex
from pathlib import Path

from utils import fail

# Arguments that leave a result as it is, up to rounding. recipe sets other flags; given and typed repeat them.
NEUTRAL = {"overwrite", "device", "workers", "data_dir", "run_dir", "download", "grid_every", "log_every",
           "groups_per_step", "cuda_graphs", "checkpoint_minutes", "recipe", "given", "typed", "data_set",
           "weights_file"}
# in files older than the flag, where its default is another
ASSUMED = {"objective": "supervised", "weights": None, "flip": True}
AGAIN = "start again with --overwrite"


def fingerprint(*parts):
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


def image_set(folder, files):
    """Fingerprint of the images of a folder, by their names in it."""
    folder = Path(folder).expanduser()
    return fingerprint(*(part for name in sorted(files) for part in (name, folder / name)))


def fingerprints(records):
    """Of records of `load_teachers`, for `check_inputs`."""
    return {"weights": {name: record["fingerprint"] for name, record in records.items()}}


def with_data(inputs, args):
    """What a result is made from, with the fingerprint of its data set."""
    known = getattr(args, "data_set", {}).get("fingerprint")
    return inputs | ({"data": known} if known else {})


def check_data(then, args, path):
    """Stop where what lies at `path` was made of other data than there are now.   then: the data's fingerprint, or None"""
    now = getattr(args, "data_set", {}).get("fingerprint")
    if then and now and then != now:
        fail(f"the images of --dataset {args.dataset} have changed since {path} was made; run all phases from squeeze.py on with "
             "--overwrite, or name another --run-dir")


def relevant(args):
    """The arguments that decide the result, as plain values."""
    return json.loads(json.dumps({key: value for key, value in vars(args).items() if key not in NEUTRAL}, default=str))


def check_same(stored, settings, path, begun=(), typed=()):
    """Stop when the result or the unfinished work at `path` has other settings.   stored, settings: {argument: value}
    begun, typed: words of the command that began unfinished work, and of this one; () for a result"""
    stored = {key: ASSUMED[key] for key in ASSUMED.keys() & settings.keys()} | stored
    changed = [key for key in settings if key in stored and stored[key] != settings[key] and not (
        key == "image_size" and None in (stored[key], settings[key]) or          # None: found out, and compared as such
        key == "dataset" and Path(stored[key]).expanduser().resolve() == Path(settings[key]).resolve())]
    if not changed:
        return
    chosen = [key for key in changed if {flag_name(key), f"--no-{flag_name(key)[2:]}"} & {*begun, *typed}]
    told = ", ".join(f"{flag_name(key)} {stored[key]} (now {settings[key]})" for key in chosen or changed)
    if begun:
        fail(f"{path} is unfinished: `{shlex.join(begun)}` began it with {told}; repeat that command, or {AGAIN}")
    other = "--teachers" if path.parent.parent.name == "teachers" else "--tag"
    fail(f"{path} was made with {told}; choose another {other}, or {AGAIN}")


def flag_name(key):
    return f"--{key.replace('_', '-')}"


def check_inputs(stored, now, path, remedy=AGAIN):
    """Stop when what lies at `path` was made from other files.   stored, now: {what: hash, or {backbone: hash}}"""
    for what in now:
        if what == "data" and what not in stored:                    # made before data had a fingerprint
            continue
        then, these = (made[what] if isinstance(made.get(what), dict) else {"": made.get(what)} for made in (stored, now))
        differing = [name for name in then | these if then.get(name) != these.get(name)]
        if differing:
            named = f" ({' '.join(sorted(differing))})" if all(differing) else ""
            if what == "data":
                fail(f"the images of the data set have changed since {path} was made; run all phases from squeeze.py on with "
                     "--overwrite, or name another --run-dir")
            fail(f"{path} was made from other {what}{named} than there are now; {remedy}")


def check_classes(found, expected, where, other):
    """Class names and their order must agree wherever two artefacts meet."""
    if list(found) != list(expected):
        pair = next(((a, b) for a, b in zip(found, expected) if a != b), None)
        what = f"class {pair[0]!r} stands where {pair[1]!r} does" if pair else f"{len(found)} classes, not {len(expected)}"
        fail(f"{where} and {other} differ in their classes ({what}); use the same data set for both")


def check_trained(split, records, paths):
    """Stop where a teacher was trained when there were more or fewer training images."""
    for name, record in records.items():
        if record.get("trained", len(split)) != len(split):
            fail(f"{paths.teachers / name}.pt was trained when there were {record['trained']} training images, now {len(split)}; "
                 "train it again with squeeze.py --overwrite")


def check_recovered(recovered, args, paths, data, records):
    """Stop unless recover.py's images are of these classes and, where it had teachers of this set, of these. Under another
    --recipe there may be others, but none of those it had may have changed."""
    path, had = paths.run / "result.json", recovered["made_from"].get("weights", {})
    check_classes(recovered["classes"], data["classes"], path, "the data set or the teachers now")
    if records and had and recovered["args"]["teachers"] == args.teachers:
        names = had.keys() & records.keys() if args.recipe else had.keys() | records.keys()
        check_inputs({"weights": {name: had.get(name) for name in names}},
                     fingerprints({name: records[name] for name in names & records.keys()}), path, "name the same --backbones, "
                     f"run recover.py --overwrite, or name --images {paths.images} under another --tag")
