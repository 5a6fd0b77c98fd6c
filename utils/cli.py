"""The command line: the flags that all phases share, and where defaults come from.

Precedence: parser default < preset (utils/presets.py) < command line; relabel.py and train_eval.py take
--recipe, where it is given, in the place of --method.
"""
import argparse
import json
import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

from models import is_model_name
from utils import fail
from utils.data import DATASETS, SMALL, folder_column, look
from utils.folders import not_read
from utils.parser import Parser, number, plain_name
from utils.presets import METHODS, PRESETS, SELECTIONS, UNMATCHED, preset_values

# flags that a chain of phases has in common
SHARED = {"dataset", "ipc", "method", "recipe", "tag", "teachers", "backbones", "preset", "data_dir",
          "holdout", "imbalance", "image_size", "run_dir"}


def identity_flags(parser: Parser) -> Parser:
    """The flags that mean the same in every phase."""
    parser.usage = ("python %(prog)s [--dataset NAME|FOLDER] [--ipc N] [--method NAME] [flag ...]     (in "
                    "parentheses: what would run)")
    add = parser.add_argument_group("data and identity, the same in every phase").add_argument
    add("--dataset", default="shapes", metavar="NAME|FOLDER",
        help=f"{', '.join(DATASETS)}, or a folder with train/ and val/ or test/ (--holdout: train/ alone)")
    add("--ipc", type=number(int, 1), default=10, help="distilled images per class [IPC]")
    add("--method", choices=METHODS, default="gvbsm",
        help=f"how images are made, {', '.join(SELECTIONS)} choose real ones")
    add("--recipe", choices=METHODS, metavar="METHOD",
        help="in relabel.py and train_eval.py: take defaults and teachers from this method instead")
    add("--tag", type=plain_name, help="a name for this variant, for ablations")
    add("--teachers", type=plain_name, default="supervised", help="name of a set of squeezed backbones")
    add("--backbones", nargs="+", metavar="NAME", help="networks to match and to label with [S, Eq. 7]")
    add("--preset", choices=sorted(PRESETS), default="paper", help="where defaults come from")
    add("--data-dir", default="data", metavar="DIR", help="folder of named data sets")
    add("--holdout", action="store_true",
        help="test on every tenth training image of a class, and train on the others; to choose settings by")
    add("--imbalance", type=number(float, 1), default=1.0,
        help="long-tailed training images: the first class has so many times those of the last, 1 = off")
    add("--image-size", type=number(int, 8, 4096), help="pixels of a side; of a folder found out by default")
    add = parser.add_argument_group("run").add_argument
    add("--run-dir", default="runs", metavar="DIR", help="where results go")
    add("--seed", type=number(int, 0, 10 ** 18), default=0, help="of all that is drawn but --student-seeds")
    add("--device", default="auto", help="cpu, cuda, cuda:1; auto takes cuda where there is one")
    add("--precision", choices=["auto", "fp32", "tf32", "bf16"], default="tf32",
        help="of matrix products: tf32 is fp32 except on a GPU; auto is bf16 where that is native and "
        "faster, and tf32 in collect_stats.py and recover.py")
    add("--workers", type=number(int, 0), default=2, help="processes or threads that read images")
    add("--overwrite", action="store_true",
        help="start again; without it, a finished phase returns and unfinished work goes on")
    add("--checkpoint-minutes", type=number(float, 0), default=5.0, help="between saves, 0 = every step")
    return parser


def parse_args(parser: Parser, phase: str, argv: list[str] | None = None,
               find: Callable = look) -> argparse.Namespace:
    """Arguments of a phase with the preset's values as defaults, so that --help shows what would run; for a
    folder, and teachers that squeeze.py has made, also what it found and chose. args.data_set: by `find`"""
    argv = sys.argv[1:] if argv is None else argv
    early = identity_flags(Parser("", parser.prog))
    early.set_defaults(teachers=None)         # so that typing the parser's own default tells
    known, _ = early.parse_known_args([arg for arg in argv if arg not in ("-h", "--help")])
    earlier = earlier_results(known)
    data_set = find(known.dataset, known.data_dir, [one["data_set"] for one in earlier.values()],
                    known.holdout)
    check_data_set(known, data_set, earlier)
    method = known.recipe if known.recipe and phase in ("relabel", "train_eval") else known.method
    data_set["image_size"] = known.image_size or data_set["image_size"]
    defaults = preset_defaults(known, data_set, phase, method)
    teachers = known.teachers or defaults.get("teachers", parser.get_default("teachers"))
    path = run_folder(known) / "teachers" / teachers / "squeeze.json"
    decided = {}
    if path in earlier and not (phase == "squeeze" and known.overwrite):
        decided = earlier[path]["data_set"]
        if known.image_size not in (None, decided["image_size"]):
            fail(f"--image-size {known.image_size}: squeeze.py chose {decided['image_size']} ({path}); leave "
                 "it out, or squeeze again with --overwrite or under another --teachers")
        data_set["image_size"] = decided["image_size"]
        defaults = preset_defaults(known, data_set, phase, method)
        if decided.get("backbones") and phase != "squeeze":
            defaults["backbones"] = decided["backbones"]
    if unread := set(defaults) - {action.dest for action in parser._actions}:
        raise KeyError(f"preset values without a flag in {phase}.py: {sorted(unread)}")
    parser.set_defaults(**defaults)
    args = parser.parse_args(argv)
    if args.precision == "auto" and phase in ("collect_stats", "recover"):
        args.precision = "tf32"               # statistics and pixels are float32
    args.recipe = method if method != args.method else None
    if getattr(args, "class_map", None) and not args.images:
        args.class_map = None                 # recover.py's images bear the classes' own names
    args.typed = ["python", f"{phase}.py", *argv]
    args.given = {flag: value for flag, value in vars(known).items()
                  if flag in SHARED and value != early.get_default(flag)}
    if args.dataset not in DATASETS or decided:
        args.image_size = data_set["image_size"]
    weak = getattr(args, "save_epochs", "none") != "none" or getattr(args, "pruned", 0)
    chosen = "backbones" in args.given and decided.get("backbones") or args.backbones
    args.data_set = data_set | {"backbones": None if weak else chosen}
    for flag in "backbones", "students", "student_seeds":
        names = getattr(args, flag, None) or []
        if twice := [str(name) for name in names if names.count(name) > 1]:
            fail(f"--{flag.replace('_', '-')} names {twice[0]} twice; name it once")
    return args


def preset_defaults(known: argparse.Namespace, data_set: dict, phase: str, method: str) -> dict:
    """The preset's values for a data set at its image_size. Sets data_set["column"], that of the tables."""
    size, classes, named = data_set["image_size"], data_set["classes"], known.dataset in DATASETS
    column = known.dataset if named else folder_column(size, classes)
    if (method, column) == ("scdd", "imagenet") and size <= SMALL:
        column = "tiny"                      # MoCo is trained there, ImageNet's coefficients are MoCo v3's
    data_set["column"] = column
    own = None if named or size > SMALL else (data_set["train"], classes)
    values = preset_values(known.preset, column, phase, known.ipc, method, own)
    if values.get("pretrained") and (known.dataset != "imagenet" or size <= SMALL):
        values["pretrained"] = False         # the weights are of ImageNet's classes, at sizes above 64 pixels
    return values


def run_folder(args: argparse.Namespace) -> Path:
    """runs/<dataset>, of the training images that --holdout and --imbalance leave."""
    return Path(args.run_dir) / (Path(args.dataset).resolve().name + "-holdout" * args.holdout +
                                 f"-imbalance{args.imbalance:g}" * (args.imbalance > 1))


def earlier_results(args: argparse.Namespace) -> dict[Path, dict]:
    """{path: result file} of squeeze.py and recover.py for this data set, of those that tell what it was."""
    found = {}
    for path in [*run_folder(args).glob("teachers/*/squeeze.json"), *run_folder(args).glob("*/result.json")]:
        with suppress(OSError, ValueError):                          # who needs it tells that it is damaged
            result = json.loads(path.read_text())
            if isinstance(result, dict) and isinstance(result.get("data_set"), dict):
                found[path] = result
    return found


def check_data_set(args: argparse.Namespace, data_set: dict, earlier: dict[Path, dict]) -> None:
    """Two data sets of one name do not share a folder."""
    for result in earlier.values():
        other, before = result["data_set"], result.get("args", {}).get("dataset", args.dataset)
        there, here = other.get("path"), data_set["path"]
        if there != here and ((before in DATASETS) != (args.dataset in DATASETS) or
                              there and here and other["fingerprint"] != data_set["fingerprint"]):
            fail(f"{run_folder(args)} is of another data set of that name, {there or before}; name another "
                 f"--run-dir" + f" for {here}, or rename that folder" * (args.dataset not in DATASETS))


def describe_choice(args: argparse.Namespace) -> str:
    """What was found and chosen, as the first line of every phase."""
    data, name = args.data_set, Path(args.dataset).resolve().name
    size, images, settings = args.image_size or data["image_size"], "", f"settings of {data['column']}"
    if data["train"]:
        pixels = "-".join(map(str, dict.fromkeys(data["pixels"])))   # lowest and highest
        tests = "" if args.holdout else f" and {data['test']} test"
        images = f", {data['train']} training{tests} images of {pixels} pixels"
    images += f", training images in a long tail (--imbalance {args.imbalance:g})" * (args.imbalance > 1)
    images += ", of which a tenth of each class is held out to test (--holdout)" * args.holdout
    if args.dataset not in DATASETS:
        settings += f" for a folder of {data['classes']} classes"
    line = (f"{name}: {data['classes']} classes{images} → {size}×{size}; {settings} (--preset "
            f"{args.preset}); {args.teachers} teachers: {' '.join(args.backbones)}")
    if args.dataset not in DATASETS and args.typed[1] == "squeeze.py" and size > SMALL:
        line += f"\nnote: --image-size {SMALL} or less takes the settings of small images, which run sooner"
    line += "".join(f"\n{text}" for text in not_read(data["passed"] or {}))
    count, there = args.ipc * data["classes"], (data["train"] or 0) * (9 if args.holdout else 10) // 10
    if 0 < there < count:
        line += f"\nnote: --ipc {args.ipc} makes {count} images of {there} training images"
    others = data["backbones"] or args.backbones                     # None: weak teachers
    if args.typed[1] == "squeeze.py" and set(args.backbones) - set(others):
        line += (f"\nnote: the other phases take {' '.join(others)}, squeezed first; for others name "
                 "--backbones there too")
    return "\n".join([line, *idle_flags(args), *high_rates(args)])


TRAINING = "epochs batch-size lr momentum weight-decay schedule warmup-epochs"
# {phase: [(flags, another flag, values)]}: the flags act only while the other has one of these values, [] any
# but 0 and none, [None] none
NEEDS = {
    "squeeze": [
        ("crop", "objective", ["supervised"]), ("queue", "objective", ["moco"]),
        ("probe-epochs probe-lr probe-weight-decay", "objective", ["moco", "probe"]),
        (TRAINING, "objective", ["supervised", "moco"]), (TRAINING, "weights", [None]),
        (TRAINING, "pretrained", [False]),
        ("score-trials score-epochs score-lr score-batch-size", "prune-ratio", [])],
    "recover": [
        ("alpha ema-carry drop-rate bn-weight conv-weight first-multiplier dd-weight dd-scale dd-on loop "
         "choice unit-gradients subset class-statistics statistics stay crop flip roll weight-decay "
         "groups-per-step cuda-graphs", "method", [name for name in METHODS if name not in UNMATCHED]),
        ("init mosaic iterations batch-size lr", "method",
         [name for name in METHODS if name not in SELECTIONS]),
        ("adaptive-ratio adaptive-period", "method", ["dm", "bilp"]),
        ("dd-weight dd-scale dd-on", "loop", ["reorder"]), ("dd-scale dd-on", "dd-weight", []),
        ("drop-rate", "conv-weight", []), ("ema-carry", "alpha", []), ("choice", "subset", [0]),
        ("adaptive-period", "adaptive-ratio", [])],
    "relabel": [("class-map", "images", [])],
    "train_eval": [
        ("class-map", "images", []), ("label-epochs", "labels", ["stored"]),
        ("logit-norm", "labels", ["online"]), ("mix flip crop-floor", "labels", ["online", "hard"]),
        ("loss gamma temperature", "labels", ["stored", "online"]),
        ("gamma", "loss", ["mse_gt"]), ("temperature", "loss", ["kl", "kl_t2"]),
        ("lr-stretch", "schedule", ["cosine"]),
        ("steps orders", "protocol", ["continual"]), ("sparsity l1", "protocol", ["prune"])]}


def idle_flags(args: argparse.Namespace) -> Iterator[str]:
    """A line for each typed flag without an effect."""
    _, script, *words = args.typed
    typed = {word[2:].partition("=")[0].removeprefix("no-") for word in words if word.startswith("--")}
    found = {}
    for flags, other, values in NEEDS.get(script.removesuffix(".py"), []):
        value = getattr(args, other.replace("-", "_"))
        if value in values or value and not values:
            continue
        idle = f"with --{other}" if value is True or values == [None] else (
            f"without --{other} {' or '.join(map(str, values))}".rstrip())
        found = dict.fromkeys(sorted(typed & set(flags.split())), idle) | found      # the first reason
    yield from (f"note: --{flag} has no effect {idle}" for flag, idle in found.items())


def high_rates(args: argparse.Namespace) -> Iterator[str]:
    """A line for each learning rate beyond all that is published."""
    for flag in "lr", "probe_lr", "score_lr":
        value = getattr(args, flag, 0)
        for word in value if isinstance(value, list) else [value]:
            with suppress(ValueError):                               # who reads it tells
                if float(str(word).rpartition("=")[2]) > 100:
                    yield (f"note: --{flag.replace('_', '-')} {word} is far above the rates of all presets, "
                           "0.001 to 30")


# flags that take exceptions for single students, and how a word is read; a rate stays as it was written
EXCEPTIONS = {
    "optimizer": {"adamw": "adamw", "sgd": "sgd"}.__getitem__,
    "lr": lambda text: [text] if number(float, 1e-30)(text) else None, "weight_decay": number(float, 0)}


def for_student(args: argparse.Namespace, name: str) -> argparse.Namespace:
    """The arguments for one student alone, with its own values of flags such as --lr 0.1 resnet18=0.2."""
    own = {"students": [name]}
    for flag, read in EXCEPTIONS.items():
        words = getattr(args, flag)
        try:
            values = {student: read(value) for student, _, value in (word.rpartition("=") for word in words)}
            if len(values) < len(words) or not all(map(is_model_name, filter(None, values))):
                raise ValueError
            own[flag] = values.get(name, values[""])
        except (KeyError, ValueError, argparse.ArgumentTypeError):
            low = "above" if flag == "lr" else "from"
            what = ("adamw or sgd, and exceptions such as swin_t=adamw" if flag == "optimizer" else
                    f"one number {low} 0, and exceptions such as resnet18=0.2")
            fail(f"--{flag.replace('_', '-')} {' '.join(words)}: give {what} after it")
    return argparse.Namespace(**vars(args) | own)


def call(script: str, args: argparse.Namespace, **instead) -> str:
    """The command of another phase with the given flags that all phases share, but for those `instead`."""
    words = ["python", *script.split()]
    for flag, value in (args.given | instead).items():
        if value not in (None, False):
            words += [f"--{flag.replace('_', '-')}",
                      *map(str, value if isinstance(value, list) else [value] * (value is not True))]
    return shlex.join(words)
