"""Figures of runs, as PNG files.   Needs matplotlib, tsne also scikit-learn.

    python -m utils.figures similarity runs/imagenet/gvbsm-ipc10 runs/imagenet/sre2l-ipc10
    python -m utils.figures tsne runs/imagenet/gvbsm-ipc10 runs/imagenet/sre2l-ipc10 --backbone resnet18
    python -m utils.figures statistics runs/cifar100/teachers/supervised
    python -m utils.figures channels runs/cifar10/teachers/scdd runs/cifar10/teachers/supervised
    python -m utils.figures images runs/cifar10/random-ipc10 runs/cifar10/gvbsm-ipc10
    python -m utils.figures losses runs/cifar10/gvbsm-ipc10                     # of log.jsonl
    python -m utils.figures ipc runs/cifar10                                    # accuracy of all results

Figs. 3, 8, 9, 7 and 11-14 of arXiv:2311.17950 are similarity, tsne, statistics, images; Fig. 4 of
arXiv:2404.07976 is channels.
`python -m utils.figures <figure> --help` lists the flags of one. What is plotted comes from the functions
above `draw_*`, which need neither package.
"""
import argparse
import io
import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from importlib import import_module
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from utils import fail
from utils.augment import normalize
from utils.checkpoint import load_torch
from utils.data import (DATASETS, describe, folder_name, list_folder, load_split, opened, read_images,
                        unreadable_fails)
from utils.files import load_json
from utils.losses import pooled_rows
from utils.parser import Parser, number, plain_name
from utils.provenance import check_classes
from utils.report import BASES, LABELS, read_results, run_name
from utils.run import pick_device, script
from utils.teachers import load_teachers

DPI = 150
STYLE = {"font.size": 9, "axes.titlesize": 10, "figure.titlesize": 11, "axes.spines.top": False,
         "axes.spines.right": False, "axes.grid": True, "grid.color": "0.9", "axes.axisbelow": True,
         "legend.frameon": False, "figure.dpi": DPI}
MANY = 30       # classes: above, bars and names of classes would not be read
DASHES = dict(zip(LABELS, ("-", ":", "--")))
MARKERS = "osD^vP*X<>"


def mean_similarity(rows: Tensor) -> float:
    """Mean cosine similarity over all pairs of different rows [n, D], n > 1; with a row of zeros it is 0."""
    unit = F.normalize(rows.double(), dim=1)
    return ((unit.sum(0).square().sum() - unit.square().sum()) / (len(unit) * (len(unit) - 1))).item()


def layer_summary(means: Iterable[Tensor], variances: Iterable[Tensor]) -> np.ndarray:
    """Fig. 9: channel means [C] and channel variances [C], lists with an entry for each layer.
    -> [layers, 4]: sigmoid of mean and variance (biased, over channels) of means, then of variances"""
    columns = [(values.double().mean(), values.double().var(correction=0)) for pair in zip(means, variances)
               for values in pair]
    return torch.tensor(columns).reshape(-1, 4).sigmoid().numpy()


def loss_curves(entries: list[dict]) -> dict[tuple[str, str], np.ndarray]:
    """Entries of log.jsonl.   -> {(term, backbone): [n, 2] of iteration and mean over image batches}, without
    those that are always 0; backbone "" where none acts, or several together (Teddy)"""
    sums = defaultdict(lambda: defaultdict(lambda: np.zeros(2)))
    for entry in entries:
        weight = len(entry["batches"])                               # a value is the mean over these
        for term in entry.keys() - {"iteration", "batches", "backbone", "kept"}:
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
    return {key: np.array(sorted(points), float) for key, points in sorted(
        curves.items(), key=lambda item: (item[0][0], list(LABELS).index(item[0][1]), item[0][2]))}


def tile(groups: list[Tensor], gap: int = 2) -> tuple[np.ndarray, list[float], list[float]]:
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


@torch.inference_mode()
def logits_of(model: nn.Module, images: Tensor, data: dict, device: torch.device) -> Tensor:
    """Of uint8 images [N, 3, S, S].   -> [N, classes]"""
    return torch.cat([model(normalize(batch.to(device), data["mean"], data["std"])).cpu()
                      for batch in images.split(128)])


def embed(rows: Tensor, seed: int) -> np.ndarray:
    """t-SNE of rows [N, D].   -> [N, 2]"""
    from sklearn.manifold import TSNE
    tsne = TSNE(perplexity=min(30, (len(rows) - 1) / 3), init="pca", random_state=seed)
    return tsne.fit_transform(np.asarray(rows))


def titles(args: argparse.Namespace) -> list[str]:
    """Names of the runs: of their folders, with what lies above where two are alike."""
    names = [folder.name for folder in args.folders]
    return names if len(set(names)) == len(names) else list(map(str, args.folders))


def need(module: str, package: str) -> None:
    try:
        import_module(module)
    except ImportError:
        fail(f"utils.figures needs {package}, which is not installed; run: pip install {package}")


def read_runs(folders: list[Path]) -> list[dict]:
    """RESULTs of recover.py in the folders of runs, which must be of the same classes."""
    example, results = "name a folder that recover.py has finished, such as runs/cifar10/gvbsm-ipc10", []
    for folder in folders:
        if not (folder / "result.json").is_file():
            fail(f"{folder} is no run, it holds no result.json; {example}")
        result = load_json(folder / "result.json", "run recover.py --overwrite", ("phase", "args", "classes"))
        if result["phase"] != "recover":
            fail(f"{folder} is of {result['phase']}.py, no run; {example}")
        results.append(result)
        check_classes(result["classes"], results[0]["classes"], folder, folders[0])
        there, images = sorted(map(folder_name, result["classes"])), folder / "images"
        check_classes(list_folder(images)[1], there, images, folder / "result.json")
    return results


def class_images(run: Path, count: int | None, size: int | None,
                 workers: int) -> Iterator[tuple[str, Tensor]]:
    """Yields name of the class, uint8 images [n, 3, S, S] of the first `count` classes of a run,
    None: of all; size None: the first image's"""
    labels, classes, files = list_folder(run / "images")
    files = np.array([run / "images" / file for file in files])
    with unreadable_fails(), opened(files[0]) as image:
        size = size or image.width
    for label, name in enumerate(classes[:count]):
        yield name, read_images(list(files[labels.numpy() == label]), size, size, workers)


def read_teacher(args: argparse.Namespace, result: dict) -> tuple[nn.Module, dict, torch.device]:
    """--backbone of --teachers, by default those of the run.   -> model, data, device"""
    asked = result["args"]
    args.backbone, args.teachers = args.backbone or asked["backbones"][0], args.teachers or asked["teachers"]
    device, folder = pick_device(args.device), args.folders[0].parent / "teachers" / args.teachers
    given = {key: asked.get(key) for key in ("dataset", "method", "holdout")}
    wanted = argparse.Namespace(backbones=[args.backbone], recipe=None, teachers=args.teachers,
                                precision="fp32", given=given)
    models, _, data = load_teachers(wanted, folder, device)
    return models[args.backbone], data, device


def read_log(run: Path) -> list[dict]:
    """The entries of a run's log.jsonl, as far as it is written."""
    entries = []
    for path in sorted(run.glob("log*.jsonl")):
        for line in path.read_text(errors="replace").splitlines():
            with suppress(ValueError, KeyError, TypeError):  # the arguments, or what is being written
                entry = json.loads(line)
                entry["batches"], entry["iteration"]
                entries.append(entry)
    if not entries:
        fail(f"{run}/log.jsonl has no losses; name a run of recover.py that optimises images, not one that "
             "selects them")
    return entries


def similarities(args: argparse.Namespace) -> tuple[list[str], dict[str, np.ndarray]]:
    """-> class names, {run: [classes] of `mean_similarity`}"""
    asked, found, size = read_runs(args.folders)[0], {}, None
    if args.backbone:
        model, data, device = read_teacher(args, asked)
        size = data["image_size"]
    else:
        name, width = asked["args"]["dataset"], asked["args"].get("image_size")
        data = DATASETS.get(name) or describe(name, args.data_dir, width, args.workers)
    for run, folder in zip(titles(args), args.folders):
        values = {}
        for name, images in class_images(folder, None, size, args.workers):
            if len(images) < 2:
                fail(f"{folder} has one image of class {name}, so no pair; name a run of a larger --ipc")
            values[name] = mean_similarity(logits_of(model, images, data, device) if args.backbone else
                                           pooled_rows(normalize(images, data["mean"], data["std"])))
        found[run] = np.array(list(values.values()))
    return list(values), found


def draw_similarity(args: argparse.Namespace, figure: Callable) -> None:
    """Mean cosine similarity over the pairs of images of a class, for each class.   arXiv:2311.17950, Fig. 3.

    The paper does not say of which vectors: by default those of data densification (Eq. 4), pixels in the
    networks' units, pooled to 32x32; with --backbone the logits of that teacher.
    """
    names, found = similarities(args)
    few, shift, ticks = len(names) <= MANY, 0.8 / len(found), [*range(len(names)), len(names) + 0.6]
    axes = figure(max(5, 1 + 0.2 * (len(names) + 2) * (1 + len(found))) if few else 8, 3.6).subplots()
    for i, (run, values) in enumerate(found.items()):
        label = f"{run}, mean {values.mean():.2f}"
        if few:
            places = np.array(ticks) + (i + 0.5) * shift - 0.4
            axes.bar(places, [*values, values.mean()], shift * 0.95, label=label)
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
    axes.figure.legend(loc="outside lower center", ncols=min(4, len(found)))


def tsne_points(args: argparse.Namespace) -> tuple[list[str], list[tuple]]:
    """-> class names, [(run, labels [n], points [n, 2])]; the images of all runs are embedded together"""
    model, data, device = read_teacher(args, read_runs(args.folders)[0])
    labels, logits = [], []
    for folder in args.folders:
        names, images = zip(*class_images(folder, args.classes, data["image_size"], args.workers))
        labels.append(np.repeat(np.arange(len(names)), list(map(len, images))))
        logits.append(logits_of(model, torch.cat(images), data, device))
    if sum(map(len, labels)) < 4:
        fail(f"--classes {args.classes}: there are fewer than four images; use more classes or a run of a "
             "larger --ipc")
    points = np.split(embed(torch.cat(logits), args.seed), np.cumsum(list(map(len, labels)))[:-1])
    return list(names), list(zip(titles(args), labels, points))


def draw_tsne(args: argparse.Namespace, figure: Callable) -> None:
    """t-SNE of the logits of distilled images, a panel for each run.   arXiv:2311.17950, Fig. 8, "after the
    classifier layer".

    The images of all runs are embedded together, so that places can be compared between panels.
    """
    need("sklearn", "scikit-learn")
    from matplotlib import colormaps
    names, parts = tsne_points(args)
    fig = figure(4 * len(parts) + 1.3, 4)
    grid = fig.subplots(1, len(parts), sharex=True, sharey=True, squeeze=False)[0]
    wheel = colormaps["tab10" if len(names) <= 10 else "tab20" if len(names) <= 20 else "hsv"]
    for axes, (run, labels, points) in zip(grid, parts):
        for label, name in enumerate(names):
            colour = wheel(label) if len(names) <= 20 else wheel(label / len(names))
            axes.scatter(*points[labels == label].T, s=22, color=colour, edgecolors="white", linewidths=0.3,
                         label=name)
        axes.set(title=f"{run}, {len(labels)} images", xlabel="first t-SNE coordinate (no unit)")
    fig.axes[0].set_ylabel("second t-SNE coordinate (no unit)")
    fig.suptitle(f"Logits of {args.backbone}")
    if len(names) <= MANY:
        handles = fig.axes[0].get_legend_handles_labels()
        fig.legend(*handles, loc="outside right center", title="class", ncols=1 + len(names) // 16)


def running_statistics(folder: Path, name: str, remedy: str) -> list[tuple[Tensor, Tensor]]:
    """-> [(running mean [C], running variance [C])] of the BatchNorms of a squeezed backbone"""
    weights = load_torch(folder / f"{name}.pt", remedy, ("weights",))["weights"]
    return [(value, weights[key.replace("running_mean", "running_var")]) for key, value in weights.items()
            if key.endswith("running_mean")]


def teacher_statistics(args: argparse.Namespace) -> dict[str, dict[str, np.ndarray]]:
    """-> {backbone: {"convolutions", "BatchNorms": [layers, 4] of `layer_summary`}}, of kinds it has"""
    folder, found = args.folders[0], {}
    ending = ".stats.pt"
    names = args.backbones or sorted(path.name.removesuffix(ending) for path in folder.glob(f"*{ending}"))
    if not names:
        fail(f"{folder} holds no <backbone>.stats.pt; name a folder that collect_stats.py wrote into, such "
             "as runs/cifar100/teachers/supervised")
    for name in names:
        remedy = "run squeeze.py and collect_stats.py, or name other --backbones"
        stored = load_torch(folder / f"{name}.stats.pt", remedy, ("statistics",))["statistics"].values()
        pairs = {"convolutions": [vectors[:2] for vectors in stored],
                 "BatchNorms": running_statistics(folder, name, remedy)}
        found[name] = {kind: layer_summary(*zip(*vectors)) for kind, vectors in pairs.items() if vectors}
    return found


def draw_statistics(args: argparse.Namespace, figure: Callable) -> None:
    """Statistics of the training set at every convolution and BatchNorm, a row for each backbone.
    arXiv:2311.17950, Fig. 9.

    Of a layer's channel means and channel variances only their mean and variance over channels are shown,
    after a sigmoid, as the paper does; convolutions and BatchNorms are numbered each on their own.
    """
    found = teacher_statistics(args)
    fig = figure(9, 0.9 + 1.9 * len(found))
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
    for folder in args.folders:
        for name in args.backbones or sorted(path.stem for path in folder.glob("*.pt")
                                             if not path.stem.endswith(".stats")):
            pairs = running_statistics(folder, name, "run squeeze.py, or name other --backbones")
            if len(pairs) >= args.batchnorm:
                found[f"{name}, {folder.name}"] = pairs[args.batchnorm - 1]
    if not found:
        fail(f"{folder} holds no backbone with {args.batchnorm} BatchNorms; name a folder that squeeze.py "
             "wrote into, or another --batchnorm")
    return found


def draw_channels(args: argparse.Namespace, figure: Callable) -> None:
    """Mean and variance that a BatchNorm holds for each channel, a curve for each backbone.
    arXiv:2404.07976, Fig. 4.

    The paper shows the first BatchNorm of the first residual block: the second of a ResNet. Legends tell how
    the values vary over channels, which the paper compares between backbones with and without labels.
    """
    found = channel_statistics(args)
    fig = figure(10, 3.6 + 0.18 * len(found))
    for axes, what, part in zip(fig.subplots(1, 2), ("mean", "variance"), (0, 1)):
        for name, pair in found.items():
            spread = pair[part].double().var(correction=0).item()
            axes.plot(pair[part].numpy(), linewidth=1, label=f"{name}: {spread:.3g}")
        axes.set(title=f"running {what} of BatchNorm {args.batchnorm}", xlabel="channel",
                 ylabel=f"{what} of the inputs")
        axes.legend(title="variance over channels", loc="upper center", bbox_to_anchor=(0.5, -0.15))


TERMS = {"ce": "cross-entropy", "bn": "BatchNorm statistics, L'_BN",
         "conv": "convolution statistics, L'_Conv", "dd": "data densification, L_DD",
         "gradient": "gradient at the pixels, without L_DD", "dm": "distribution matching"}


def draw_losses(args: argparse.Namespace, figure: Callable) -> None:
    """The weighted terms of recover.py's loss over its iterations and the norm of their gradient, mean over
    image batches; by the backbone that an iteration has drawn (Eq. 7). Without terms that are always 0."""
    from matplotlib.lines import Line2D
    found = {(run, *key): curve for run, folder in zip(titles(args), args.folders)
             for key, curve in loss_curves(read_log(folder)).items()}
    runs, terms, backbones = (dict.fromkeys(key[i] for key in found) for i in range(3))
    runs, backbones = list(runs), sorted(backbones)
    terms = [term for term in TERMS if term in terms] + sorted(terms.keys() - TERMS.keys())
    several = len(runs) > 1  # then a colour for each run, else for each backbone
    rows = -(-len(terms) // 2)
    fig = figure(9 if len(terms) > 1 else 5, 0.9 + 2.5 * rows)
    grid = fig.subplots(rows, min(2, len(terms)), sharex=True, squeeze=False).flatten()
    colours = {(run, name): f"C{r if several else b}" for r, run in enumerate(runs)
               for b, name in enumerate(backbones)}
    markers = {name: MARKERS[b % len(MARKERS)] if name else "" for b, name in enumerate(backbones)}
    for axes, term in zip(grid, terms):
        curves = {(run, name): curve for (run, part, name), curve in found.items() if part == term}
        for (run, name), curve in curves.items():
            axes.plot(*curve.T, color=colours[run, name], marker=markers[name], markersize=4, linewidth=1.2)
        scale_values(axes, np.concatenate([curve[:, 1] for curve in curves.values()]))
        axes.tick_params(labelbottom=True)  # sharing an axis hides them in upper panels
        axes.set(title=TERMS.get(term, term), xlabel="iteration",
                 ylabel="norm" if term == "gradient" else "weighted loss")
    handles = [Line2D([], [], color=colours[run, backbones[0]], label=run) for run in runs] * several
    handles += [Line2D([], [], color="0.3" if several else colours[runs[0], name], marker=markers[name],
                       markersize=4, label=name or "all backbones") for name in backbones]
    title = None if several else runs[0]
    if len(grid) > len(terms):  # the legend fills the panel that is left over
        grid[-1].axis("off")
        grid[-1].legend(handles=handles, loc="center", title=title)
    else:
        fig.legend(handles=handles, loc="outside lower center", ncols=3, title=title)


def shared_legend(fig, columns: int) -> None:
    """Below the panels, what stands in any of them once."""
    entries = {label: line for axes in fig.axes for line, label in zip(*axes.get_legend_handles_labels())}
    fig.legend(entries.values(), entries.keys(), loc="outside lower center", ncols=columns)


def scale_values(axes, values: np.ndarray) -> None:
    """A logarithmic axis for values that span more than a factor of ten, linear below a millionth of the
    largest, which densification soon reaches. Ticks are plain numbers."""
    from matplotlib.ticker import LogLocator, NullFormatter
    if (values < 0).any() or values.max() <= 10 * values.min():
        return
    low = values.max() * 1e-6
    if low <= values.min():
        axes.set_yscale("log")
        if values.max() < 1000 * values.min():
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    else:       # a threshold at a power of ten: its tick would otherwise stand on that of 0
        axes.set_yscale("symlog", linthresh=10 ** np.ceil(np.log10(low)) * 1.001)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.yaxis.set_minor_formatter(NullFormatter())


def draw_ipc(args: argparse.Namespace, figure: Callable) -> None:
    """Top-1 of the last epoch against images per class, a panel for each student; bars: standard deviation
    over seeds, where there are several. Without runs whose tag begins as one of utils.report's comparisons
    (ablation, family, search)."""
    curves = ipc_curves(read_results(args.folders[0]))
    if not curves:
        fail(f"{args.folders[0]} holds no evaluation (<run>/eval/<student>.json); name a folder such as "
             "runs/cifar10, or run train_eval.py")
    students, _, runs = (list(dict.fromkeys(names)) for names in zip(*curves))
    ipcs = sorted({int(ipc) for points in curves.values() for ipc in points[:, 0]})
    fig = figure(1 + 3.8 * len(students), 3.8 + 0.06 * len(curves))
    panels = dict(zip(students, fig.subplots(1, len(students), sharey=True, squeeze=False)[0]))
    for (student, labels, run), points in curves.items():
        points[:, 0] *= 1.04 ** (runs.index(run) - (len(runs) - 1) / 2)      # bars do not cover each other
        colour = "black" if run == "random" else f"C{runs.index(run)}"
        panels[student].plot(*points[:, :2].T, marker="o", markersize=4, color=colour,
                             linestyle=DASHES[labels], markerfacecolor="white" if labels == "hard" else None,
                             label=f"{run}, {LABELS[labels]} labels")
        panels[student].errorbar(*points[~np.isnan(points[:, 2])].T, fmt="none", capsize=3, color=colour)
    for student, axes in panels.items():
        axes.set_xscale("log")
        axes.set_xticks(ipcs, ipcs)
        axes.set_xticks([], minor=True)
        axes.set(title=student, xlabel="images per class (IPC)", xlim=(ipcs[0] / 1.6, ipcs[-1] * 1.6),
                 ylim=(0, None))
    fig.axes[0].set_ylabel("top-1 of the last epoch, %")
    fig.suptitle(args.folders[0].resolve().name)
    shared_legend(fig, min(3, 1 + len(students)))


def image_groups(args: argparse.Namespace) -> tuple[list[str], dict[str, Tensor]]:
    """-> class names, {source: uint8 [classes, columns, 3, S, S]}"""
    results, groups = read_runs(args.folders), {}
    for run, folder in zip(args.names or titles(args), args.folders):
        size = next(iter(groups.values())).shape[-1] if groups else None
        found = dict(class_images(folder, args.classes, size, args.workers))
        columns = min([args.columns, *map(len, found.values())])
        groups[run] = torch.stack([images[:columns] for images in found.values()])
    if args.real:
        asked = results[0]["args"]
        split = load_split(asked["dataset"], args.data_dir, "train", groups[run].shape[-1], args.workers,
                           holdout=asked.get("holdout", False))
        check_classes(split.classes, results[0]["classes"], f"the data set {asked['dataset']}",
                      args.folders[0])
        order = [folder_name(name) for name in split.classes]
        rows = [(split.labels == order.index(name)).nonzero().flatten()[:args.columns] for name in found]
        columns = min(map(len, rows))
        groups = {"real": torch.stack([split.read(row[:columns]) for row in rows])} | groups
    return list(found), groups


def draw_images(args: argparse.Namespace, figure: Callable) -> None:
    """Images of the same classes side by side: a row for each class, a group for each source, training images
    ("real") first.

    Small images are enlarged by a whole number, large ones averaged down, to about 64 to 96 pixels."""
    names, groups = image_groups(args)
    canvas, centres, rows = tile([resized(group) for group in groups.values()], gap=4)
    fig = figure(canvas.shape[1] / DPI, canvas.shape[0] / DPI)
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


def resized(group: Tensor) -> Tensor:
    """uint8 images [rows, columns, 3, S, S] for the eye, `draw_images`."""
    if group.shape[-1] > 96:
        small = F.interpolate(group.flatten(0, 1).float(), (96, 96), mode="area").round().byte()
        return small.unflatten(0, group.shape[:2])
    times = max(1, 64 // group.shape[-1])
    return group.repeat_interleave(times, 3).repeat_interleave(times, 4)


FIGURES = {"similarity": draw_similarity, "tsne": draw_tsne, "statistics": draw_statistics,
           "channels": draw_channels, "images": draw_images, "losses": draw_losses, "ipc": draw_ipc}
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
    flag("similarity", "--backbone", metavar="NAME", help="whose logits; by default the pixels instead")
    flag("tsne", "--backbone", metavar="NAME", help="whose logits; by default the run's first backbone")
    flag("similarity tsne", "--teachers", type=plain_name,
         help="name of a set of squeezed backbones; by default the first run's")
    flag("similarity tsne", "--device", default="auto",
         help="cpu, cuda, cuda:1; auto takes cuda where there is one")
    flag("tsne", "--seed", type=number(int, 0, 2 ** 32 - 1), default=0, help="of t-SNE")
    flag("tsne images", "--classes", type=number(int, 1), default=10, help="how many, the first ones")
    flag("images", "--columns", type=number(int, 1), default=5, help="images of a class from each source")
    flag("images", "--real", action=argparse.BooleanOptionalAction, default=True,
         help="show training images too")
    flag("images", "--names", nargs="+", metavar="NAME",
         help="above the runs, in their order; by default their folders'")
    flag("similarity images", "--data-dir", default="data", help="where named data sets lie")
    flag("similarity tsne images", "--workers", type=number(int, 0), default=2,
         help="threads that read images")
    flag("statistics channels", "--backbones", nargs="+", metavar="NAME",
         help="by default all that are there")
    flag("channels", "--batchnorm", type=number(int, 1), default=2, metavar="N",
         help="the N-th of each backbone")
    return parser


def main(argv=None):
    parser = Parser(__doc__, "utils.figures")
    parser.add_argument("figure", choices=FIGURES, help="what to draw")
    parser.add_argument("words", nargs=argparse.REMAINDER, metavar="runs/... --flags",
                        help="folders and flags of that figure")
    chosen = parser.parse_args(argv)
    args, where = get_parser(chosen.figure).parse_args(chosen.words), WHERE.get(chosen.figure, RUN)
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
    args.folders = [folder.absolute() for folder in args.folders]
    dataset = [args.folders[0], *args.folders[0].parents][where.count("/") - 1]
    draw(FIGURES[chosen.figure], args, args.out or dataset / f"{chosen.figure}.png")


def draw(painter: Callable, args, path: Path) -> None:
    """Write the picture that painter(args, figure) makes, `draw_*`, as a PNG file."""
    need("matplotlib", "matplotlib")
    from matplotlib import rc_context
    from matplotlib.figure import Figure
    figures, buffer = [], io.BytesIO()

    def figure(width, height):
        """A new one, in inches."""
        figures.append(Figure((width, height), layout="constrained"))
        return figures[-1]

    with rc_context(STYLE):
        painter(args, figure)
        figures[0].savefig(buffer, format="png", bbox_inches="tight")
    picture, buffer = Image.open(buffer).convert("RGB"), io.BytesIO()     # 256 colours: a third of the bytes
    picture.quantize(256, dither=Image.Dither.NONE).save(buffer, "png", optimize=True)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(buffer.getbuffer())
    except OSError as error:
        fail(f"--out {path} cannot be written ({error.strerror or error}); name another file")
    print(path)


if __name__ == "__main__":
    script(main)
