"""Evaluations beyond one training on all images: class-incremental learning and data-free pruning, for
train_eval.py."""
import statistics
from functools import partial
from types import SimpleNamespace

import numpy as np
import torch

from models.pruning import channel_scales, largest_scales, shrink
from utils import fail
from utils.run import generator


def trainings(args, whole, label):
    """What --protocol trains each student on.   whole: train_data of all images (train_eval.py); label: as of
    `incremental_step`   -> {piece of work: (student seed, function() -> train_data of this piece)}"""
    if args.protocol != "continual":
        return {f"seed{seed}": (seed, lambda: whole) for seed in args.student_seeds}
    count, chances = len(whole["data"]["classes"]), (generator("class order", args.seed, i)
                                                     for i in range(args.orders))
    try:
        orders = [[partial(incremental_step, seen, label, **whole)
                   for seen in classes_so_far(count, args.steps, chance)]
                  for chance in chances]
        for first, *_ in orders:                            # where one has labels, all later ones do
            first()
    except ValueError as error:
        fail(f"--steps {args.steps}: {error}")
    return {f"seed{seed}-order{i}-step{j}": (seed, step) for seed in args.student_seeds
            for i, order in enumerate(orders) for j, step in enumerate(order)}


def summary(args, runs):
    """What the pieces of `trainings` gave, in their order.   -> accuracies by epoch of the trainings that end
    a run, further metrics of the protocol"""
    more = {}
    if args.protocol == "continual":
        runs = [runs[i:i + args.steps] for i in range(0, len(runs), args.steps)]
        more = curve([[list(step["top1"].values())[-1] for step in run] for run in runs])
        more["curve_images"] = [[step["images"] for step in run] for run in runs]
        runs = [run[-1] for run in runs]
    if args.protocol == "prune":
        more["stages"] = {stage: {key: [run["stages"][stage][key] for run in runs]
                                  for key in ("top1", "parameters")}
                          for stage in runs[0]["stages"]}
    return [run["top1"] for run in runs], more


def classes_so_far(count, steps, generator):
    """Class-incremental learning, as in DM (arXiv:2110.04181): `count` classes arrive in random order, over
    steps as equal
    as possible.   -> for each step a sorted LongTensor of the classes up to it. ValueError if there are more
    steps than classes"""
    if steps > count:
        raise ValueError(f"{steps} steps for {count} classes; use at most one for each")
    arriving = torch.randperm(count, generator=generator).tensor_split(steps)
    return [torch.cat(arriving[:step + 1]).sort().values for step in range(steps)]


class SeenLabels:
    """Stored labels (`StoredLabels` of train_eval.py) of some images alone: `rows` [N] booleans, with the
    logits of the classes `seen`. A stored sample that shows, in part, an image outside of these would leak,
    and its label is right for the
    whole mixture alone: instead, each image goes through those of its first `epochs` samples whose partner is
    among these images, in turn and again from the first. An image without any is left out.

    rows: LongTensor [n], the images that are left. ValueError if none is
    """

    def __init__(self, stored, epochs, rows, seen):
        partner, rows = stored.drawn["partner"][:epochs], rows.numpy().copy()
        # whom one left out was the only partner of, too
        while not (fits := rows[partner[:, rows]]).any(0).all():
            rows[rows.nonzero()] = fits.any(0)
        if not rows.any():
            raise ValueError("no stored sample of the first classes is free of classes to come; use fewer "
                             "steps, --labels online, or relabel.py with more --epochs or --mix none")
        self.stored, self.mix, self.seen = stored, stored.mix, seen
        self.rows, self.place = torch.from_numpy(rows.nonzero()[0]), torch.from_numpy(rows.cumsum() - 1)
        # [n]; [epochs, n], those first
        self.count, self.fitting = fits.sum(0), np.argsort(~fits, axis=0, kind="stable")

    def stored_epoch(self, epoch):
        """Whose draws each image takes.   -> [n]"""
        return self.fitting[epoch % self.count, np.arange(len(self.rows))]

    def epoch(self, epoch):
        draw = self.stored.epoch(self.stored_epoch(epoch), self.rows.numpy())
        return draw | {"partner": self.place[draw["partner"]]}

    def soft_logits(self, epoch, batch, mixed):
        epochs = self.stored_epoch(epoch)[batch.numpy()]
        return self.stored.soft_logits(epochs, self.rows[batch], mixed)[:, self.seen.to(mixed.device)]


def incremental_step(seen, label, images, classes, labels, test, data):
    """What a student is trained and tested on when it has met the classes `seen`: their distilled and test
    images.
    label: function(labels, rows, seen), rows [N] booleans -> images to train on (LongTensor), labels of
    these.
    -> train_data (train_eval.py) whose classes are numbered as in `seen`"""
    number = torch.full((len(data["classes"]),), -1).index_put((seen,), torch.arange(len(seen)))
    rows, labels = label(labels, number[classes.cpu()] >= 0, seen)
    rows, tested = rows.to(images.device), (number[test.labels.cpu()] >= 0).nonzero().flatten()

    def batches(size):
        return ((pixels, number[y.cpu()]) for pixels, y in test.batches(tested.split(size)))
    return {"images": images[rows], "classes": number.to(images.device)[classes[rows]], "labels": labels,
            "test": SimpleNamespace(batches=batches),
            "data": data | {"classes": [data["classes"][i] for i in seen.tolist()]}}


def curve(top1):
    """Means and deviations over runs of accuracies top1 [runs, steps]."""
    return {"curve": [statistics.fmean(step) for step in zip(*top1)],
            "curve_std": [statistics.stdev(step) if len(top1) > 1 else 0.0 for step in zip(*top1)],
            "curves": top1}


def prune(model, train, test, sparsity, l1, sparse=None, keep=lambda weights: None):
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
