"""The results of a data set as a table: every method beside random real images under the same recipe.

    python -m utils.report runs/cifar10

A row for each IPC, student, kind of labels and run. Top-1 of the last epoch in %, mean over student seeds and standard
deviation; margin = run minus random real. A run is compared with random images that had the same labels and training (the
same teachers and settings, whatever its tag), of its tag where there are several. "published" is what papers print for the
method, under their own recipes.
"""
from pathlib import Path

from utils import fail
from utils.presets import METHODS, Parser
from utils.run import load_json

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
    # arXiv:2410.07579; the 55.2 that others cite for Tiny-ImageNet at IPC 50 contradicts its abstract
    ("teddy", "imagenet", R18, "stored"): {10: "34.1 ± 0.1", 50: "52.5 ± 0.1", 100: "56.5 ± 0.0"},
    ("teddy", "imagenet", R50, "stored"): {5: "21.0", 10: "37.2", 50: "58.5"},
}
IDENTITY = "ipc", "student", "labels", "method", "tag"
HEADER = ("ipc", "student", "labels", "run", "top-1", "random real", "margin", "published")
LABELS = {"stored": "soft", "online": "soft, online", "hard": "hard"}
RECIPE = ("image_size", "precision", "mix", "epochs", "batch_size", "whole_up_to", "optimizer", "lr", "momentum", "weight_decay",
          "schedule")
SOFT = ("loss", "gamma", "temperature", "logit_norm", "seed")                  # of soft labels alone


def read_results(folder):
    """{(ipc, student, labels, method, tag): result} of all evaluations below runs/<dataset>."""
    results = {}
    for path in sorted(folder.glob("*/eval/*.json")):
        remedy = "remove it and run train_eval.py again"
        result = load_json(path, remedy, (*IDENTITY, "top1", "top1_std", "seeds", "args", "upstream", "made_from"))
        if result["method"] not in METHODS or result["labels"] not in LABELS or not isinstance(result["ipc"], int):
            fail(f"{path} is no result of train_eval.py; {remedy}")
        results[tuple(result[key] for key in IDENTITY)] = result
    return results


def recipe(result):
    """What decides an accuracy but for the images: the settings of labels and training, and the teachers' weights."""
    keys = RECIPE + SOFT * (result["labels"] != "hard")
    return ([result["args"].get(key) for key in keys], [result["upstream"].get("relabel", {}).get(key) for key in keys],
            result["made_from"].get("weights"))


def random_beside(result, results):
    """The result of random images under the same recipe, of the same tag if there is one; or None."""
    ipc, student, labels, tag = (result[key] for key in ("ipc", "student", "labels", "tag"))
    beside = {key[4]: other for key, other in results.items()
              if key[:4] == (ipc, student, labels, "random") and recipe(other) == recipe(result)}
    return beside.get(tag, next(iter(beside.values()), None))


def rows(dataset, results):
    """The cells of the table: a row for each run and kind of labels. Random ones are the comparison, and stand in a row
    where there is none to compare."""
    runs = {(ipc, student, method, tag) for ipc, student, _, method, tag in results if method != "random"}
    compared = {run[:2] for run in runs}
    runs |= {(ipc, student, "gvbsm", tag) for ipc, student, _, _, tag in results if (ipc, student) not in compared}
    methods = list(METHODS)
    for ipc, student in sorted({run[:2] for run in runs}):
        mine = sorted((run for run in runs if run[:2] == (ipc, student)), key=lambda run: (methods.index(run[2]), run[3] or ""))
        for labels in LABELS:
            if labels == "online" and not any(key[:3] == (ipc, student, labels) for key in results):
                continue
            for *_, method, tag in mine:
                ours = results.get((ipc, student, labels, method, tag))
                real = random_beside(ours, results) if ours else results.get((ipc, student, labels, "random", tag)) or results.get(
                    (ipc, student, labels, "random", None))
                yield (str(ipc), student, LABELS[labels], method + (f"-{tag}" if tag else ""), accuracy(ours), accuracy(real),
                       f"{ours['top1'] - real['top1']:+.1f}" if ours and real else "",
                       PUBLISHED.get((method, dataset, student, labels), {}).get(ipc, ""))


def accuracy(result):
    if result is None:
        return "not run"
    return f"{result['top1']:.1f}" + (f" ± {result['top1_std']:.1f}" if len(result["seeds"]) > 1 else "")


def table(header, lines):
    """A Markdown table with aligned columns."""
    widths = [max(map(len, column)) for column in zip(header, *lines)]
    lines = [header, ["-" * width for width in widths], *lines]
    return "\n".join("| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths)) + " |" for line in lines)


def main(argv=None):
    parser = Parser(__doc__)
    parser.prog = "utils.report"
    parser.add_argument("folder", type=Path, metavar="runs/DATASET", help="where the phases wrote")
    folder = parser.parse_args(argv).folder
    results = read_results(folder)
    if not results:
        fail(f"{folder} holds no evaluation (<run>/eval/<student>.json); run train_eval.py first")
    print(table(HEADER, list(rows(folder.resolve().name, results))))


if __name__ == "__main__":
    main()
