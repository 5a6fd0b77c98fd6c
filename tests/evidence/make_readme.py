"""Write README.md beside this file from the result files: results, comparisons, costs, and the commands
behind each row.

    python -m tests.evidence.make_readme                    # after a result file was added or removed
    python -m tests.evidence.make_readme runs/cifar10 ...   # first write a file for each of these results

A result file (a "cell") holds a run's results with one student and those of random real images beside it:
RESULT objects of train_eval.py with the arguments of every phase, and what each phase cost. A file whose tag
or data set is new gets a row too.
"""
import json
import os
import re
import shlex
from functools import cache
from importlib import import_module
from pathlib import Path
from statistics import correlation, fmean, pstdev

from tests.evidence.transfer_sets import CHOOSE, TEST
from utils import fail
from utils.checkpoint import load_torch
from utils.cli import parse_args
from utils.data import DATASETS, look
from utils.files import load_json, save_json
from utils.hub import without_places
from utils.parser import Parser
from utils.presets import METHODS, UNMATCHED
from utils.provenance import relevant
from utils.report import (BASES, LABELS, PHASES, PUBLISHED, accuracy, chain, changes, differing, random_beside,
                          read_results, run_name, table)

FOLDER = Path(__file__).resolve().parent
NO_RUNS = ["--run-dir", os.devnull]  # so that the page does not depend on the runs that are here
FAMILY = "family"  # the tag of the base that compares methods; the others change one thing
INTRODUCTION = """# Every result

Written by `python -m tests.evidence.make_readme` from the files beside this page, one for each run and student. *distilled*
and *random real*: top-1 on the test images after the last epoch in %, mean ± standard deviation over student seeds, of a
student trained on the run's images, and on as many random training images under the same teachers, labels and training.
*margin*: their difference. *hard labels*: the same images with their classes alone, distilled first, random real second.
*paper*: what the method's paper prints, under its own recipe. *against the base*: *distilled* less the base run's. A run
under `--images` distils nothing: its images come from that folder.

One set of images stands behind a row, and one seed where there is no ±. Differences below one or two points then say nothing.
A data set named `...-holdout` is tested on a tenth of its training images, which serves to choose settings.
[NOTES.md](NOTES.md) says what the rows mean."""


# Result files

def shown_runs(results: dict[tuple, dict]) -> set[tuple]:
    """(ipc, student, method, tag) of all runs; random images stand beside them, or else in G-VBSM's place."""
    runs = {(ipc, student, method, tag) for ipc, student, _, method, tag in results if method != "random"}
    compared = {run[:2] for run in runs}
    return runs | {(ipc, student, "gvbsm", tag) for ipc, student, _, _, tag in results
                   if (ipc, student) not in compared}


def keep(folder, results, out):
    """Write a cell for each run, IPC and student of runs/<dataset>."""
    for ipc, student, method, tag in shown_runs(results):
        ours = {labels: results.get((ipc, student, labels, method, tag)) for labels in LABELS}
        real = {labels: random_beside(result, results)[0] if result else
                results.get((ipc, student, labels, "random", tag)) for labels, result in ours.items()}
        ours, real = ({labels: nowhere(result) for labels, result in side.items() if result}
                      for side in (ours, real))
        first, stem = next(iter((ours or real).values())), f"{method}-ipc{ipc}" + (f"-{tag}" if tag else "")
        run, teachers = folder / stem, folder / "teachers" / first["args"]["teachers"]
        names = first["args"]["backbones"]
        matched = [] if method in UNMATCHED else names
        squeezed = [name.partition("@")[0] for name in names]              # weak teachers come with these
        images = Path(ours and first["args"]["images"] or run / "images")  # another run's, with its cost
        costs = [spent(teachers / "squeeze.json", squeezed), spent(teachers / "collect_stats.json", matched),
                 spent(images.parent / "result.json"), spent(run / "labels" / "result.json"),
                 {"seconds": first["seconds"] / len(first["seeds"]), "mib": memory(first),
                  "hardware": first["hardware"]}]
        dataset = folder.resolve().name
        save_json(out / f"{dataset}-{stem}-{student}.json", {
            "dataset": dataset, "ipc": ipc, "student": student, "method": method, "tag": tag,
            "teachers": {name: load_torch(path, "run squeeze.py again", ("top1",))["top1"]
                         for name in names if (path := teachers / f"{name}.pt").exists()},
            "costs": dict(zip(PHASES, costs)),
            "bytes": {"images": size(images.glob("*/*")), "labels": size(run.glob("labels/*.npy")),
                      "teachers": size(teachers / f"{name}.pt" for name in names),
                      "statistics": size(teachers / f"{name}.stats.pt" for name in matched)},
            "distilled": ours, "real": real})


def nowhere(result):
    """A result without the place of its data on this machine."""
    return result | {"data_set": without_places(result["data_set"])} if result.get("data_set") else result


def spent(path, backbones=None):
    """Seconds, most memory and hardware of a RESULT file, if there is one; of squeeze.py and collect_stats.py
    for these backbones."""
    if not path.exists():
        return None
    result = load_json(path, "run its phase again", ("seconds", "peak_memory", "hardware"))
    parts, known = [result], result.get("costs", {})
    if backbones is not None:
        parts = [known[name] for name in dict.fromkeys(backbones) if name in known]
    return {"seconds": sum(part["seconds"] for part in parts), "mib": max(map(memory, parts)),
            "hardware": result["hardware"]} if parts else None


def memory(result):
    """In MiB, the GPU's if one was used."""
    return result["peak_memory"].get("cuda_mib") or result["peak_memory"]["host_mib"]


def size(files):
    """In bytes, of those that are there."""
    return sum(path.stat().st_size for path in files if path.exists())


def read_cells(folder=None):
    """Of this folder.   -> {name: cell}"""
    keys = "dataset", "ipc", "student", "method", "tag", "costs", "bytes", "distilled", "real"
    return {path.stem: load_json(path, "remove it", keys)
            for path in sorted((folder or FOLDER).glob("*.json"))}


# Tables

def pair(cell, labels):
    """Top-1 of a cell's images and of real ones, and the margin, as text."""
    ours, real = cell["distilled"].get(labels), cell["real"].get(labels)
    return accuracy(ours), accuracy(real), f"{ours['top1'] - real['top1']:+.1f}" if ours and real else ""


def both(cell, labels="hard"):
    """Top-1 of a cell's images and of real ones in one text; "" where neither was run."""
    return ", ".join(pair(cell, labels)[:2]) if labels in cell["distilled"] | cell["real"] else ""


def soft_kinds(cell):
    there = cell["distilled"] | cell["real"]
    return [labels for labels in ("stored", "online") if labels in there] or ["stored"]


def paper(cell, labels="stored"):
    return PUBLISHED.get((cell["method"], cell["dataset"], cell["student"], labels), {}).get(cell["ipc"], "")


def results_table(cells):
    """A row for each cell."""
    methods = list(METHODS)
    cells = sorted(cells, key=lambda cell: (cell["ipc"], cell["student"], methods.index(cell["method"]),
                                            cell["tag"] or ""))
    header = "IPC", "student", "run", "distilled", "random real", "margin", "hard labels", "paper"
    return table(header, [[
        str(cell["ipc"]), cell["student"],
        run_name(cell["method"], cell["tag"]) + ", online labels" * (labels == "online"),
        *pair(cell, labels), both(cell), paper(cell)] for cell in cells for labels in soft_kinds(cell)])


def comparison_table(base, cells):
    """What each change of one thing, or another method under the base's tag, is worth."""
    start, lines = base["distilled"]["stored"], []
    for cell in [base, *cells]:
        labels, result = next(iter(cell["distilled"].items()))
        change = ", ".join(f"`{words}`" for words in changes(start, result))
        against = "" if cell is base else f"{result['top1'] - start['top1']:+.1f}"
        lines.append([run_name(cell["method"], cell["tag"]), "base" if cell is base else change,
                      *pair(cell, labels), against, both(cell) if labels != "hard" else ""])
    return table(("run", "change", "distilled", "random real", "margin", "against the base", "hard labels"),
                 lines)


def family_table(cells):
    """Every method under one recipe, the best first; random images stand in rows of their own."""
    base = next((next(iter(cell["distilled"].values())) for cell in cells
                 if cell["method"] == "gvbsm" and cell["tag"] == FAMILY), None)
    lines, reals = [], {}  # some cells have random images beside them under one kind of labels alone
    for cell in cells:
        (soft, soft_real, margin), (hard, hard_real, hard_margin) = (pair(cell, labels)
                                                                     for labels in ("stored", "hard"))
        result, took = next(iter(cell["distilled"].values())), cell["costs"]["recover"]
        changed = changes(base, result) if base and cell["method"] == "gvbsm" else []
        flags = [words.removeprefix("recover.py ") for words in changed if words.startswith("recover.py ")]
        numbers = [f"{number} ({LABELS[labels]})" for labels in ("stored", "hard")
                   if (number := paper(cell, labels))]
        backbones = result["upstream"].get("recover", {}).get("backbones") or []
        lines.append((cell["distilled"].get("stored"), [
            run_name(cell["method"], cell["tag"].removeprefix(FAMILY).removeprefix("-")), soft, margin, hard,
            hard_margin, f"{took['seconds']:.0f}" if took else "–", "; ".join(numbers),
            " ".join(backbones) + "".join(f", `{words}`" for words in flags)]))
        if soft_real not in reals or "hard" in cell["real"]:
            reals[soft_real] = cell["real"].get("stored"), ["random real", soft_real, "", hard_real, *[""] * 4]
    lines += reals.values()
    lines.sort(key=lambda line: -line[0]["top1"] if line[0] else 0)
    return table(("run", "soft labels", "margin", "hard labels", "margin, hard", "seconds of recover",
                  "paper (labels)", "backbones and flags of recover"), [line for _, line in lines])


def margin_and_gap(cell):
    """In points, with stored labels: the margin over random real images, and how far the student of these is
    behind the teacher of its architecture (None where no file tells); None without a margin."""
    ours, real = (cell[side].get("stored") for side in ("distilled", "real"))
    teacher = cell.get("teachers", {}).get(cell["student"])
    return (ours["top1"] - real["top1"], teacher and teacher - real["top1"]) if ours and real else None


def transfer_table(cells):
    """Margins, gaps in brackets: a column for each of the sets of transfer_sets.py, and the margins' mean and
    standard deviation."""
    rows = {}
    for cell in cells:
        if both := margin_and_gap(cell):
            run = cell["ipc"], cell["student"], run_name(cell["method"], cell["tag"])
            rows.setdefault(run, {})[cell["dataset"]] = both
    sets, lines = sorted({dataset for row in rows.values() for dataset in row}), []
    for (ipc, student, run), row in sorted(rows.items()):
        shown = {name: f"{margin:+.1f}" + (f" ({gap:.1f})" if gap else "")
                 for name, (margin, gap) in row.items()}
        margins = [margin for margin, _ in row.values()]
        spread = f" ± {pstdev(margins):.1f}" * (len(margins) > 1)
        lines.append([f"{ipc}, {student}", run, *(shown.get(name, "") for name in sets),
                      f"{fmean(margins):+.1f}{spread}"])
    return table(("IPC, student", "run", *sets, "mean"), lines)


def transfers(cells):
    """The table of a kind of sets and what it says of all G-VBSM runs in it."""
    pairs = [both for cell in cells
             if cell["method"] == "gvbsm" and (both := margin_and_gap(cell)) and both[1]]
    text = ("In points; in brackets how far the student of random images is behind the teacher of its "
            "architecture. Mean ± standard deviation are over a row's sets.")
    if len({gap for _, gap in pairs}) > 1:
        margins, gaps = zip(*pairs)
        text += (f" Over the {len(pairs)} cells of gvbsm with both numbers, their correlation is "
                 f"{correlation(margins, gaps):.2f}, and the sum of margins is {sum(margins) / sum(gaps):.0%} of "
                 "the sum of gaps.")
    return f"{text}\n\n{transfer_table(cells)}"


def missing_table(cells):
    """The paper's numbers without an untagged run here."""
    done = {(cell["dataset"], cell["student"], cell["ipc"]) for cell in cells
            if cell["method"] == "gvbsm" and not cell["tag"]}
    ours = {key[1:3]: numbers for key, numbers in PUBLISHED.items() if key[0] == "gvbsm"}
    lines = [[*key, str(ipc), number] for key, numbers in ours.items() for ipc, number in numbers.items()
             if (*key, ipc) not in done]
    return table(("data set", "student", "IPC", "paper"), lines)


def byte_table(runs):
    kinds = "images", "labels", "teachers", "statistics"
    return table(("run", *kinds), [[name, *(f"{cells[0]['bytes'][kind] / 1e6:.2f}" for kind in kinds)]
                                   for name, cells in runs.items()])


def cost_table(runs):
    return table(("run", *PHASES, "hardware"), [[
        name, *(cost(cells[0]["costs"][phase]) for phase in PHASES[:4]),
        "; ".join(f"{cell['student']} {cost(cell['costs']['train_eval'])}" for cell in cells),
        "; ".join(dict.fromkeys(map(hardware, cells)))] for name, cells in runs.items()])


def cost(took):
    return f"{took['seconds']:.0f} s, {took['mib'] / 1024:.1f} GiB" if took else "–"


def hardware(cell):
    """Of its phases; the student's where a file does not name that of the others."""
    student = next(iter((cell["distilled"] or cell["real"]).values()))["hardware"]
    named = [took.get("hardware", student) for took in cell["costs"].values() if took]
    return ", then ".join(dict.fromkeys(named))


# Commands

def data_of(dataset, data_dir, known=(), holdout=False):
    """`look`; a folder that is not there is taken for one of transfer_sets.py: ten classes, 5000 images of 32
    pixels."""
    if dataset in DATASETS or Path(dataset).is_dir():
        return look(dataset, data_dir, known, holdout)
    return look("cifar10", os.devnull) | {"train": 5000}


@cache
def shortest(phase, text):
    """The shortest command that runs a phase with these arguments (JSON), by the recipe of the method or of
    G-VBSM."""
    args = json.loads(text)
    if args.get("image_size") == DATASETS.get(args["dataset"], {}).get("image_size"):
        args["image_size"] = None                                    # as if squeeze.py had not decided it
    identity = ["--dataset", args["dataset"], "--ipc", str(args["ipc"]), "--method", args["method"],
                "--preset", args["preset"]]
    identity += ["--holdout"] * args.get("holdout", False)
    # a third would fit by chance
    recipes = [[], ["--recipe", "gvbsm"]] if phase in ("relabel", "train_eval") else [[]]
    lines = []
    for recipe in recipes:
        module = import_module(phase)
        parsed = parse_args(module.get_parser(), phase, identity + recipe + NO_RUNS, data_of)
        own = module.for_student(parsed, args["students"][0]) if phase == "train_eval" else parsed
        defaults = relevant(own) | {"students": getattr(parsed, "students", None)}
        lines.append(identity + recipe + [word for words in differing(phase, args, defaults)
                                          for word in words])
    line = shlex.join(["python", f"{phase}.py", *min(lines, key=len)])
    return line.replace(" --method gvbsm", "").replace(" --preset paper", "")


def command(phase, args):
    return shortest(phase, json.dumps(args))


def commands(cells):
    """Those that repeat cells, one a line, in the order of the phases."""
    results = [result for cell in cells for side in ("distilled", "real") for result in cell[side].values()]
    steps = [step for result in results for step in chain(result)]
    steps.sort(key=lambda step: PHASES.index(step[0]))
    return list(dict.fromkeys(command(*step) for step in steps))


# The page

def compared(cells):
    """The cells of a data set, dealt to tables.   -> [families], [(base, cells that are compared with it)],
    the others"""
    def key(cell):
        return cell["ipc"], cell["student"]

    def under(cell, tag):
        return (cell["tag"] or "") == tag or (cell["tag"] or "").startswith(tag + "-")

    families = {}
    for cell in cells:
        if under(cell, FAMILY) and cell["distilled"]:
            families.setdefault(key(cell), []).append(cell)
    bases = [cell for cell in cells if cell["tag"] in {*BASES} - {FAMILY} and cell["method"] == "gvbsm"
             and "stored" in cell["distilled"]]
    comparisons = [(base, [cell for cell in cells if cell is not base and cell["distilled"]
                           and key(cell) == key(base) and under(cell, base["tag"])]) for base in bases]
    placed = [id(cell) for family in families.values() for cell in family]
    placed += [id(cell) for base, others in comparisons for cell in (base, *others)]
    return list(families.values()), comparisons, [cell for cell in cells if id(cell) not in placed]


def folded(title, text):
    return f"<details><summary>{title}</summary>\n\n{text}\n\n</details>"


def section(dataset, cells):
    """Of one data set.   cells: {name: cell}"""
    families, comparisons, others = compared(list(cells.values()))
    parts = [f"## {dataset}", *[results_table(others)] * bool(others)]
    for family in families:
        where = f"{dataset}, IPC {family[0]['ipc']}, {family[0]['student']}"
        parts += [f"### Every method under one recipe: {where}", family_table(family)]
    for base, alike in comparisons:
        where = f"{dataset}, IPC {base['ipc']}, {base['student']}"
        parts += [f"### Base `--tag {base['tag']}`: {where}", comparison_table(base, alike)]
    runs = {}  # a run: its cells, one for each student
    for name, cell in cells.items():
        runs.setdefault(name.removeprefix(dataset + "-").removesuffix("-" + cell["student"]), []).append(cell)
    costs = ("Seconds and most memory of each phase; of train_eval.py for one student seed.\n\n"
             f"{cost_table(runs)}\n\nMegabytes on the disk.\n\n{byte_table(runs)}")
    parts.append(folded(f"Costs on {dataset}", costs))
    lines = [f"# {name}\n" + "\n".join(commands(mine)) for name, mine in runs.items()]
    return "\n\n".join([*parts, folded(f"Commands of every run on {dataset}",
                                       "```bash\n" + "\n\n".join(lines) + "\n```")])


def page(cells):
    """The text of README.md.   cells: {name: cell}"""
    datasets = sorted({cell["dataset"] for cell in cells.values()}, key=lambda name: (
        list(DATASETS).index(name.removesuffix("-holdout")) if name.removesuffix("-holdout") in DATASETS
        else len(DATASETS), name))
    parts = [section(dataset, {name: cell for name, cell in cells.items() if cell["dataset"] == dataset})
             for dataset in datasets]
    for title, sets in (("Margins on ten classes of CIFAR-100 each", CHOOSE),
                        ("Margins on sets by which nothing was chosen", TEST)):
        found = [cell for cell in cells.values()
                 if re.fullmatch(rf"cifar100-[{sets}](-holdout)?", cell["dataset"])]
        parts += [f"## {title}\n\n{transfers(found)}"] * bool(found)
    rest = "## Numbers of the paper (arXiv:2311.17950) without a run here\n\n" + missing_table(cells.values())
    return "\n\n".join([INTRODUCTION, *parts, rest]) + "\n"


def main(argv=None):
    parser = Parser(__doc__)
    parser.prog = "tests.evidence.make_readme"
    parser.add_argument("folders", type=Path, nargs="*", metavar="runs/DATASET",
                        help="whose results become result files")
    args = parser.parse_args(argv)
    for folder in args.folders:
        results = read_results(folder)
        if not results:
            fail(f"{folder} holds no evaluation (<run>/eval/<student>.json); run train_eval.py first")
        keep(folder, results, FOLDER)
    cells = read_cells()
    (FOLDER / "README.md").write_text(page(cells))
    print(f"{FOLDER / 'README.md'}: {len(cells)} result files")


if __name__ == "__main__":
    main()
