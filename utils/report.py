"""The results of a data set as a table: synthetic images beside random real ones under the same recipe.

    python -m utils.report runs/cifar10

A row for each IPC, student and run, under soft and under hard labels. Top-1 of the last epoch in %, mean over student
seeds and standard deviation; margin = run minus random real. A tagged run is compared with the random images of its tag,
or else with the untagged ones. "published" is what the paper's Tables 4 and 5 print for G-VBSM with soft labels.
"""
import argparse
from pathlib import Path

from utils import fail
from utils.run import load_json

PUBLISHED = {   # arXiv:2311.17950, Tables 4 and 5: data set -> (IPC, student) -> top-1
    "cifar10": {(10, "convnet_w128"): "46.5 ± 0.7", (50, "convnet_w128"): "54.3 ± 0.3", (10, "resnet18"): "53.5 ± 0.6",
                (50, "resnet18"): "59.2 ± 0.4"},
    "cifar100": {(1, "convnet_w128"): "16.4 ± 0.7", (10, "convnet_w128"): "38.7 ± 0.2", (50, "convnet_w128"): "45.7 ± 0.4",
                 (1, "resnet18"): "25.9 ± 0.5", (10, "resnet18"): "59.5 ± 0.4", (50, "resnet18"): "65.0 ± 0.5"},
    "tiny": {(50, "resnet18"): "47.6 ± 0.3", (50, "resnet50"): "48.7 ± 0.2", (50, "resnet101"): "48.8 ± 0.4",
             (100, "resnet18"): "51.0 ± 0.4", (100, "resnet50"): "52.1 ± 0.3", (100, "resnet101"): "52.3 ± 0.1"},
    "imagenet": {(10, "resnet18"): "31.4 ± 0.5", (10, "resnet50"): "35.4 ± 0.8", (10, "resnet101"): "38.2 ± 0.4",
                 (50, "resnet18"): "51.8 ± 0.4", (50, "resnet50"): "58.7 ± 0.4", (50, "resnet101"): "61.0 ± 0.4",
                 (100, "resnet18"): "55.7 ± 0.4", (100, "resnet50"): "62.2 ± 0.3", (100, "resnet101"): "63.7 ± 0.2"},
}
HEADER = ("ipc", "student", "labels", "run", "top-1", "random real", "margin", "published")


def read_results(folder):
    """{(ipc, student, labels, method, tag): result} of all evaluations below runs/<dataset>."""
    results = {}
    for path in sorted(folder.glob("*/eval/*.json")):
        result = load_json(path, remedy := "remove it and run train_eval.py again")
        try:
            results[tuple(result[key] for key in ("ipc", "student", "labels", "method", "tag"))] = result
        except (KeyError, TypeError):
            fail(f"{path} is no result of train_eval.py; {remedy}")
    return results


def rows(dataset, results):
    """The cells of the table, a row for each run but the random ones, which are its comparison."""
    runs = {key[:2] + key[3:] for key in results}                                      # ipc, student, method, tag
    runs = {(ipc, student, "gvbsm" if method == "random" else method, tag) for ipc, student, method, tag in runs}
    for ipc, student, method, tag in sorted(runs, key=lambda run: [run[0], run[1], run[2], run[3] or ""]):
        for labels in ("stored", "online", "hard"):
            ours = results.get((ipc, student, labels, method, tag))
            real = results.get((ipc, student, labels, "random", tag)) or results.get((ipc, student, labels, "random", None))
            if labels == "online" and not ours and not real:
                continue
            yield (str(ipc), student, {"stored": "soft", "online": "soft, online", "hard": "hard"}[labels],
                   method + (f"-{tag}" if tag else ""), accuracy(ours), accuracy(real),
                   f"{ours['top1'] - real['top1']:+.1f}" if ours and real else "",
                   PUBLISHED.get(dataset, {}).get((ipc, student), "") if labels == "stored" and method == "gvbsm" else "")


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
    parser = argparse.ArgumentParser(prog="utils.report", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="runs/DATASET", help="where the phases wrote")
    folder = parser.parse_args(argv).folder
    results = read_results(folder)
    if not results:
        fail(f"{folder} holds no evaluation (<run>/eval/<student>.json); run train_eval.py first")
    print(table(HEADER, list(rows(folder.resolve().name, results))))


if __name__ == "__main__":
    main()
