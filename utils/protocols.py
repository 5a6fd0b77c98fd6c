"""Protocols of train_eval.py: one training on all images, class-incremental learning, data-free pruning."""
import argparse
import statistics
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace

import torch
from torch import Tensor, nn

from models.pruning import channel_scales, largest_scales, shrink
from utils import fail
from utils.checkpoint import load_finished
from utils.provenance import relevant
from utils.run import Run, generator


def trainings(args: argparse.Namespace, train_data: dict) -> dict[str, tuple[int, Callable]]:
    """What --protocol trains each student on.   train_data: of all images (train_eval.py)
    -> {piece of work: (student seed, function() -> train_data of this piece)}"""
    if args.protocol != "continual":
        return {f"seed{seed}": (seed, lambda: train_data) for seed in args.student_seeds}
    count, rngs = len(train_data["data"]["classes"]), (generator("class order", args.seed, i)
                                                       for i in range(args.orders))
    try:
        orders = [[partial(incremental_step, seen, **train_data)
                   for seen in classes_so_far(count, args.steps, rng)] for rng in rngs]
        for first, *_ in orders:                                     # the fewest images: fails now or never
            first()
    except ValueError as error:
        fail(f"--steps {args.steps}: {error}")
    pieces = {}
    for seed in args.student_seeds:                                  # all classes have no order: once
        pieces |= {f"seed{seed}-order{i}-step{j}": (seed, step)
                   for i, order in enumerate(orders) for j, step in enumerate(order[:-1])}
        pieces[f"seed{seed}-all"] = seed, orders[0][-1]
    return pieces


def metrics(args: argparse.Namespace, runs: list[dict]) -> dict:
    """What a RESULT tells of what the pieces of `trainings` gave, in their order; the last epochs count."""
    more = {}
    if args.protocol == "continual":
        early = args.steps - 1                                       # steps of an order before all classes
        seeds = [runs[i:i + args.orders * early + 1] for i in range(0, len(runs), args.orders * early + 1)]
        runs = [[*seed[i * early:(i + 1) * early], seed[-1]] for seed in seeds for i in range(args.orders)]
        curves = [[list(step["top1"].values())[-1] for step in run] for run in runs]
        more = {"curve": [statistics.fmean(step) for step in zip(*curves)],
                "curve_std": [statistics.stdev(step) if len(curves) > 1 else 0.0 for step in zip(*curves)],
                "curves": curves, "curve_images": [[step["images"] for step in run] for run in runs]}
        runs = [seed[-1] for seed in seeds]
    elif args.protocol == "prune":
        more["stages"] = {stage: {key: [run["stages"][stage][key] for run in runs]
                                  for key in ("top1", "parameters")} for stage in runs[0]["stages"]}
    elif all(by_class := [run.get("top1_by_class") for run in runs]):
        more["top1_by_class"] = by_class                 # for each seed, in the order of "classes"
    by_epoch = [run["top1"] for run in runs]
    last = [list(top1.values())[-1] for top1 in by_epoch]
    return {"top1": statistics.fmean(last), "top1_std": statistics.stdev(last) if len(last) > 1 else 0.0,
            "top1_best": statistics.fmean(max(top1.values()) for top1 in by_epoch),
            "seeds": args.student_seeds, "top1_per_seed": last, "top1_by_epoch": by_epoch, **more}


def earlier_seeds(run: Run) -> dict:
    """Of a finished result of some of the --student-seeds, all else the same: what each piece of `trainings`
    gave, and "seconds"; {} where there is none."""
    if run.args.protocol != "standard":
        return {}
    settings, asked = relevant(run.args), run.args.student_seeds
    settings.pop("student_seeds")
    result = load_finished(run.result, run.args, run.inputs, settings) or {}
    seeds = result.get("seeds", asked)
    if not set(seeds) < set(asked):
        return {}
    by_class = result.get("top1_by_class", [None] * len(seeds))
    return {"seconds": result["seconds"]} | {
        f"seed{seed}": {"top1": {int(epoch): value for epoch, value in top1.items()},
                        "top1_by_class": classes}
        for seed, top1, classes in zip(seeds, result["top1_by_epoch"], by_class)}


def classes_so_far(count: int, steps: int, generator: torch.Generator) -> list[Tensor]:
    """Class-incremental learning, as in DM (arXiv:2110.04181): `count` classes arrive in random order, over
    steps as equal as possible.   -> the sorted classes up to each. ValueError for more steps than classes"""
    if steps > count:
        raise ValueError(f"{steps} steps for {count} classes; use at most one for each")
    arriving = torch.randperm(count, generator=generator).tensor_split(steps)
    return [torch.cat(arriving[:step + 1]).sort().values for step in range(steps)]


def incremental_step(seen: Tensor, images: Tensor, classes: Tensor, labels, test, data: dict, **more) -> dict:
    """What a student is trained and tested on when it has met the classes `seen`: their distilled and test
    images, of the train_data given.   -> train_data whose classes are numbered as in `seen`"""
    number = torch.full((len(data["classes"]),), -1).index_put((seen,), torch.arange(len(seen)))
    rows, labels = labels.of(number[classes.cpu()] >= 0, seen)
    rows, tested = rows.to(images.device), (number[test.labels.cpu()] >= 0).nonzero().flatten()

    def batches(size):
        return ((pixels, number[y.cpu()]) for pixels, y in test.batches(tested.split(size)))
    names = [data["classes"][i] for i in seen.tolist()]
    return {"images": images[rows], "classes": number.to(images.device)[classes[rows]], "labels": labels,
            "test": SimpleNamespace(batches=batches, classes=names), "data": data | {"classes": names},
            **more}


def prune(model: nn.Module, train: Callable, test: Callable, sparsity: float, l1: float,
          sparse: dict[str, Tensor] | None = None, keep: Callable = lambda weights: None) -> dict:
    """Data-free pruning by network slimming (Liu et al., arXiv:1708.06519), in place: training with `l1`
    times the sum of the |BatchNorm scales| of `channel_scales`, the channels of `largest_scales` stay,
    training again.

    train: function(stage, model, penalty) in place, which gives the accuracies by epoch; test: of a model.
    sparse: weights after the first training, which keep(weights) was given by an earlier process.
    -> {"top1": by epoch of the second training, "stages": {stage: {"top1", "parameters"}}}
    """
    stages, scales = {}, channel_scales(model).values()

    def note(stage, top1):
        stages[stage] = {"top1": top1, "parameters": sum(tensor.numel() for tensor in model.parameters())}

    note("teacher", test(model))
    if sparse is None:
        train("sparse", model, lambda: l1 * sum(scale.abs().sum() for scale in scales))
        keep(model.state_dict())
    else:
        model.load_state_dict(sparse)
    note("sparse", test(model))
    shrink(model, largest_scales(model, sparsity))
    note("pruned", test(model))
    top1 = train("tuned", model, lambda: 0)
    note("tuned", list(top1.values())[-1])
    return {"top1": top1, "stages": stages}
