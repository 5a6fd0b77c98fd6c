"""Recover: synthesise the distilled images (phase 3 of 5).   G-VBSM, arXiv:2311.17950, Sec. 3, Eq. 2, 5-7,
10.

Pixels start as noise and are all that is optimised. An iteration augments the batch, draws one backbone (Eq.
7), and takes an Adam step on   CE + w (L'_BN + L'_Conv) + L_DD   (Table 9; in Eq. 2 CE and L_BN alone).
--method sre2l, cda, scdd and teddy are other settings of the same. dm and bilp match the mean features of the
training images in random networks (utils/dm.py); random, herding, kcenter and forgetting write real images
(utils/selection.py).

reads   data/<dataset>/...                                            the training images: --init, selections, dm, bilp
        runs/<dataset>/teachers/<teachers>/<backbone>.pt              squeeze.py; dm does without
        runs/<dataset>/teachers/<teachers>/<backbone>.stats.pt        collect_stats.py
writes  runs/<dataset>/<run>/images/<class>/<id>.png                  an ImageFolder
        runs/<dataset>/<run>/grid.png, result.json; log.jsonl of an optimisation

python recover.py --dataset cifar100 --ipc 10                              # paper setting, Table 9
python recover.py --dataset cifar100 --ipc 10 --drop-rate 0 --tag nodrop   # ablation, Fig. 6
python recover.py --dataset shapes                                         # smoke run: a minute, no download
"""
import argparse
import json
import math
from functools import reduce
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from models import build_model
from utils import fail
from utils.augment import apply_view, draw_view
from utils.cli import Parser, crop_name, identity_flags, number, number_or_auto, parse_args
from utils.closed_form import ClosedFormMatching, freeze
from utils.data import describe, load_split
from utils.dm import match_distributions
from utils.losses import class_members, data_densification, densification_closed_form
from utils.passes import fitting_groups, graphed, group_batches
from utils.presets import SELECTIONS, UNMATCHED
from utils.processes import barrier, rank, shard, world_size
from utils.provenance import check_classes, check_trained, fingerprint, fingerprints, image_set
from utils.recorder import Recorder, image_path
from utils.run import Run, begin, generator, script, send
from utils.selection import class_indices, real_starts, select
from utils.stats import Matching, matched_layers, mixed_moments
from utils.teachers import load_statistics, load_teachers, warn_of_backbones


def make_batches(num_classes, ipc, batch_size, loop):
    """Fig. 4.   -> list of batches, each a list of (class, index)

    reorder (G-VBSM): as many images a class as fit, so that densification sees several images of one class;
    original (SRe2L): at most one image of each class.
    """
    if loop not in ("reorder", "original"):
        raise ValueError(f"loop {loop!r} is neither 'reorder' nor 'original'")
    if loop == "original":
        rows = [[(label, index) for label in range(num_classes)] for index in range(ipc)]
    elif ipc > batch_size:
        rows = [[(label, index) for index in range(ipc)] for label in range(num_classes)]
    else:                                                            # whole classes
        together = batch_size // ipc
        rows = [[(label, index) for label in range(first, min(first + together, num_classes))
                 for index in range(ipc)]
                for first in range(0, num_classes, together)]
    return [row[start:start + batch_size] for row in rows for start in range(0, len(row), batch_size)]


def noise(label, index, size, seed):
    """The start of an image, N(0, 1) in normalised units, a function of (seed, class, index) alone.   -> [3,
    S, S]"""
    return torch.randn(3, size, size, generator=generator("noise", seed, label, index))


def crop_floor(curriculum, iterations, floor=0.08):
    """The smallest share of the area that a crop of each iteration t of T takes: `floor`, or with CDA's
    curriculum (its Sec. 3.2) from 1 down to it by (1 - t / T), linear, or (1 + cos(pi t / T)) / 2, cosine.
    -> number, or [T, 1]"""
    if curriculum == "none":
        return floor
    done = torch.arange(iterations)[:, None] / iterations
    return floor + (1 - floor) * ((1 + torch.cos(math.pi * done)) / 2 if curriculum == "cosine" else 1 - done)


def draw_subset(count, size, *, seed, slot):
    """Teddy: which `size` of `count` backbones all act on the images of a slot, a function of (seed, slot).
    -> tuple"""
    return tuple(sorted(torch.randperm(count, generator=generator("subset", seed, slot))[:size].tolist()))


def draw_iterations(iterations, matchers, image_size, *, seed, batches=(0,), choice="uniform", subset=0,
                    slot=0, drop_rate=0.4, crop="resized", flip=False, roll=0, curriculum="none", floor=0.08):
    """What is random in each of T iterations: a function of (seed, T), a batch's views of its number in
    `batches` too. One sequence of backbones and dropped layers serves all batches, so that they can share a
    pass.

    choice: uniform, Eq. 7, or cycle; subset: so many backbones of a slot act together instead; crop, flip,
    roll: see `utils.augment.draw_view`; curriculum, floor: see `crop_floor`.
    -> T dicts: backbones, a tuple; kept, {backbone: bool [layers], false where a convolution is dropped};
    view, tensors [batches, ...], one view for a whole batch
    """
    T, rng = iterations, generator("iterations", seed, iterations)
    uniform = torch.randint(len(matchers), (T,), generator=rng)  # Eq. 7
    backbones = [(k,) for k in (uniform if choice == "uniform" else torch.arange(T) % len(matchers)).tolist()]
    if subset:
        backbones = T * [draw_subset(len(matchers), subset, seed=seed, slot=slot)]
    chance = torch.rand(T, max(len(matcher.targets) for matcher in matchers), generator=rng)
    kept = []
    for matcher in matchers:
        is_bn = torch.tensor([len(target) == 2 for target in matcher.targets.values()], dtype=torch.bool)
        kept.append((chance[:, :len(is_bn)] >= drop_rate) | is_bn)
    views = [draw_view(T, image_size, crop, flip, roll, generator("views", seed, T, batch),
                       crop_floor(curriculum, T, floor))
             for batch in batches]
    views = {key: torch.stack([view[key] for view in views], dim=1) for key in views[0]}
    return [{"backbones": backbones[t], "kept": {k: kept[k][t] for k in backbones[t]},
             "view": {key: rows[t] for key, rows in views.items()}} for t in range(T)]


def apply_views(pixels, view):
    """A view of each batch of pixels [G, B, 3, S, S].   -> [G*B, 3, S, S]"""
    return apply_view(pixels.flatten(1, 2), view).view(-1, *pixels.shape[2:])


def matching_gradient(matcher, labels, ce_weight, pixels, view, kept, state, dropped=()):
    """Eq. 2 without densification, for pixels [G, B, 3, S, S] under a view of each batch.
    -> gradient at the pixels, losses (classification, BatchNorm, convolutions), state"""
    pixels = pixels.detach().requires_grad_()
    views = apply_views(pixels, view)
    with matcher.hooks(dropped) as inputs:
        logits = matcher.model(views)
    # closed form: without a graph, their gradient comes
    bn, conv, state = matcher.inject(inputs, state, kept)
    # in at the layers'
    ce = ce_weight * F.cross_entropy(logits, labels.flatten(), reduction="sum") / labels.shape[1]
    gradient, = torch.autograd.grad(ce + bn + conv, pixels)                                           # inputs
    return gradient, (ce.detach(), bn.detach(), conv.detach()), state


def recover_batch(images, labels, matchers, draws, *, bounds, lr=0.05, weight_decay=0.0, ce_weight=1.0,
                  dd_weight=1.0, tau=4.0,
                  dd_scale="sum", dd_on="pixels", dd_autograd=False, unit_gradients=False, averages=None,
                  gradient=None, resume=None):
    """Eq. 2 with Eq. 5-7 and Eq. 10: optimise the images of G batches at once; each moves as if it were
    alone, up to rounding.

    images [G, B, 3, S, S] in normalised units, changed in place; labels [G, B]; matchers:
    `ClosedFormMatching` or `Matching` of each backbone; draws: of `draw_iterations`; bounds: low, high [3, 1,
    1], of valid pixels. dd_on: pixels, or the view that the backbones see; dd_autograd: Eq. 5 as written, not
    in closed form; unit_gradients: scale each backbone's gradient of a batch to norm 1, so that none sets the
    size of everybody's steps (Adam's second moment); averages: moving averages to start from, one a matcher;
    gradient: in the place of `matching_gradient`; resume: a state. Yields after every step of Adam t, losses
    {ce, bn, conv, dd, and the gradient's norm}, summed over batches, and state(), to resume from.
    ValueError where shapes do not fit.
    """
    if labels.dim() != 2 or images.dim() != 5 or images.shape[:2] != labels.shape:
        raise ValueError(f"images of shape {tuple(images.shape)}, labels of shape {tuple(labels.shape)}; "
                         f"expected [groups, batch, "
                         "3, size, size] and [groups, batch], as images[None] and labels[None] of a single "
                         "batch")
    G, device, gradient = len(labels), images.device, gradient or matching_gradient
    members = class_members((labels + (labels.max() + 1) * torch.arange(G, device=device)[:, None]).flatten())
    pixels = images.detach().requires_grad_()                        # the same memory
    optimizer = torch.optim.Adam([pixels], lr=lr, betas=(0.5, 0.9), weight_decay=weight_decay,
                                 fused=pixels.is_cuda)
    averages, first = averages or [matcher.start(G) for matcher in matchers], 0
    if resume:
        first, averages = resume["iterations"], send(resume["averages"], device)
        pixels.data.copy_(resume["pixels"])
        optimizer.load_state_dict(resume["adam"])
    averages = list(averages)
    for t in range(first, len(draws)):
        optimizer.param_groups[0]["lr"] = lr * (1 + math.cos(math.pi * t / len(draws))) / 2
        view, terms = send(draws[t]["view"], device), []
        for k in draws[t]["backbones"]:  # Eq. 7: one; Teddy: a subset
            kept = draws[t]["kept"][k]
            dropped = [name for name, keep in zip(matchers[k].targets, kept.tolist()) if not keep]
            slope, losses, averages[k] = gradient(matchers[k], labels, ce_weight, pixels, view,
                                                  send(kept, device), averages[k],
                                                  dropped)                                   # Eq. 6, Eq. 10
            # of each batch, as if alone
            norms = torch.linalg.vector_norm(slope, dim=(1, 2, 3, 4), keepdim=True)
            if unit_gradients:
                slope = slope / norms.clamp(min=1e-12)
            terms.append((slope, *losses, norms.sum()))
        pixels.grad, ce, bn, conv, norm = (reduce(torch.add, term) for term in zip(*terms))
        dd = pixels.new_zeros(())
        if dd_weight and members:                                                            # Eq. 5
            seen = pixels if dd_on == "pixels" else apply_views(pixels, view).view(pixels.shape)
            dd = dd_weight * (sum(data_densification(x, y, tau, dd_scale) for x, y in zip(seen, labels))
                              if dd_autograd else
                              densification_closed_form(seen.flatten(0, 1), members, tau, dd_scale))
            dd.backward()                                            # adds to the gradient
        optimizer.step()
        with torch.no_grad():
            pixels.clamp_(*bounds)
        yield t, {"ce": ce, "bn": bn, "conv": conv, "dd": dd.detach(), "gradient": norm}, lambda: {
            "iterations": t + 1, "pixels": pixels.detach(), "adam": optimizer.state_dict(),
            "averages": averages}


def layer_weights(model, bn_weight, conv_weight, first_multiplier):
    """{layer name: weight of its statistics}; the first layer that is matched counts first_multiplier times:
    a convolution, whose input is the image, as in the release, or without convolutions the first BatchNorm,
    as in SRe2L."""
    weights = {name: bn_weight if isinstance(layer, nn.BatchNorm2d) else conv_weight
               for name, layer in matched_layers(model).items()}
    if first := [name for name, weight in weights.items() if weight][:1]:
        weights[first[0]] *= first_multiplier
    return weights


def make_matchers(args, models, statistics, labels):
    """A matcher of each backbone for batches of labels [G, B]; with --class-statistics its targets are the
    mixtures of their classes."""
    matchers, form = [], Matching if args.statistics == "plain" else ClosedFormMatching
    for name, model in models.items():
        targets, patch = statistics[name]["statistics"], statistics[name]["patch"]
        if args.class_statistics:
            share = F.one_hot(labels, len(statistics[name]["classes"])).double().mean(1).cpu()
            targets = {layer: [moment.float() for pair in zip(*[iter(vectors)] * 2)
                               for moment in mixed_moments(*pair, share)]
                       for layer, vectors in statistics[name]["class_statistics"].items()}
        targets = {layer: [vector.to(labels.device) for vector in vectors] for layer,
                   vectors in targets.items()}
        weights = layer_weights(model, args.bn_weight, args.conv_weight, args.first_multiplier)
        matchers.append(form(model, targets, weights, alpha=args.alpha, patch=patch))
    return matchers


def make_groups(args, batches, models, statistics, image_size, device):
    """Numbers of the batches that share a pass: --groups-per-step of one size and subset of backbones; with
    --ema-carry each
    alone.   -> list of (numbers, slot), a slot being what a --subset depends on: the index of the images, or
    the number"""
    slots = [batch[0][1] if args.loop == "original" else number for number, batch in enumerate(batches)]
    kinds = [(len(batch), args.subset and draw_subset(len(models), args.subset, seed=args.seed, slot=slot))
             for batch, slot in zip(batches, slots)]

    def together(kind, count):
        if args.ema_carry or args.groups_per_step != "auto":
            return 1 if args.ema_carry else args.groups_per_step
        matchers = make_matchers(args, models, statistics,
                                 torch.zeros(1, kind[0], dtype=torch.long, device=device))
        return min(fitting_groups(matching_gradient, matchers, kind[0], image_size, device),
                   math.ceil(count / world_size()))

    return [(numbers, slots[numbers[0]]) for numbers in group_batches(kinds, together)]


def synthesise(args, run, recorder, models, statistics, data, starts, device):
    """Write all images; the processes of torchrun share the batches, but with --ema-carry, where one needs
    the batch before."""
    size, checkpoint = data["image_size"], run.checkpoint
    low, high = ((torch.tensor([bound - m for m in data["mean"]])
                  / torch.tensor(data["std"])).to(device)[:, None, None]
                 for bound in (0, 1))
    batches = make_batches(len(data["classes"]), args.ipc, args.batch_size, args.loop)
    if rank() == 0 and (checkpoint.read("groups") or {}).get("asked") != args.groups_per_step:
        checkpoint.save({"asked": args.groups_per_step,
                         "groups": make_groups(args, batches, models, statistics, size, device)},
                        "groups")
    barrier()
    groups = checkpoint.read("groups")["groups"]
    todo = [group for group in groups
            if not recorder.existing([member for number in group[0] for member in batches[number]])]
    barrier()                                                        # until all have seen the same
    todo = todo * (rank() == 0) if args.ema_carry else shard(todo)
    run.start(args.iterations * sum(len(numbers) for numbers, _ in todo), "iterations")
    for numbers, slot in todo:
        members = [member for number in numbers for member in batches[number]]
        images = torch.stack([starts[one] if starts else noise(*one, size, args.seed) for one in members])
        images = images.view(len(numbers), -1, 3, size, size).to(device)
        labels = torch.tensor([label for label, _ in members], device=device).view(len(numbers), -1)
        matchers = make_matchers(args, models, statistics, labels)
        draws = draw_iterations(
            args.iterations, matchers, size, seed=args.seed, batches=numbers, choice=args.choice,
            subset=args.subset, slot=slot,
            drop_rate=args.drop_rate, crop=args.crop, flip=args.flip, roll=args.roll,
            curriculum=args.crop_curriculum)
        names = ["+".join(list(models)[k] for k in draw["backbones"]) for draw in draws]
        carried = checkpoint.read(f"averages{numbers[0] - 1}") if args.ema_carry and numbers[0] else None
        resume, state = recorder.begin(numbers, members, args.iterations, names), None
        for t, losses, state in recover_batch(
                images, labels, matchers, draws, bounds=(low, high), lr=args.lr,
            weight_decay=args.weight_decay,
                ce_weight=args.ce_weight, dd_weight=args.dd_weight, dd_scale=args.dd_scale, dd_on=args.dd_on,
            dd_autograd=args.statistics == "plain",
                unit_gradients=args.unit_gradients, averages=carried and send(carried, device),
                gradient=graphed(matching_gradient) if args.cuda_graphs else None,
                resume=resume):
            recorder.step(t, losses, images, state)
        if args.ema_carry:
            checkpoint.save((state() if state else resume)["averages"], f"averages{numbers[0]}")
            checkpoint.drop(f"averages{numbers[0] - 2}")
        recorder.write(images)
    recorder.close([member for batch in batches for member in batch])


def get_parser():
    parser = identity_flags(Parser(__doc__))
    method = parser.add_argument_group("method")
    method.add_argument("--alpha", type=number(float, 0, 1), default=0.8,
                        help="weight of the past in batch statistics, 0 = off [alpha]")
    method.add_argument("--ema-carry", action=argparse.BooleanOptionalAction, default=False,
                        help="carry the averages of batch statistics over from one image batch to the next; "
                        "batches then go "
                        "one after another")
    method.add_argument("--drop-rate", type=number(float, 0, 1), default=0.4,
                        help="probability of skipping a convolution's statistics, 0 = never, 1 = always "
                        "[beta_dr]")
    method.add_argument("--ce-weight", type=number(float, 0), default=1.0,
                        help="of the classification loss, 0 = off")
    method.add_argument("--bn-weight", type=number(float, 0), default=0.01,
                        help="of BatchNorm statistics, 0 = off [L'_BN]")
    method.add_argument("--conv-weight", type=number(float, 0), default=0.01,
                        help="of convolution statistics, 0 = off [L'_Conv]")
    method.add_argument("--first-multiplier", type=number(float, 0), default=10.0,
                        help="of the first layer's statistics, 1 = off")
    method.add_argument("--dd-weight", type=number(float, 0), default=1.0,
                        help="of data densification, 0 = off [L_DD]")
    method.add_argument("--dd-scale", choices=["sum", "mean"], default="sum",
                        help="Gram matrix as in the paper, or divided by its feature dimension")
    method.add_argument("--dd-on", choices=["pixels", "view"], default="pixels",
                        help="densification of the images, or of the augmented ones that the backbones see "
                        "[X~, Eq. 4]")
    method.add_argument("--loop", choices=["reorder", "original"], default="reorder",
                        help="grouping of images, Fig. 4")
    method.add_argument("--choice", choices=["uniform", "cycle"], default="uniform",
                        help="of the backbone of an iteration, Eq. 7")
    method.add_argument("--unit-gradients", action=argparse.BooleanOptionalAction, default=False,
                        help="scale each backbone's gradient of a batch to norm 1; densification is added "
                        "after it")
    method.add_argument("--subset", type=number(int, 0), default=0,
                        help="so many backbones, drawn for each image slot, act in every iteration [S_i of "
                        "Teddy]; 0 = one, Eq. 7")
    method.add_argument("--class-statistics", action=argparse.BooleanOptionalAction, default=False,
                        help="match those of the mixture of classes in a batch, for unbalanced data [Teddy]")
    method.add_argument("--statistics", choices=["closed", "plain"], default="closed",
                        help="Eq. 6 and Eq. 10 in closed form, or by autograd as they read")
    start = parser.add_argument_group("start and augmentation of the images")
    start.add_argument("--init", choices=["noise", "real", "herding", "kcenter", "crops"], default="noise",
                       help="noise; training images, random or chosen by the first backbone; or their crops "
                       "of lowest loss")
    start.add_argument("--init-images", type=number(int, 1), default=300,
                       help="images of a class that --init crops looks at")
    start.add_argument("--mosaic", type=number(int, 1, 8), default=1,
                       help="tiles a side of a start, each a whole image, smaller; 1 = off [factor of RDED]")
    start.add_argument("--crop", type=crop_name, default="resized",
                       help="augmentation: none, resized, pad<pixels>")
    start.add_argument("--crop-curriculum", choices=["none", "linear", "cosine"], default="none",
                       help="smallest area of --crop resized: falls from 1 to 0.08 of the image [CDA]; none: "
                       "0.08")
    start.add_argument("--flip", action=argparse.BooleanOptionalAction, default=False,
                       help="augmentation: horizontal flips")
    start.add_argument("--roll", type=number(int, 0), default=0,
                       help="augmentation: circular shift of up to so many pixels, 0 = off")
    matching = parser.add_argument_group("distribution matching, --method dm and bilp")
    matching.add_argument("--real-batch", type=number(int, 1), default=256,
                          help="real images of a class in an iteration")
    matching.add_argument("--adaptive-ratio", type=number(float, 0, 0.9), default=0.0,
                          help="share of real images that adaptive pruning leaves out, 0 = off [beta]")
    matching.add_argument("--adaptive-period", type=number(int, 1), default=10,
                          help="iterations between two prunings")
    optimization = parser.add_argument_group("optimization")
    optimization.add_argument("--iterations", type=number(int, 1), default=4000,
                              help="Adam steps for each batch of images; SGD steps of dm")
    optimization.add_argument("--batch-size", type=number(int, 1), default=50,
                              help="images optimised together")
    optimization.add_argument("--lr", type=number(float, 0), default=0.05,
                              help="Adam learning rate, cosine to 0; of dm constant")
    optimization.add_argument("--weight-decay", type=number(float, 0), default=0.0, help="of Adam, 0 = off")
    optimization.add_argument("--groups-per-step", type=number_or_auto(int, 1), default="auto",
                              help="batches in one pass, auto: as many as fill a GPU; 1 is the paper's loop, "
                              "and the images "
                              "are the same up to rounding")
    optimization.add_argument("--cuda-graphs", action=argparse.BooleanOptionalAction, default=False,
                              help="replay each backbone's pass as one launch; for GPUs that wait for the "
                              "host")
    optimization.add_argument("--log-every", type=number(int, 1),
                              help="iterations between lines of log.jsonl; a hundredth of all")
    return parser


def check_flags(args):
    """Stop where flags contradict each other."""
    if args.cuda_graphs and args.statistics == "plain":
        fail("--cuda-graphs needs --statistics closed; leave it out")
    if args.crop_curriculum != "none" and args.crop != "resized":
        fail(f"--crop-curriculum {args.crop_curriculum} is of --crop resized, not {args.crop}; name both, or "
             f"neither")
    if args.init == "crops" and args.init_images < (count := args.ipc * args.mosaic ** 2):
        fail(f"--init-images {args.init_images} is fewer than --ipc {args.ipc} "
             f"{f'with --mosaic {args.mosaic} ' * (args.mosaic > 1)}takes; use at least {count}")
    if args.mosaic > 1 and args.init == "noise":
        fail(f"--mosaic {args.mosaic} is of real images; name an --init")


def main(argv=None):
    args = parse_args(get_parser(), "recover", argv)
    device, paths = begin(args)
    check_flags(args)
    if args.cuda_graphs and device.type != "cuda":
        fail("--cuda-graphs needs a GPU (--device cuda); leave it out")
    selects, uses_statistics, real = args.method in SELECTIONS, args.method not in UNMATCHED, args.init in ("noise", "real")
    first, upstream, inputs, records, models, statistics = args.backbones[0], {}, {}, {}, {}, {}
    needs_none = args.method == "random" or (args.method == "dm" and real
                                             and not (paths.teachers / f"{first}.pt").exists())
    if not needs_none:
        asked = argparse.Namespace(**vars(args) | {"backbones": args.backbones if uses_statistics
                                                   else [first]})
        models, records, data = load_teachers(asked, paths.teachers, build_model, device)
        if args.method == "dm" and real and "kept" not in records[first]:
            models, records = {}, {}                                 # it would change nothing
        inputs = fingerprints(records) if uses_statistics else {"first backbone": fingerprints(records)["weights"]} if records else {}
        upstream = {"squeeze": {name: record["args"] for name, record in records.items()}}
    if uses_statistics:
        if args.subset > len(models):
            fail(f"--subset {args.subset} is more than the {len(models)} --backbones; use at most that many")
        statistics = load_statistics(args, paths.teachers, models, records)
        upstream["collect_stats"] = {name: stored.get("args") for name, stored in statistics.items()}
        inputs["statistics"] = {name: stored.get("fingerprint") for name, stored in statistics.items()}
    run = Run("recover", args, paths.run / "result.json", inputs)
    if run.finished():
        return None
    seen, starts = {}, {}
    if not uses_statistics or args.init != "noise":
        data = data if records else describe(args.dataset, args.data_dir, args.image_size, args.workers,
                                             args.data_set["fingerprint"])
        if data["image_size"] % args.mosaic:
            fail(f"--mosaic {args.mosaic} does not divide the {data['image_size']} pixels of an image; use a "
                 f"number that does")
        split = load_split(args.dataset, args.data_dir, "train", data["image_size"], args.workers,
                           holdout=args.holdout, imbalance=args.imbalance)
        check_classes(split.classes, data["classes"], f"--dataset {args.dataset}",
                      f"the teachers in {paths.teachers}")
        check_trained(split, records, paths)
        seen, tiles = {"data": fingerprint(json.dumps([data, len(split)]))}, args.mosaic ** 2
        kept = records.get(first, {}).get("kept", torch.arange(len(split)))
        members = class_indices(split, kept, data["classes"], args.ipc, 1 if selects else tiles)
        by = dict(first=(first, models.get(first), records.get(first)), data=data, seed=args.seed,
                  device=device)
    if selects:
        chosen = select(args.method, args.ipc, members, split, **by)
    elif args.init != "noise":
        starts = real_starts(args.init, args.ipc, members, split, looked_at=args.init_images, tiles=tiles,
                             **by)
    everything = [(label, index) for label in range(len(data["classes"])) for index in range(args.ipc)]
    with run.work(seen, [*paths.images.glob("*/*.png"), *paths.run.glob("log*.jsonl")]) as checkpoint:
        recorder = Recorder(run, paths.run, data, args.ipc, log=not selects)
        if uses_statistics:
            unmatched = [name for name in models if not any(layer_weights(models[name], args.bn_weight,
                                                                          args.conv_weight, 1).values())]
            warn_of_backbones(records, len(data["classes"]),
                              unmatched if args.bn_weight or args.conv_weight else ())
            frozen = {name: freeze(model) for name,
                      model in models.items()} if args.statistics == "closed" else models
            synthesise(args, run, recorder, frozen, statistics, data, starts, device)
        elif rank() == 0 and selects:
            run.start(len(data["classes"]), "classes")
            for label, name in enumerate(data["classes"]):
                recorder.write_real(label, split.read(chosen[label]))
                run.step(name, dict)                                 # no state: choosing again is quick
        elif rank() == 0:
            images = [starts[one] if starts else noise(*one, data["image_size"], args.seed)
                      for one in everything]
            images = torch.stack(images).unflatten(0, (-1, args.ipc)).to(device)
            run.start(args.iterations, "iterations")
            for t, losses, state in match_distributions(
                    images, members, split.to(device), (data["mean"], data["std"]),
                iterations=args.iterations, seed=args.seed,
                    lr=args.lr, real_batch=args.real_batch, ratio=args.adaptive_ratio,
                period=args.adaptive_period,
                    resume=recorder.begin([0], everything, args.iterations)):
                recorder.step(t, losses, images, state)
            recorder.write(images)
        files = [image_path(Path(), data, *one).as_posix() for one in everything]
        if rank() == 0:
            recorder.grid.save()
            metrics = {"images": len(files), "classes": data["classes"],
                       "image_set": image_set(paths.images, files)}
            if records:
                metrics["teacher_top1"] = {name: record["top1"] for name, record in records.items()}
            return run.finish(metrics, f"{len(files)} images of {len(data['classes'])} classes", upstream)


if __name__ == "__main__":
    script(main)
