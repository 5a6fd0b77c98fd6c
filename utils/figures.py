"""Figures of runs, as PNG files.   Needs matplotlib, tsne also scikit-learn.

    python -m utils.figures similarity runs/imagenet/gvbsm-ipc10 runs/imagenet/sre2l-ipc10
    python -m utils.figures tsne runs/imagenet/gvbsm-ipc10 runs/imagenet/sre2l-ipc10 --backbone resnet18
    python -m utils.figures statistics runs/cifar100/teachers/supervised
    python -m utils.figures channels runs/cifar10/teachers/scdd runs/cifar10/teachers/supervised
    python -m utils.figures images runs/cifar10/random-ipc10 runs/cifar10/gvbsm-ipc10
    python -m utils.figures losses runs/cifar10/gvbsm-ipc10
    python -m utils.figures ipc runs/cifar10
    python -m utils.figures continual runs/cifar10/random-ipc10 runs/cifar10/gvbsm-ipc10

`python -m utils.figures <figure> --help` lists the flags of one.
"""
import argparse
import io
from collections import defaultdict
from collections.abc import Callable, Iterator
from importlib import import_module
from itertools import cycle
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from utils import fail
from utils.augment import normalize
from utils.checkpoint import load_torch
from utils.data import (DATASETS, describe, folder_name, list_folder, load_split, opened, read_images,
                        unreadable_fails)
from utils.device import pick_device
from utils.files import load_json
from utils.losses import pooled_rows
from utils.parser import Parser, number, plain_name
from utils.provenance import check_classes
from utils.recorder import logged
from utils.report import BASES, LABELS, read_results, run_name
from utils.run import script
from utils.teachers import load_teachers

DPI = 150
STYLE = {"font.size": 9, "axes.titlesize": 10, "figure.titlesize": 11, "axes.spines.top": False,
         "axes.spines.right": False, "axes.grid": True, "grid.color": "0.9", "axes.axisbelow": True,
         "legend.frameon": False, "figure.dpi": DPI, "text.parse_math": False}     # names may hold a $
MANY = 30       # classes: above, bars and names of classes would not be read
DASHES = dict(zip(LABELS, ("-", ":", "--")))
MARKERS = "osD^vP*X<>"
TERMS = {"ce": "cross-entropy", "bn": "BatchNorm statistics, L'_BN",
         "conv": "convolution statistics, L'_Conv", "dd": "data densification, L_DD",
         "gradient": "gradient at the pixels, without L_DD", "dm": "distribution matching"}


def mean_similarity(rows: Tensor) -> float:
    """Mean cosine similarity over all pairs of different rows [n, D], n > 1; with a row of zeros it is 0."""
    unit = F.normalize(rows.double(), dim=1)
    return ((unit.sum(0).square().sum() - unit.square().sum()) / (len(unit) * (len(unit) - 1))).item()


def loss_curves(entries: list[dict]) -> dict[tuple[str, str], np.ndarray]:
    """Entries of log.jsonl.   -> {(term, backbone): [n, 2] of iteration and mean over image batches}, without
    those that are always 0; backbone "" where none acts, or several together (Teddy)"""
    sums = defaultdict(lambda: defaultdict(lambda: np.zeros(2)))
    for entry in entries:
        weight = len(entry["batches"])                               # a value is the mean over these
        for term in entry.keys() & TERMS.keys():
            backbone = "" if term in ("dd", "dm") or "+" in entry["backbone"] else entry["backbone"]
            sums[term, backbone][entry["iteration"]] += weight * entry[term], weight
    curves = {key: np.array([(t, total / weight) for t, (total, weight) in sorted(sums[key].items())])
              for key in sorted(sums)}
    return {key: curve for key, curve in curves.items() if curve[:, 1].any()}


def ipc_curves(results: dict[tuple, dict]) -> dict[tuple[str, str, str], np.ndarray]:
    """Of `read_results`, but for tags of BASES.   -> {(student, labels, run without its IPC): [n, 3] of IPC,
    top-1 in %, deviation over seeds (nan of one seed)}"""
    curves = defaultdict(list)
    for (ipc, student, labels, method, tag), result in results.items():
        spread = result["top1_std"] if len(result["seeds"]) > 1 else np.nan
        if (tag or "").partition("-")[0] not in BASES:
            curves[student, labels, run_name(method, tag)].append((ipc, result["top1"], spread))
    order = sorted(curves, key=lambda key: (key[0], list(LABELS).index(key[1]), key[2]))
    return {key: np.array(sorted(curves[key]), float) for key in order}


def tile(groups: list[Tensor], gap: int) -> tuple[np.ndarray, list[float], list[float]]:
    """Groups of images, uint8 [rows, columns, 3, S, S] each, side by side on white, `gap` pixels apart,
    four times that between groups.   -> uint8 [H, W, 3], the centre of each group (x) and of each row (y)"""
    parts, centres, left, step = [], [], 0, groups[0].shape[-1] + gap
    for group in groups:
        part = F.pad(group, (0, gap, 0, gap), value=255).permute(0, 3, 1, 4, 2).flatten(2, 3).flatten(0, 1)
        centres.append(left + (part.shape[1] - gap - 1) / 2)
        left += part.shape[1] + 3 * gap
        parts.append(F.pad(part, (0, 0, 0, 3 * gap), value=255))
    canvas = torch.cat(parts, 1)[:-gap, :-4 * gap].numpy()
    return canvas, centres, [row * step + (step - gap - 1) / 2 for row in range(len(groups[0]))]


def embed(rows: Tensor, seed: int) -> np.ndarray:
    """t-SNE of rows [N, D].   -> [N, 2]"""
    from sklearn.manifold import TSNE
    tsne = TSNE(perplexity=min(30, (len(rows) - 1) / 3), init="pca", random_state=seed)
    return tsne.fit_transform(np.asarray(rows))


def titles(args: argparse.Namespace) -> list[str]:
    """Names of the runs: of their folders, with what lies above where two are alike."""
    names = [folder.name for folder in args.folders]
    return names if len(set(names)) == len(names) else list(map(str, args.folders))


def read_runs(folders: list[Path]) -> dict:
    """The first run's RESULT of recover.py; all runs must be of its classes, and hold images of these."""
    remedy, first = "name a folder that recover.py has finished, such as runs/cifar10/gvbsm-ipc10", None
    for folder in folders:
        result = load_json(folder / "result.json", remedy, ("phase", "args", "classes"))
        first = first or result
        if result["phase"] != "recover":
            fail(f"{folder} is of {result['phase']}.py, no run; {remedy}")
        check_classes(result["classes"], first["classes"], folder, folders[0])
        names = sorted(map(folder_name, result["classes"]))
        check_classes(list_folder(folder / "images")[1], names, folder / "images", folder / "result.json")
    return first


def data_of(result: dict, remedy: str) -> str:
    """The --dataset of a run, which may be called from elsewhere now, but must still be there."""
    name = result["args"]["dataset"]
    path = name if name in DATASETS else result.get("data_set", {}).get("path", name)
    if name not in DATASETS and not Path(path).is_dir():
        fail(f"{path}, the data set that the run is of, is not there; move it back, or {remedy}")
    return path


def class_images(run: Path, count: int | None, size: int | None, workers: int) -> Iterator[tuple]:
    """Yields name, uint8 images [n, 3, S, S] of a run's first `count` classes.   size None: as they are"""
    labels, classes, files = list_folder(run / "images")
    files = np.array([run / "images" / file for file in files])
    with unreadable_fails(), opened(files[0]) as image:
        size = size or image.width
    for label, name in enumerate(classes[:count]):
        yield name, read_images(list(files[labels.numpy() == label]), size, size, workers)


def read_teacher(args: argparse.Namespace, asked: dict) -> tuple[Callable, int]:
    """--backbone of --teachers, by default those of a run with the arguments `asked`.
    -> function(uint8 images [N, 3, S, S]) -> logits [N, classes], its image size S"""
    args.backbone, args.teachers = args.backbone or asked["backbones"][0], args.teachers or asked["teachers"]
    device, folder = pick_device(args.device), args.folders[0].parent / "teachers" / args.teachers
    given = {"run_dir": str(args.folders[0].parents[1])}
    given |= {key: asked.get(key) for key in ("dataset", "ipc", "method", "preset", "holdout", "image_size")}
    given |= {"imbalance": asked["imbalance"]} if asked.get("imbalance", 1) > 1 else {}
    wanted = argparse.Namespace(backbones=[args.backbone], recipe=None, teachers=args.teachers,
                                precision="fp32", given=given)
    models, _, data = load_teachers(wanted, folder, device)

    @torch.inference_mode()
    def logits(images):
        return torch.cat([models[args.backbone](normalize(batch.to(device), data["mean"], data["std"])).cpu()
                          for batch in images.split(128)])
    return logits, data["image_size"]


def read_log(run: Path) -> list[dict]:
    """The entries of a run's log.jsonl, as far as it is written."""
    if not (entries := logged(run)):
        fail(f"{run}/log.jsonl has no losses; name a run that optimises images, not one that selects them")
    return list(entries.values())


def similarities(args: argparse.Namespace) -> tuple[list[str], dict[str, np.ndarray]]:
    """-> class names, {run: [classes] of `mean_similarity`}"""
    result, found = read_runs(args.folders), {}
    if args.backbone:
        rows_of, size = read_teacher(args, result["args"])
    else:
        name, size = data_of(result, "use --backbone"), None
        data = DATASETS.get(name) or describe(name, args.data_dir, result["args"].get("image_size"),
                                              args.workers)

        def rows_of(images):
            return pooled_rows(normalize(images, data["mean"], data["std"]))
    for run, folder in zip(titles(args), args.folders):
        values = {}
        for name, images in class_images(folder, None, size, args.workers):
            if len(images) < 2:
                fail(f"{folder} has one image of class {name}, so no pair; name a run of a larger --ipc")
            values[name] = mean_similarity(rows_of(images))
        found[run] = np.array(list(values.values()))
    return list(values), found


def draw_similarity(args: argparse.Namespace, fig) -> None:
    """Mean cosine similarity over the pairs of images of a class, for each class.   arXiv:2311.17950, Fig. 3.

    The paper leaves open of which vectors: here those of Eq. 4, pixels in the networks' units pooled to
    32x32, or with --backbone the logits of that teacher."""
    names, found = similarities(args)
    few, width, ticks = len(names) <= MANY, 0.8 / len(found), np.arange(len(names) + 1.0)
    ticks[-1] += 0.6
    fig.set_size_inches(max(5, 1 + 0.2 * (len(names) + 2) * (1 + len(found))) if few else 8, 3.6)
    axes = fig.subplots()
    for i, (run, values) in enumerate(found.items()):
        label = f"{run}, mean {values.mean():.2f}"
        if few:
            axes.bar(ticks + (i + 0.5) * width - 0.4, [*values, values.mean()], width * 0.95, label=label)
        else:
            axes.plot(np.sort(values)[::-1], label=label)
    if few:
        axes.set_xticks(ticks, [*names, "mean"], rotation=45, ha="right", rotation_mode="anchor")
        axes.grid(visible=False, axis="x")
        axes.margins(x=0.02)
    else:
        axes.set_xlabel("class, in the order of its similarity in each run")
    axes.axhline(0, color="black", linewidth=0.8)
    what = f"{args.backbone}'s logits" if args.backbone else "pixels pooled to 32×32 at most"
    axes.set(ylabel="cosine similarity, mean over pairs", title=f"Similarity within a class, of {what}")
    shared_legend(fig, min(4, len(found)))


def tsne_points(args: argparse.Namespace) -> tuple[list[str], list[tuple]]:
    """-> class names, [(run, labels [n], points [n, 2])]; the images of all runs are embedded together"""
    logits_of, size = read_teacher(args, read_runs(args.folders)["args"])
    labels, logits = [], []
    for folder in args.folders:
        names, images = zip(*class_images(folder, args.classes, size, args.workers))
        labels.append(np.repeat(np.arange(len(names)), list(map(len, images))))
        logits.append(logits_of(torch.cat(images)))
    ends = np.cumsum(list(map(len, labels)))
    if ends[-1] < 4:
        fail(f"--classes {args.classes}: fewer than four images; use more classes or a run of a larger --ipc")
    points = np.split(embed(torch.cat(logits), args.seed), ends[:-1])
    return list(names), list(zip(titles(args), labels, points))


def draw_tsne(args: argparse.Namespace, fig) -> None:
    """t-SNE of the logits of distilled images, a panel for each run.   arXiv:2311.17950, Fig. 8

    The images of all runs are embedded together, so that places can be compared between panels."""
    from matplotlib import colormaps
    names, parts = tsne_points(args)
    fig.set_size_inches(4 * len(parts) + 1.3, 4)
    grid = fig.subplots(1, len(parts), sharex=True, sharey=True, squeeze=False)[0]
    few = "tab10" if len(names) <= 10 else "tab20" if len(names) <= 20 else None
    colours = colormaps[few].colors if few else colormaps["hsv"](np.arange(len(names)) / len(names))
    for axes, (run, labels, points) in zip(grid, parts):
        for i, name in enumerate(names):
            axes.scatter(*points[labels == i].T, s=22, color=colours[i], edgecolors="white", linewidths=0.3,
                         label=name)
        axes.set(title=f"{run}, {len(labels)} images", xlabel="first t-SNE coordinate (no unit)")
    grid[0].set_ylabel("second t-SNE coordinate (no unit)")
    fig.suptitle(f"Logits of {args.backbone}")
    if len(names) <= MANY:
        shared_legend(fig, 1 + len(names) // 16, loc="outside right center", title="class")


def running_statistics(folder: Path, name: str) -> list[tuple[Tensor, Tensor]]:
    """-> [(running mean [C], running variance [C])] of the BatchNorms of a squeezed backbone"""
    remedy = "run squeeze.py, or name other --backbones"
    weights = load_torch(folder / f"{name}.pt", remedy, ("weights",))["weights"]
    means, variances = ([value for key, value in weights.items() if key.endswith(f"running_{what}")]
                        for what in ("mean", "var"))
    return list(zip(means, variances))


def layer_summary(pairs: list) -> np.ndarray:
    """(Channel means [C], variances [C]) of each layer.   -> [layers, 4]: sigmoid of mean and variance
    (biased, over channels) of the means, then of the variances"""
    moments = [[part.double().mean(), part.double().var(correction=0)] for pair in pairs for part in pair]
    return torch.tensor(moments).reshape(-1, 4).sigmoid().numpy()


def teacher_statistics(args: argparse.Namespace) -> dict[str, dict[str, np.ndarray]]:
    """-> {backbone: {"convolutions", "BatchNorms", if it has some: [layers, 4] of `layer_summary`}}"""
    folder, found = args.folders[0], {}
    for name in args.backbones or sorted(path.name[:-9] for path in folder.glob("*.stats.pt")):
        remedy = "run collect_stats.py, or name other --backbones"
        stored = load_torch(folder / f"{name}.stats.pt", remedy, ("statistics",))["statistics"].values()
        kinds = {"convolutions": [values[:2] for values in stored],
                 "BatchNorms": running_statistics(folder, name)}
        found[name] = {kind: layer_summary(pairs) for kind, pairs in kinds.items() if pairs}
    if not found:
        fail(f"{folder} holds no <backbone>.stats.pt; name a folder that collect_stats.py wrote into")
    return found


def draw_statistics(args: argparse.Namespace, fig) -> None:
    """Statistics of the training set at every convolution and BatchNorm.   arXiv:2311.17950, Fig. 9

    Mean and variance over channels of a layer's channel means and channel variances, after a sigmoid, as in
    the paper; convolutions and BatchNorms are numbered each on their own."""
    found = teacher_statistics(args)
    fig.set_size_inches(9, 0.9 + 1.9 * len(found))
    grid = fig.subplots(len(found), 2, sharey=True, squeeze=False)
    for row, (name, kinds) in zip(grid, found.items()):
        for axes, column, what in zip(row, (0, 2), ("channel means", "channel variances")):
            for colour, (kind, values) in zip(("C0", "C1"), kinds.items()):
                for extra, dash, over in (0, "-", "mean"), (1, "--", "variance"):
                    axes.plot(range(1, len(values) + 1), values[:, column + extra], dash, marker="o",
                              markersize=3, color=colour, label=f"{kind}, {over} over channels")
            axes.set(title=f"{name}: {what}", ylim=(-0.03, 1.03))
            axes.xaxis.get_major_locator().set_params(integer=True)
        row[0].set_ylabel("sigmoid (0.5: value 0)")
    for axes in grid[-1]:
        axes.set_xlabel("n-th convolution, n-th BatchNorm of the network")
    shared_legend(fig, 2)


def channel_statistics(args: argparse.Namespace) -> dict[str, tuple[Tensor, Tensor]]:
    """-> {backbone and its teachers: running means [C], variances [C]} of one BatchNorm, where it exists"""
    found = {}
    for teachers, folder in zip(titles(args), args.folders):
        there = sorted(path.stem for path in folder.glob("*.pt")
                       if not path.stem.endswith(".stats") and path.stem != "scores")
        for name in args.backbones or there:
            pairs = running_statistics(folder, name)
            if len(pairs) >= args.batchnorm:
                found[f"{name}, {teachers}"] = pairs[args.batchnorm - 1]
    if not found:
        fail(f"{' '.join(map(str, args.folders))}: no backbone has {args.batchnorm} BatchNorms; name another "
             "folder that squeeze.py wrote into, or --batchnorm")
    return found


def draw_channels(args: argparse.Namespace, fig) -> None:
    """Mean and variance that a BatchNorm holds for each channel, by backbone.   arXiv:2404.07976, Fig. 4

    The paper shows the first BatchNorm of the first residual block, the second of a ResNet, and compares how
    the values vary over channels (in the legends) between backbones with and without labels."""
    found = channel_statistics(args)
    fig.set_size_inches(10, 3.6 + 0.18 * len(found))
    for part, (axes, what) in enumerate(zip(fig.subplots(1, 2), ("mean", "variance"))):
        for name, pair in found.items():
            spread = pair[part].double().var(correction=0).item()
            axes.plot(pair[part].numpy(), linewidth=1, label=f"{name}: {spread:.3g}")
        axes.set(title=f"running {what} of BatchNorm {args.batchnorm}", xlabel="channel",
                 ylabel=f"{what} of the inputs")
        axes.legend(title="variance over channels", loc="upper center", bbox_to_anchor=(0.5, -0.15))


def draw_losses(args: argparse.Namespace, fig) -> None:
    """The weighted terms of recover.py's loss and the norm of their gradient, mean over image batches, by the
    backbone that an iteration has drawn (Eq. 7). Without terms that are always 0."""
    found = {run: loss_curves(read_log(folder)) for run, folder in zip(titles(args), args.folders)}
    keys = {key for curves in found.values() for key in curves}
    terms = [term for term in TERMS if term in {term for term, _ in keys}]
    backbones = sorted({backbone for _, backbone in keys})
    rows = -(-len(terms) // 2)
    fig.set_size_inches(9 if len(terms) > 1 else 5, 0.9 + 2.5 * rows)
    grid = fig.subplots(rows, min(2, len(terms)), sharex=True, squeeze=False).flatten()
    for axes, term in zip(grid, terms):
        for r, (run, curves) in enumerate(found.items()):
            for b, name in enumerate(backbones):
                if (term, name) in curves:
                    axes.plot(*curves[term, name].T, color=f"C{r if len(found) > 1 else b}", markersize=4,
                              marker=MARKERS[b % len(MARKERS)] if name else "", linewidth=1.2,
                              label=f"{run}, " * (len(found) > 1) + (name or "all backbones"))
        scale_values(axes)
        axes.tick_params(labelbottom=True)  # sharing an axis hides them in upper panels
        what = "norm" if term == "gradient" else "weighted loss"
        axes.set(title=TERMS[term], xlabel="iteration", ylabel=what)
    for axes in grid[len(terms):]:
        axes.axis("off")
    shared_legend(fig, 3)


def shared_legend(fig, columns: int, loc: str = "outside lower center", **how) -> None:
    """Beside the panels, what stands in any of them once."""
    entries = {label: line for axes in fig.axes for line, label in zip(*axes.get_legend_handles_labels())}
    fig.legend(entries.values(), entries.keys(), loc=loc, ncols=columns, **how)


def scale_values(axes) -> None:
    """A logarithmic axis for values that span more than a factor of ten, linear below a millionth of the
    largest, which densification soon reaches. Ticks are plain numbers."""
    from matplotlib.ticker import SymmetricalLogLocator
    values = np.concatenate([line.get_ydata() for line in axes.lines])
    if values.min() < 0 or values.max() <= 10 * values.min():
        return
    # a threshold at a power of ten: its tick would otherwise stand on that of 0
    linear = 10 ** np.ceil(np.log10(values.max() * 1e-6)) * 1.001
    axes.set_yscale("symlog", linthresh=linear)
    if values.max() < 1000 * values.min():
        axes.yaxis.set_major_locator(SymmetricalLogLocator(base=10, linthresh=linear, subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")


def draw_ipc(args: argparse.Namespace, fig) -> None:
    """Top-1 of the last epoch against images per class, a panel for each student; bars: standard deviation
    over seeds, where there are several. Without runs tagged as comparisons (ablation, family, search)."""
    curves = ipc_curves(read_results(args.folders[0]))
    if not curves:
        fail(f"{args.folders[0]} holds no <run>/eval/<student>.json, but for comparisons (tags that begin "
             f"with {', '.join(BASES)}) and other protocols; name runs/DATASET, or run train_eval.py")
    students, _, runs = (list(dict.fromkeys(names)) for names in zip(*curves))
    ipcs = sorted({int(ipc) for points in curves.values() for ipc in points[:, 0]})
    fig.set_size_inches(1 + 3.8 * len(students), 3.8 + 0.06 * len(curves))
    panels = dict(zip(students, fig.subplots(1, len(students), sharey=True, squeeze=False)[0]))
    for (student, labels, run), points in curves.items():
        points[:, 0] *= 1.04 ** (runs.index(run) - (len(runs) - 1) / 2)      # bars do not cover each other
        colour = "black" if run == "random" else f"C{runs.index(run)}"
        panels[student].plot(*points[:, :2].T, marker="o", markersize=4, color=colour,
                             linestyle=DASHES[labels], markerfacecolor="white" if labels == "hard" else None,
                             label=f"{run}, {LABELS[labels]} labels")
        panels[student].errorbar(*points[~np.isnan(points[:, 2])].T, fmt="none", capsize=3, color=colour)
    for student, axes in panels.items():
        axes.set(title=student, xlabel="images per class (IPC)", xscale="log", ylim=(0, None),
                 xlim=(ipcs[0] / 1.6, ipcs[-1] * 1.6))
        axes.set_xticks(ipcs, ipcs)
        axes.set_xticks([], minor=True)
    fig.axes[0].set_ylabel("top-1 of the last epoch, %")
    fig.suptitle(args.folders[0].resolve().name)
    shared_legend(fig, min(3, 1 + len(students)))


def continual_curves(args: argparse.Namespace) -> dict[str, np.ndarray]:
    """-> {"run, student, labels, steps": [steps, 3] of classes so far, top-1 in %, deviation over orders and
    seeds}"""
    curves = {}
    for run, folder in zip(titles(args), args.folders):
        for path in sorted(folder.glob("eval/*-continual*.json")):
            result = load_json(path, "run train_eval.py --overwrite", ("curve", "curve_std", "classes"))
            arrived = np.array_split(result["classes"], len(result["curve"]))
            label = f"{run}, {result['student']}, {LABELS[result['labels']]} labels, {len(arrived)} steps"
            curves[label] = np.stack([np.cumsum(list(map(len, arrived))), result["curve"],
                                      result["curve_std"]], axis=1)
    if not curves:
        fail(f"{args.folders[0]} holds no eval/<student>-continual<steps>.json; run train_eval.py --protocol "
             "continual")
    return curves


def draw_continual(args: argparse.Namespace, fig) -> None:
    """Class-incremental learning: top-1 on the classes so far, bars: standard deviation over orders and
    seeds.   arXiv:2311.17950, Fig. 10."""
    axes, curves = fig.subplots(), continual_curves(args)
    for marker, (label, points) in zip(cycle(MARKERS), curves.items()):
        points = points if points[:, 2].any() else points[:, :2]     # one order, one seed: no bars
        axes.errorbar(*points.T, marker=marker, markersize=5, capsize=3, label=label)
    axes.set(xlabel="classes so far", ylabel="top-1 of the last epoch, %")
    axes.set_xticks(sorted({int(seen) for points in curves.values() for seen in points[:, 0]}))
    shared_legend(fig, 1)


def image_groups(args: argparse.Namespace) -> tuple[list[str], dict[str, Tensor]]:
    """-> class names, {source: uint8 [classes, columns, 3, S, S]}"""
    result, groups, size = read_runs(args.folders), {}, None
    names = args.names or titles(args)
    if args.real and "real" in names:
        fail("--names real: that is the name of the training images; choose another, or --no-real")
    for run, folder in zip(names, args.folders):
        found = dict(class_images(folder, args.classes, size, args.workers))
        columns = min([args.columns, *map(len, found.values())])
        groups[run] = torch.stack([images[:columns] for images in found.values()])
        size = groups[run].shape[-1]
    if args.real:
        name = data_of(result, "use --no-real")
        split = load_split(name, args.data_dir, "train", size, args.workers,
                           holdout=result["args"].get("holdout", False))
        check_classes(split.classes, result["classes"], f"the data set {name}", args.folders[0])
        order = [folder_name(name) for name in split.classes]
        rows = [(split.labels == order.index(name)).nonzero().flatten()[:args.columns] for name in found]
        columns = min(map(len, rows))
        groups = {"real": torch.stack([split.read(row[:columns]) for row in rows])} | groups
    return list(found), groups


def resized(group: Tensor) -> Tensor:
    """uint8 images [rows, columns, 3, S, S] for the eye, `draw_images`."""
    side = group.shape[-1]
    shown = 96 if side > 96 else side * max(1, 64 // side)           # a whole number of times as large
    images = F.interpolate(group.flatten(0, 1).float(), (shown, shown), mode="area").round().byte()
    return images.unflatten(0, group.shape[:2])


def draw_images(args: argparse.Namespace, fig) -> None:
    """Images side by side, small ones enlarged, large ones averaged down to 96 pixels: a row for each class,
    a group for each source, training images ("real") first.   arXiv:2311.17950, Figs. 7 and 11-14"""
    names, groups = image_groups(args)
    canvas, centres, rows = tile([resized(group) for group in groups.values()], gap=4)
    fig.set_size_inches(canvas.shape[1] / DPI, canvas.shape[0] / DPI)
    fig.set_layout_engine("none")                                    # the axes fill it, labels stand outside
    axes = fig.add_axes((0, 0, 1, 1))
    axes.imshow(canvas, interpolation="nearest")
    narrow = any(len(name) * 10 > canvas.shape[1] / len(groups) for name in groups) and len(groups) > 1
    axes.set_xticks(centres, groups, rotation=30 * narrow, ha="left" if narrow else "center")
    axes.set_yticks(rows, names)
    axes.xaxis.tick_top()
    axes.tick_params(length=0, labelsize=9)
    axes.grid(visible=False)
    axes.spines[:].set_visible(False)


FIGURES = {"similarity": draw_similarity, "tsne": draw_tsne, "statistics": draw_statistics,
           "channels": draw_channels, "images": draw_images, "losses": draw_losses, "ipc": draw_ipc,
           "continual": draw_continual}
TEACHERS, RUN = "runs/DATASET/teachers/TEACHERS", "runs/DATASET/RUN"
WHERE = {"statistics": TEACHERS, "channels": TEACHERS, "ipc": "runs/DATASET"}        # what to name; else RUN


def get_parser(name):
    """Of one figure."""
    parser = Parser(FIGURES[name].__doc__, f"utils.figures {name}")

    def flag(names, word, **how):
        if name in names.split():
            parser.add_argument(word, **how)

    parser.add_argument("folders", type=Path, nargs=1 if name in ("statistics", "ipc") else "+",
                        metavar=WHERE.get(name, RUN), help="what the phases wrote")
    parser.add_argument("--out", type=Path, metavar="FILE.png", help=f"by default runs/DATASET/{name}.png")
    default = "pixels instead" if name == "similarity" else "run's first backbone"
    flag("similarity tsne", "--backbone", metavar="NAME", help=f"whose logits; by default the {default}")
    flag("similarity tsne", "--teachers", type=plain_name, help="of --backbone; by default the first run's")
    flag("similarity tsne", "--device", default="auto", help="cpu, cuda, cuda:1; auto: cuda if any")
    flag("tsne", "--seed", type=number(int, 0, 2 ** 32 - 1), default=0, help="of t-SNE")
    flag("tsne images", "--classes", type=number(int, 1), default=10, help="how many, the first ones")
    flag("images", "--columns", type=number(int, 1), default=5, help="images of a class from each source")
    flag("images", "--real", action=argparse.BooleanOptionalAction, default=True, help="training images too")
    flag("images", "--names", nargs="+", metavar="NAME", help="above the runs, in their order")
    flag("similarity images", "--data-dir", default="data", help="where named data sets lie")
    flag("similarity tsne images", "--workers", type=number(int, 0), default=2, help="threads for reading")
    flag("statistics channels", "--backbones", nargs="+", metavar="NAME", help="by default all")
    flag("channels", "--batchnorm", type=number(int, 1), default=2, metavar="N", help="the N-th")
    return parser


def main(argv=None):
    parser = Parser(__doc__, "utils.figures")
    parser.add_argument("figure", choices=FIGURES, help="what to draw")
    parser.add_argument("words", nargs=argparse.REMAINDER, metavar="runs/... --flags",
                        help="folders and flags of that figure")
    asked = parser.parse_args(argv)
    name, where = asked.figure, WHERE.get(asked.figure, RUN)
    args = get_parser(name).parse_args(asked.words)
    for folder in args.folders:
        if not folder.is_dir():
            fail(f"{folder}: there is no such folder; name what the phases wrote, {where}")
        if args.folders.count(folder) > 1:
            fail(f"{folder} is named twice; name it once")
    names = getattr(args, "names", None)
    if names and len(set(names)) != len(args.folders):
        fail(f"--names {' '.join(names)}: name each of the {len(args.folders)} runs once")
    if args.out and args.out.suffix.lower() != ".png":
        fail(f"--out {args.out} is no PNG; name a file that ends in .png")
    try:
        import_module("matplotlib")
        import_module("sklearn" if name == "tsne" else "matplotlib")
    except ImportError as error:
        fail(f"utils.figures: {error}; run: pip install matplotlib scikit-learn")
    args.folders = [folder.absolute() for folder in args.folders]
    dataset = [args.folders[0], *args.folders[0].parents][:where.count("/")][-1]
    draw(FIGURES[name], args, args.out or dataset / f"{name}.png")


def draw(painter: Callable, args, path: Path) -> None:
    """Write what painter(args, an empty matplotlib figure) draws, `draw_*`, as a PNG file."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure
    buffer = io.BytesIO()
    with rc_context(STYLE):
        fig = Figure(layout="constrained")
        painter(args, fig)
        fig.savefig(buffer, format="png", bbox_inches="tight")
    picture, whole = Image.open(buffer).convert("RGB").quantize(256, dither=Image.Dither.NONE), io.BytesIO()
    picture.save(whole, "png", optimize=True)                        # 256 colours: a third of the bytes
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(whole.getvalue())
    print(path)


if __name__ == "__main__":
    script(main)
