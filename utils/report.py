"""The results of a data set as a table: every method beside random real images under the same recipe.

    python -m utils.report runs/cifar10                # the table
    python -m utils.report runs/cifar10 --keep         # also a file for each of its cells into tests/evidence
    python -m utils.report --evidence                  # the README's tables, of the files in tests/evidence
    python -m utils.report --evidence <cell>           # the commands that repeat a cell

A row for each IPC, student, kind of labels and run. Top-1 of the last epoch in %, mean over student seeds and standard
deviation; margin = run minus random real. A run is compared with random images that had the same labels and training (the
same teachers and settings, whatever its tag), of its tag where there are several. "published" is what papers print for the
method, under their own recipes.
"""
import shlex
from functools import cache
from importlib import import_module
from pathlib import Path

from utils import fail
from utils.cli import Parser, parse_args
from utils.data import DATASETS, preset_column
from utils.presets import METHODS, UNMATCHED
from utils.run import NEUTRAL, load_json, relevant, save_json

R18, R50, R101, CONVNET = "resnet18", "resnet50", "resnet101", "convnet_w128"
PUBLISHED = {   # method, data set, student, labels -> {IPC: top-1}
    # arXiv:2311.17950, Tables 4 and 5; of SRe2L on CIFAR as run there, of the selections and DM as cited there
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
    ("scdd", "imagenet", "regnet_x_8gf", "stored"): {50: "61.94"},          # Table 8, of MoCo v3, with SRe2L's
    ("scdd", "imagenet", "squeezenet", "stored"): {50: "22.25"},
    ("scdd", "imagenet", "shufflenetv2_05", "stored"): {50: "27.48"},
    ("sre2l", "imagenet", "regnet_x_8gf", "stored"): {50: "59.89"},
    ("sre2l", "imagenet", "squeezenet", "stored"): {50: "14.66"},
    ("sre2l", "imagenet", "shufflenetv2_05", "stored"): {50: "16.71"},
    # arXiv:2410.07579; the 55.2 that others cite for Tiny-ImageNet at IPC 50 contradicts its abstract
    ("teddy", "imagenet", R18, "stored"): {10: "34.1 ± 0.1", 50: "52.5 ± 0.1", 100: "56.5 ± 0.0"},
    ("teddy", "imagenet", R50, "stored"): {5: "21.0", 10: "37.2", 50: "58.5"},
}
EVIDENCE = Path(__file__).resolve().parents[1] / "tests" / "evidence"
BASES = "ablation", "family", "search"            # tags of cells with which others, tagged <base>-<word>, and methods are compared
PHASES = "squeeze", "collect_stats", "recover", "relabel", "train_eval"
IDENTITY = "ipc", "student", "labels", "method", "tag"
MAIN_HEADER = ("data set", "IPC", "student", "run", "distilled", "random real", "margin", "hard: distilled", "hard: random real",
               "paper", "seconds: squeeze, statistics, recover, relabel, a student", "hardware")
COST_HEADER = ("run", "images", "labels", "teachers", "statistics", *PHASES)
HEADER = ("ipc", "student", "labels", "run", "top-1", "random real", "margin", "published")
LABELS = {"stored": "soft", "online": "soft, online", "hard": "hard"}
RECIPE = ("image_size", "precision", "mix", "epochs", "batch_size", "whole_up_to", "optimizer", "lr", "momentum", "weight_decay",
          "schedule", "lr_stretch", "ema_decay", "label_epochs", "crop_floor")
SOFT = ("loss", "gamma", "temperature", "logit_norm", "seed")                  # of soft labels alone


def read_results(folder):
    """{(ipc, student, labels, method, tag): result} of all evaluations below runs/<dataset>."""
    results = {}
    for path in sorted(folder.glob("*/eval/*.json")):
        remedy = "remove it and run train_eval.py again"
        result = load_json(path, remedy, (*IDENTITY, "top1", "top1_std", "seeds", "args", "upstream", "made_from"))
        if result["method"] not in METHODS or result["labels"] not in LABELS or not isinstance(result["ipc"], int):
            fail(f"{path} is no result of train_eval.py; {remedy}")
        if result["args"].get("protocol", "standard") == "standard":
            results[tuple(result[key] for key in IDENTITY)] = result
    return results


def recipe(result):
    """What decides an accuracy but for the images: the settings of labels and training, and the teachers' weights."""
    keys = RECIPE + SOFT * (result["labels"] != "hard")
    return ([setting("train_eval", result["args"], key) for key in keys],
            [setting("relabel", result["upstream"].get("relabel", {}), key) for key in keys], result["made_from"].get("weights"))


@cache
def parser_of(phase):
    return import_module(phase).get_parser()


def setting(phase, args, flag):
    """What a phase ran with; a result older than a flag was made as the parser's default has it, whatever a preset says now."""
    return args.get(flag, parser_of(phase).get_default(flag))


def random_beside(result, results):
    """The result of random images under the same recipe, of the same tag if there is one; or None."""
    ipc, student, labels, tag = (result[key] for key in ("ipc", "student", "labels", "tag"))
    beside = {key[4]: other for key, other in results.items()
              if key[:4] == (ipc, student, labels, "random") and recipe(other) == recipe(result)}
    return beside.get(tag, next(iter(beside.values()), None))


def rows(dataset, results):
    """The cells of the table: a row for each run and kind of labels. Random ones are the comparison, and stand in a row
    where there is none to compare."""
    runs, methods = shown_runs(results), list(METHODS)
    for ipc, student in sorted({run[:2] for run in runs}):
        mine = sorted((run for run in runs if run[:2] == (ipc, student)), key=lambda run: (methods.index(run[2]), run[3] or ""))
        for labels in LABELS:
            if labels == "online" and not any(key[:3] == (ipc, student, labels) for key in results):
                continue
            for *_, method, tag in mine:
                ours = results.get((ipc, student, labels, method, tag))
                if not ours and labels != "stored" and is_variant(dataset, tag):
                    continue
                real = random_beside(ours, results) if ours else results.get((ipc, student, labels, "random", tag)) or results.get(
                    (ipc, student, labels, "random", None))
                yield (str(ipc), student, LABELS[labels], run_name(method, tag), accuracy(ours), accuracy(real),
                       f"{ours['top1'] - real['top1']:+.1f}" if ours and real else "",
                       PUBLISHED.get((method, dataset, student, labels), {}).get(ipc, ""))


def shown_runs(results):
    """(ipc, student, method, tag) of all runs but those of random images, which stand beside G-VBSM's where there is none to
    compare."""
    runs = {(ipc, student, method, tag) for ipc, student, _, method, tag in results if method != "random"}
    compared = {run[:2] for run in runs}
    return runs | {(ipc, student, "gvbsm", tag) for ipc, student, _, _, tag in results if (ipc, student) not in compared}


def accuracy(result):
    if result is None:
        return "not run"
    return f"{result['top1']:.1f}" + (f" ± {result['top1_std']:.1f}" if len(result["seeds"]) > 1 else "")


def table(header, lines):
    """A Markdown table with aligned columns."""
    widths = [max(map(len, column)) for column in zip(header, *lines)]
    lines = [header, ["-" * width for width in widths], *lines]
    return "\n".join("| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths)) + " |" for line in lines)


def keep(folder, results, out):
    """Write a file for each run, IPC and student: RESULT objects of train_eval.py, by labels, of the run ("distilled") and of
    random real images beside it ("real"); what each phase has cost, and bytes on the disk."""
    for ipc, student, method, tag in shown_runs(results):
        ours = {labels: results[key] for labels in LABELS if (key := (ipc, student, labels, method, tag)) in results}
        alone = {labels: results.get((ipc, student, labels, "random", tag)) for labels in LABELS}
        real = alone | {labels: random_beside(result, results) for labels, result in ours.items()}
        real = {labels: result for labels, result in real.items() if result}
        first, stem = next(iter((ours or real).values())), folder_of({"ipc": ipc, "method": method, "tag": tag})
        run, teachers, names = folder / stem, folder / "teachers" / first["args"]["teachers"], first["args"]["backbones"]
        whole = list(dict.fromkeys(name.partition("@")[0] for name in names))                # weak teachers come with these
        matched = [] if method in UNMATCHED else names
        images = Path(ours and first["args"]["images"] or run / "images")                    # another run's, with its cost
        costs = [spent(teachers / "squeeze.json", whole), spent(teachers / "collect_stats.json", matched) if matched else None,
                 spent(images.parent / "result.json"), spent(run / "labels" / "result.json"),
                 {"seconds": first["seconds"] / len(first["seeds"]), "mib": memory(first), "hardware": first["hardware"]}]
        save_json(out / f"{folder.resolve().name}-{stem}-{student}.json", {
            "dataset": folder.resolve().name, "ipc": ipc, "student": student, "method": method, "tag": tag,
            "costs": dict(zip(PHASES, costs)),
            "bytes": {"images": size(images.glob("*/*")), "labels": size(run.glob("labels/*.npy")),
                      "teachers": size(teachers / f"{name}.pt" for name in names),
                      "statistics": size(teachers / f"{name}.stats.pt" for name in matched)},
            "distilled": ours, "real": real})


def folder_of(result):
    """Of a run, below that of the data set."""
    return f"{result['method']}-ipc{result['ipc']}" + (f"-{result['tag']}" if result["tag"] else "")


def spent(path, backbones=()):
    """Seconds, most memory and hardware of a RESULT file, if there is one; of squeeze.py and collect_stats.py for these
    backbones."""
    result = load_json(path, "run its phase again", ("seconds", "peak_memory", "hardware")) if path.exists() else None
    known = result.get("costs", {}) if result else {}
    parts = [known[name] for name in backbones if name in known] if backbones else [result]
    return {"seconds": sum(part["seconds"] for part in parts), "mib": max(map(memory, parts)),
            "hardware": result["hardware"]} if result and parts else None


def memory(result):
    """The GPU's if one was used."""
    return result["peak_memory"].get("cuda_mib") or result["peak_memory"]["host_mib"]


def size(files):
    """In bytes, of those that are there."""
    return sum(path.stat().st_size for path in files if path.exists())


def read_evidence(folder):
    """-> {name: cell of `keep`}"""
    keys = "dataset", "ipc", "student", "method", "tag", "costs", "bytes", "distilled", "real"
    return {path.stem: load_json(path, "remove it", keys) for path in sorted(folder.glob("*.json"))}


def pair(cell, labels):
    """Top-1 of a cell's images and of real ones, and the margin, as text."""
    ours, real = cell["distilled"].get(labels), cell["real"].get(labels)
    return accuracy(ours), accuracy(real), f"{ours['top1'] - real['top1']:+.1f}" if ours and real else ""


def main_table(cells):
    """A row for each cell that is no part of a comparison (tag), and one for each number of the paper without an untagged one."""
    shown = {name: cell for name, cell in cells.items() if not is_variant(cell["dataset"], cell["tag"])}
    order = [*DATASETS, ...]
    done = {(cell["method"], cell["dataset"], cell["ipc"], cell["student"]) for cell in shown.values() if not cell["tag"]}
    lines = [(cell["dataset"], cell["ipc"], [
        cell["dataset"], str(cell["ipc"]), cell["student"], run_name(cell["method"], cell["tag"]),
        *pair(cell, "stored"), *pair(cell, "hard")[:2],
        PUBLISHED.get((cell["method"], cell["dataset"], cell["student"], "stored"), {}).get(cell["ipc"], ""),
        ", ".join(f"{cost['seconds']:.0f}" if cost else "–" for cost in cell["costs"].values()),
        hardware(cell)]) for cell in shown.values()]
    for (method, dataset, student, _), published in PUBLISHED.items():
        if left := [ipc for ipc in published if method == "gvbsm" and (method, dataset, ipc, student) not in done]:
            lines.append((dataset, 10 ** 6, [dataset, ", ".join(map(str, left)), student, method, "not run", "not run", "",
                                             "not run", "not run", ", ".join(published[ipc] for ipc in left), "", ""]))
    lines.sort(key=lambda line: (order.index(line[0] if line[0] in order else ...), *line[1:]))
    return table(MAIN_HEADER, [line for _, _, line in lines])


def hardware(cell):
    """Of its phases; the student's where a file does not tell that of the others."""
    student = next(iter((cell["distilled"] or cell["real"]).values()))["hardware"]
    return ", then ".join(dict.fromkeys(cost.get("hardware", student) for cost in cell["costs"].values() if cost))


def run_name(method, tag):
    """Of a run, without its IPC."""
    return method + (f"-{tag}" if tag else "")


def is_variant(dataset, tag):
    """Whether a cell belongs to a comparison: its tag is one of BASES, or that and a dash and a word."""
    return dataset.endswith("-holdout") or (tag or "").partition("-")[0] in BASES


def comparisons(cells):
    """A table for each base, a cell of G-VBSM whose tag is one of BASES: what each change of one thing, or another method
    under the base's tag, is worth."""
    def where(cell):
        return cell["dataset"], cell["ipc"], cell["student"]

    for base in (cell for cell in cells.values() if cell["tag"] in BASES and cell["method"] == "gvbsm"
                 and "stored" in cell["distilled"]):
        alike = [cell for cell in cells.values() if cell["distilled"] and where(cell) == where(base) and (
            (cell["tag"] or "").startswith(base["tag"] + "-") or cell["tag"] == base["tag"] and cell["method"] != base["method"])]
        start = base["distilled"]["stored"]
        lines = [["base", accuracy(start), "", pair(base, "stored")[2]]]
        for cell in alike:
            labels, result = next(iter(cell["distilled"].items()))
            lines.append([changes(start, result), accuracy(result), f"{result['top1'] - start['top1']:+.1f}",
                          pair(cell, labels)[2]])
        yield f"{base['dataset']}, IPC {base['ipc']}, {base['student']}, base `--tag {base['tag']}`", table(
            ("change", "top-1", "against the base", "margin over random real"), lines)


def changes(base, result):
    """The flags in which a run differs from its base, behind the phase they are for if it is one alone; of another method
    without those of recover.py and its statistics, which come with it."""
    found, implied = {}, PHASES[1:3] if result["method"] != base["method"] else ()
    same_images = result["made_from"]["images"] == base["made_from"]["images"]
    for phase, args in chain(result):
        if phase in implied:
            continue
        before = [earlier for other, earlier in chain(base) if other == phase]
        options = [differing(phase, args, earlier) for earlier in before]
        told_by_recover = ("--ipc", "--backbones", "--save-epochs", "--class-statistics") if phase in PHASES[:2] else ()
        unsaid = "--tag", "--student-seeds", *told_by_recover, *["--images"] * same_images
        for words in min(options, key=len, default=[]):
            if words[0] not in unsaid:
                found.setdefault(shlex.join(words), {})[phase] = None
    return ", ".join(f"`{words}`" if len(phases) > 1 else f"`{''.join(phases)}.py {words}`" for words, phases in found.items())


def chain(result):
    """What led to a RESULT of train_eval.py.   -> [(phase, arguments)]; backbones that were made alike share an entry"""
    steps = []
    for phase in PHASES[:2]:
        made = [(name.partition("@")[0] if phase == "squeeze" else name, args)
                for name, args in result["upstream"].get(phase, {}).items() if args]
        for name, args in dict(made).items():
            alike = [step for other, step in steps if other == phase and all(
                step[key] == args[key] for key in (step.keys() & args.keys()) - {"backbones"})]
            if alike:
                alike[0]["backbones"].append(name)
            else:
                steps.append((phase, args | {"backbones": [name]}))
    steps += [(phase, result["upstream"][phase]) for phase in PHASES[2:4] if phase in result["upstream"]]
    return [*steps, ("train_eval", result["args"])]


def differing(phase, args, others):
    """The flags of a phase whose arguments are other than others'.   -> [[--flag, values]]"""
    words = []
    for action in parser_of(phase)._actions:
        value, other = (setting(phase, known, action.dest) for known in (args, others))
        if action.dest not in NEUTRAL and value != other and value is not None:
            flag = action.option_strings[value is False]             # --flag, --no-flag
            words.append([flag] if isinstance(value, bool) else [flag, *map(str, value if isinstance(value, list) else [value])])
    return words


def command(phase, args):
    """The shortest command that runs a phase with these arguments, by the recipe of the method or of G-VBSM."""
    identity = ["--dataset", args["dataset"], "--ipc", str(args["ipc"]), "--method", args["method"], "--preset", args["preset"]]
    identity += ["--holdout"] * args.get("holdout", False)
    recipes = [[], ["--recipe", "gvbsm"]] if phase in ("relabel", "train_eval") else [[]]      # a third would fit by chance
    lines = []
    for recipe in recipes:
        module = import_module(phase)
        parsed = parse_args(module.get_parser(), phase, identity + recipe, preset_column)
        own = module.for_student(parsed, args["students"][0]) if phase == "train_eval" else parsed
        defaults = relevant(own) | {"students": getattr(parsed, "students", None)}
        lines.append(identity + recipe + [word for words in differing(phase, args, defaults) for word in words])
    line = shlex.join(["python", f"{phase}.py", *min(lines, key=len)])
    return line.replace(" --method gvbsm", "").replace(" --preset paper", "")


def commands(cells):
    """Those that repeat cells, one a line."""
    results = [result for cell in cells for side in ("distilled", "real") for result in cell[side].values()]
    return list(dict.fromkeys(command(phase, args) for result in results for phase, args in chain(result)))


def cost_table(runs):
    """A row for each run: bytes on the disk, seconds and memory."""
    return table(COST_HEADER, [[
        name, *(f"{cells[0]['bytes'][what] / 1e6:.2f}" for what in ("images", "labels", "teachers", "statistics")),
        *(cost(cells[0]["costs"][phase]) for phase in PHASES[:4]),
        "; ".join(f"{cell['student']} {cost(cell['costs']['train_eval'])}" for cell in cells)] for name, cells in runs.items()])


def cost(took):
    return f"{took['seconds']:.0f} s, {took['mib'] / 1024:.1f} GiB" if took else "–"


def evidence(cells):
    """The README's tables."""
    parts = [main_table(cells)]
    parts += [f"{title}:\n\n{lines}" for title, lines in comparisons(cells)]
    shown, bases = {}, {}                                                        # run: its cells, one for each student
    for name, cell in cells.items():
        variant = is_variant(cell["dataset"], cell["tag"])
        if not variant or cell["tag"] in BASES:
            (bases if variant else shown).setdefault(name.removesuffix("-" + cell["student"]), []).append(cell)
    parts += ["Megabytes on the disk; seconds and most memory of each phase:\n\n" + cost_table(shown)]
    for name, mine in (shown | bases).items():
        lines = "\n".join(commands(mine))
        parts.append(f"<details><summary>Commands of {name}</summary>\n\n```bash\n{lines}\n```\n\n</details>")
    return "\n\n".join(parts)


def main(argv=None):
    parser = Parser(__doc__)
    parser.prog = "utils.report"
    parser.add_argument("folder", type=Path, nargs="?", metavar="runs/DATASET", help="where the phases wrote")
    parser.add_argument("--keep", action="store_true", help="also write the folder's cells into tests/evidence")
    parser.add_argument("--evidence", nargs="?", const="", metavar="CELL",
                        help="the README's tables, of tests/evidence; or the commands that repeat a cell")
    args = parser.parse_args(argv)
    if (args.evidence is None) == (args.folder is None):
        fail("name a folder such as runs/cifar10, or --evidence, and not both")
    if args.folder is None:
        cells = read_evidence(EVIDENCE)
        if args.evidence and args.evidence not in cells:
            fail(f"--evidence {args.evidence}: there is no such cell; name one of: {' '.join(cells)}")
        print("\n".join(commands([cells[args.evidence]])) if args.evidence else evidence(cells))
        return
    results = read_results(args.folder)
    if not results:
        fail(f"{args.folder} holds no evaluation (<run>/eval/<student>.json); run train_eval.py first")
    print(table(HEADER, list(rows(args.folder.resolve().name, results))))
    if args.keep:
        keep(args.folder, results, EVIDENCE)


if __name__ == "__main__":
    main()
