"""The results of a data set as a table: every method beside random real images under the same recipe.

    python -m utils.report runs/cifar10

A row for each IPC, student, kind of labels and run. Top-1 of the last epoch in %, mean over student seeds and
standard deviation; margin = run minus random real. A run is compared with random images that had the same
labels and training (the same teachers and settings, whatever its tag), of its tag where there are several.
"published" is what papers print for the method, under their own recipes. Notes below the table say why a
comparison is missing and which flags a run changes.
"""
import shlex
from functools import cache
from importlib import import_module
from pathlib import Path

from utils import PHASES, fail
from utils.files import load_json
from utils.parser import Parser
from utils.presets import METHODS, SELECTIONS
from utils.provenance import NEUTRAL

R18, R50, R101, CONVNET = "resnet18", "resnet50", "resnet101", "convnet_w128"
PUBLISHED = {   # method, data set, student, labels -> {IPC: top-1}
    # arXiv:2311.17950, Tables 4 and 5; of SRe2L on CIFAR as run there, of the selections and DM as cited
    # there
    ("gvbsm", "cifar10", CONVNET, "stored"): {10: "46.5 ± 0.7", 50: "54.3 ± 0.3"},
    ("gvbsm", "cifar10", R18, "stored"): {10: "53.5 ± 0.6", 50: "59.2 ± 0.4"},
    ("gvbsm", "cifar100", CONVNET, "stored"): {1: "16.4 ± 0.7", 10: "38.7 ± 0.2", 50: "45.7 ± 0.4"},
    ("gvbsm", "cifar100", R18, "stored"): {1: "25.9 ± 0.5", 10: "59.5 ± 0.4", 50: "65.0 ± 0.5"},
    ("gvbsm", "tiny", R18, "stored"): {50: "47.6 ± 0.3", 100: "51.0 ± 0.4"},
    ("gvbsm", "tiny", R50, "stored"): {50: "48.7 ± 0.2", 100: "52.1 ± 0.3"},
    ("gvbsm", "tiny", R101, "stored"): {50: "48.8 ± 0.4", 100: "52.3 ± 0.1"},
    ("gvbsm", "imagenet", R18, "stored"): {10: "31.4 ± 0.5", 50: "51.8 ± 0.4", 100: "55.7 ± 0.4"},
    ("gvbsm", "imagenet", R50, "stored"): {10: "35.4 ± 0.8", 50: "58.7 ± 0.4", 100: "62.2 ± 0.3"},
    ("gvbsm", "imagenet", R101, "stored"): {10: "38.2 ± 0.4", 50: "61.0 ± 0.4", 100: "63.7 ± 0.2"},
    ("gvbsm", "imagenet", "deit_tiny", "stored"): {50: "29.43"},            # Table 2, with SRe2L's
    ("gvbsm", "imagenet", "mobilenetv2", "stored"): {50: "48.66"},
    ("gvbsm", "imagenet", "swin_t", "stored"): {50: "57.40"},
    ("sre2l", "imagenet", "deit_tiny", "stored"): {50: "15.41"},
    ("sre2l", "imagenet", "mobilenetv2", "stored"): {50: "36.59"},
    ("sre2l", "imagenet", "swin_t", "stored"): {50: "39.23"},
    ("sre2l", "cifar10", R18, "stored"): {10: "27.2 ± 0.5", 50: "47.5 ± 0.6"},
    ("sre2l", "cifar100", R18, "stored"): {1: "2.0 ± 0.2", 10: "31.6 ± 0.5", 50: "49.5 ± 0.3"},
    ("herding", "cifar10", CONVNET, "hard"): {10: "31.6 ± 0.7", 50: "40.4 ± 0.6"},
    ("herding", "cifar100", CONVNET, "hard"): {1: "8.3 ± 0.3", 10: "17.3 ± 0.3", 50: "33.7 ± 0.5"},
    ("kcenter", "cifar10", CONVNET, "hard"): {10: "14.7 ± 0.9", 50: "27.0 ± 1.4"},
    ("kcenter", "cifar100", CONVNET, "hard"): {1: "8.4 ± 0.3", 10: "17.3 ± 0.3", 50: "30.5 ± 0.3"},
    ("forgetting", "cifar10", CONVNET, "hard"): {10: "23.3 ± 1.0", 50: "23.3 ± 1.1"},
    ("forgetting", "cifar100", CONVNET, "hard"): {1: "4.5 ± 0.2", 10: "15.1 ± 0.3"},
    ("dm", "cifar10", CONVNET, "hard"): {1: "26.0 ± 0.8", 10: "48.9 ± 0.6", 50: "63.0 ± 0.4"},
    ("dm", "cifar100", CONVNET, "hard"): {1: "11.4 ± 0.3", 10: "29.7 ± 0.3", 50: "43.6 ± 0.4"},
    # arXiv:2306.13092 and figures of its release
    ("sre2l", "tiny", R18, "stored"): {1: "2.6", 10: "16.1", 50: "41.1", 100: "49.7"},
    ("sre2l", "tiny", R50, "stored"): {50: "42.2", 100: "51.2"},
    ("sre2l", "tiny", R101, "stored"): {50: "42.5", 100: "51.5"},
    ("sre2l", "imagenet", R18, "stored"): {10: "21.3", 50: "46.8", 100: "52.8", 200: "57.0"},
    ("sre2l", "imagenet", R50, "stored"): {10: "28.4", 50: "55.6", 100: "61.0", 200: "64.6"},
    ("sre2l", "imagenet", R101, "stored"): {10: "30.9", 50: "60.8", 100: "62.8", 200: "65.9"},
    # arXiv:2311.18838 and figures of its release; CIFAR-100 as in arXiv:2501.07575
    ("cda", "cifar100", R18, "stored"): {1: "13.4", 10: "49.8", 50: "64.4"},
    ("cda", "tiny", R18, "stored"): {1: "3.3", 10: "43.0", 50: "48.7", 100: "53.2"},
    ("cda", "imagenet", R18, "stored"): {10: "33.5", 50: "53.5", 100: "58.0", 200: "63.3"},
    # arXiv:2404.07976, Table 1, and for ImageNet those of its release; its Table 7 has 56.6 for CIFAR-100
    ("scdd", "cifar100", R18, "stored"): {50: "53.4 ± 1.1"},
    ("scdd", "tiny", R18, "stored"): {10: "31.6 ± 0.1", 50: "45.9 ± 0.2"},
    ("scdd", "imagenet", R18, "stored"): {10: "32.1", 50: "53.1", 100: "57.9", 200: "63.5"},
    ("scdd", "imagenet", R50, "stored"): {10: "38.9", 50: "60.9", 100: "65.8", 200: "67.8"},
    ("scdd", "imagenet", R101, "stored"): {10: "39.6", 50: "61.0", 100: "65.6", 200: "68.2"},
    ("scdd", "imagenet", "regnet_x_8gf", "stored"): {50: "61.94"},  # Table 8, of MoCo v3, with SRe2L's
    ("scdd", "imagenet", "squeezenet", "stored"): {50: "22.25"},
    ("scdd", "imagenet", "shufflenetv2_05", "stored"): {50: "27.48"},
    ("sre2l", "imagenet", "regnet_x_8gf", "stored"): {50: "59.89"},
    ("sre2l", "imagenet", "squeezenet", "stored"): {50: "14.66"},
    ("sre2l", "imagenet", "shufflenetv2_05", "stored"): {50: "16.71"},
    # arXiv:2410.07579; the 55.2 that others cite for Tiny-ImageNet at IPC 50 contradicts its abstract
    ("teddy", "imagenet", R18, "stored"): {10: "34.1 ± 0.1", 50: "52.5 ± 0.1", 100: "56.5 ± 0.0"},
}
BASES = "ablation", "family", "search"  # tags of runs with which others, tagged <base>-<word>, are compared
IDENTITY = "ipc", "student", "labels", "method", "tag"
HEADER = "ipc", "student", "labels", "run", "top-1", "random real", "margin", "published"
LABELS = {"stored": "soft", "online": "soft, online", "hard": "hard"}
RECIPE = ("image_size", "precision", "mix", "epochs", "batch_size", "whole_up_to", "optimizer", "lr",
          "momentum", "weight_decay", "schedule", "lr_stretch", "ema_decay", "label_epochs", "crop_floor",
          "flip")
LOST = "no better than random real images: take those, or --method herding, with the same labels"
SOFT = ("loss", "gamma", "temperature", "logit_norm", "seed")                  # of soft labels alone


def read_results(folder: Path, runs: str = "*") -> dict[tuple, dict]:
    """{(ipc, student, labels, method, tag): result} of the evaluations of runs/<dataset>/<pattern>."""
    results = {}
    for path in sorted(folder.glob(f"{runs}/eval/*.json")):
        remedy = "remove it and run train_eval.py again"
        result = load_json(path, remedy, (*IDENTITY, "top1", "top1_std", "seeds", "args", "upstream",
                                          "made_from"))
        known = result["method"] in METHODS and result["labels"] in LABELS
        if not (known and isinstance(result["ipc"], int)):
            fail(f"{path} is no result of train_eval.py; {remedy}")
        if result["args"].get("protocol", "standard") == "standard":
            results[tuple(result[key] for key in IDENTITY)] = result
    return results


@cache
def parser_of(phase: str) -> Parser:
    return import_module(phase).get_parser()


def setting(phase: str, args: dict, flag: str):
    """What a phase ran with; of a result older than a flag the parser's default, whatever presets say."""
    return args[flag] if flag in args else parser_of(phase).get_default(flag)


def recipe(result: dict) -> dict:
    """What decides an accuracy but for the images.
    -> {(phase, flag): value} of labels and training, and the hashes of the labelling teachers"""
    flags = RECIPE + SOFT * (result["labels"] != "hard")
    args = {"train_eval": result["args"], "relabel": result["upstream"].get("relabel", {})}
    return {(phase, flag): setting(phase, args[phase], flag) for phase in args for flag in flags} | {
        ("", "teachers"): result["made_from"].get("weights")}


def random_beside(result: dict, results: dict[tuple, dict]) -> tuple[dict | None, str]:
    """Random images for the same IPC, student and labels under the same recipe, of the same tag if there are
    several; or None, and how the nearest recipe differs, such as `epochs 200, not 60`, "" without any."""
    mine, cell, found = recipe(result), (result["ipc"], result["student"], result["labels"], "random"), []
    for key, other in results.items():
        if key[:4] == cell:
            theirs = recipe(other)
            why = dict.fromkeys("other teachers" if flag == "teachers" else
                                f"{flag} {theirs[phase, flag]}, not {mine[phase, flag]}"
                                for phase, flag in mine if theirs[phase, flag] != mine[phase, flag])
            found.append((len(why), other["tag"] != result["tag"], "; ".join(why), other))
    _, _, why, real = min(found, key=lambda one: one[:2], default=(0, False, "", None))
    return None if why else real, why


def beside(result: dict, folder: Path) -> str:
    """What an accuracy compares with: chance, random images of the same recipe.   folder: runs/<dataset>"""
    chance = f"chance {100 / len(result['classes']):.1f} %"
    if result["method"] == "random" or result["args"].get("protocol", "standard") != "standard":
        return chance
    real, _ = random_beside(result, read_results(folder, f"random-ipc{result['ipc']}*"))
    return f"{chance}, random real images {accuracy(real)} %" if real else chance


def rows(dataset: str, results: dict[tuple, dict]) -> tuple[list[list[str]], list[str]]:
    """The table's rows and the notes below it.   -> [cells], [text]

    A row for each result; of random images for those that no other row shows. A cell that ends in [1] has
    note 1."""
    def mark(note):
        notes.extend([note] * (note not in notes))
        return f" [{notes.index(note) + 1}]"

    def place(key):
        ipc, student, labels, method, tag = key
        return ipc, student, list(LABELS).index(labels), method == "random", methods.index(method), tag or ""

    methods, lines, notes, compared = list(METHODS), [], [], []
    for key in sorted(results, key=place):
        (ipc, student, labels, method, tag), ours = key, results[key]
        cells = [str(ipc), student, LABELS[labels], run_name(method, tag), accuracy(ours)]
        if method == "random":
            if not any(ours is real for real in compared):
                lines.append([*cells, "", "", ""])
            continue
        real, why = random_beside(ours, results)
        compared.append(real)
        apart = mark(f"random real has another recipe ({why})") if why else ""
        note = doubt(ours, real) if real and method not in SELECTIONS else ""
        margin = f"{ours['top1'] - real['top1']:+.1f}{mark(note) if note else ''}" if real else ""
        published = PUBLISHED.get((method, dataset, student, labels), {}).get(ipc, "")
        lines.append([*cells, accuracy(real) + apart, margin, published])
    return lines, [f"[{i}] {note}" for i, note in enumerate(notes, 1)] + varied(results)


def doubt(ours: dict, real: dict) -> str:
    """A note on a margin of at most zero, or within two standard errors of the difference of two accuracies
    on so many test images; "" on others."""
    margin, tested, right = ours["top1"] - real["top1"], ours.get("tested"), real["top1"] / 100
    told = 200 * (2 * right * (1 - right) / tested) ** 0.5 if tested else 0
    if margin > told:
        return ""
    note = f"with {tested} test images a margin below {told:.1f} points may be chance" if told else ""
    return note if margin > 0 else LOST + f" ({note})" * bool(note)


def varied(results: dict[tuple, dict]) -> list[str]:
    """The flags that each run changes, a line for each run."""
    first, found = {}, {}
    for key in sorted(results, key=lambda key: (*key[:4], key[4] or "")):
        result, (ipc, _, _, method, tag) = results[key], key
        base = first.setdefault(key[:4], result)
        if base is not result and method != "random":
            name = f"ipc {ipc}, {run_name(method, tag)} against {run_name(method, base['tag'])}"
            found.setdefault(name, {}).update(dict.fromkeys(changes(base, result)))
    return [f"{name}: {', '.join(flags)}" for name, flags in found.items() if flags]


def changes(base: dict, result: dict) -> list[str]:
    """The flags in which a run differs from its base, behind the phase they are for if it is one alone; of
    another method without those of recover.py and its statistics, which come with it.   -> [text]"""
    found, implied = {}, PHASES[1:3] if result["method"] != base["method"] else ()
    same_images = result["made_from"]["images"] == base["made_from"]["images"]
    for phase, args in chain(result):
        if phase in implied:
            continue
        options = [differing(phase, args, before) for other, before in chain(base) if other == phase]
        hidden = ["--tag", "--student-seeds"] + ["--images"] * same_images
        if phase in PHASES[:2]:                                      # flags that are for recover.py alone
            hidden += ["--ipc", "--backbones", "--save-epochs", "--class-statistics"]
        for words in min(options, key=len, default=[]):
            if not {*words} & {*hidden}:
                found.setdefault(shlex.join(words), {})[phase] = None
    return [words if len(phases) > 1 else f"{''.join(phases)}.py {words}" for words, phases in found.items()]


def chain(result: dict) -> list[tuple[str, dict]]:
    """What led to a RESULT of train_eval.py: (phase, arguments); backbones made alike share an entry."""
    steps = []
    for phase in PHASES[:2]:
        made = {name.partition("@")[0] if phase == "squeeze" else name: args
                for name, args in result["upstream"].get(phase, {}).items() if args}
        for name, args in made.items():
            alike = [step for other, step in steps if other == phase and all(
                step[key] == args[key] for key in (step.keys() & args.keys()) - {"backbones"})]
            if alike:
                alike[0]["backbones"].append(name)
            else:
                steps.append((phase, args | {"backbones": [name]}))
    steps += [(phase, result["upstream"][phase]) for phase in PHASES[2:4] if phase in result["upstream"]]
    return [*steps, ("train_eval", result["args"])]


def differing(phase: str, args: dict, others: dict) -> list[list[str]]:
    """The flags of a phase whose arguments are other than others'.   -> [[--flag, values]]"""
    words = []
    for action in parser_of(phase)._actions:
        value, other = (setting(phase, known, action.dest) for known in (args, others))
        if action.dest in NEUTRAL or value == other:
            continue
        flag = action.option_strings[value is False]                 # --flag, --no-flag
        words.append(["without", flag] if value is None else [flag] if isinstance(value, bool)
                     else [flag, *map(str, value if isinstance(value, list) else [value])])
    return words


def run_name(method: str, tag: str | None) -> str:
    """Of a run, without its IPC."""
    return method + (f"-{tag}" if tag else "")


def accuracy(result: dict | None) -> str:
    if result is None:
        return "not run"
    return f"{result['top1']:.1f}" + (f" ± {result['top1_std']:.1f}" if len(result["seeds"]) > 1 else "")


def table(header: tuple[str, ...], lines: list[list[str]]) -> str:
    """A Markdown table with aligned columns."""
    widths = [max(map(len, column)) for column in zip(header, *lines)]
    lines = [header, ["-" * width for width in widths], *lines]
    return "\n".join("| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths)) + " |"
                     for line in lines)


def main(argv=None):
    parser = Parser(__doc__, "utils.report")
    parser.add_argument("folder", type=Path, metavar="runs/DATASET", help="where the phases wrote")
    args = parser.parse_args(argv)
    if not args.folder.is_dir():
        near = args.folder.parent
        there = sorted({str(near / path.relative_to(near).parts[0])
                        for path in [*near.glob("*/teachers"), *near.glob("*/*/result.json")]})
        fail(f"{args.folder.absolute()}: there is no such folder; "
             + (f"name one of: {' '.join(there)}" if there else "run the phases first"))
    results = read_results(args.folder)
    if not results:
        near = args.folder.parent if (args.folder / "eval").is_dir() else next(
            (path.parents[2] for path in args.folder.glob("*/*/eval/*.json")), None)
        fail(f"{args.folder} holds no <run>/eval/<student>.json of --protocol standard; "
             + (f"name {near}" if near else "run train_eval.py first"))
    lines, notes = rows(args.folder.resolve().name, results)
    print("\n".join([table(HEADER, lines), *[""] * bool(notes), *notes]))


if __name__ == "__main__":
    main()
