"""Recover: synthesise the distilled images (phase 3 of 5).   G-VBSM, arXiv:2311.17950, Eq. 2, 5-7, 10.

Pixels start as noise and are all that is optimised. An iteration augments the batch, draws one backbone (Eq.
7), and takes an Adam step on   CE + w (L'_BN + L'_Conv) + L_DD   (Table 9; in Eq. 2 CE and L_BN alone).
--method sre2l, cda, scdd and teddy are other settings of the same. dm and bilp match the mean features of the
training images in random networks (utils/dm.py); random, herding, kcenter and forgetting write real images
(utils/selection.py).

reads   data/<dataset>/...                                      training images: --init, selections, dm, bilp
        runs/<dataset>/teachers/<teachers>/<backbone>.pt        squeeze.py; dm does without
        runs/<dataset>/teachers/<teachers>/<backbone>.stats.pt  collect_stats.py
writes  runs/<dataset>/<run>/images/<class>/<id>.png            an ImageFolder
        runs/<dataset>/<run>/grid.png, result.json; log.jsonl of an optimisation

python recover.py --dataset cifar100 --ipc 10                              # paper setting, Table 9
python recover.py --dataset cifar100 --ipc 10 --drop-rate 0 --tag nodrop   # ablation, Fig. 6
python recover.py --dataset shapes                                         # smoke run: a minute, no download
"""
import argparse
import math
from functools import reduce
from pathlib import Path

import torch
import torch.nn.functional as F

from models import build_model
from utils import fail
from utils.augment import apply_view, crop_floor, draw_view
from utils.cli import Parser, crop_name, identity_flags, number, number_or_auto, parse_args
from utils.closed_form import ClosedFormMatching, freeze
from utils.data import describe
from utils.dm import match_distributions
from utils.losses import class_members, data_densification, densification_closed_form
from utils.passes import fitting_groups, graphed, group_batches
from utils.presets import SELECTIONS, UNMATCHED
from utils.processes import barrier, rank, shard, world_size
from utils.provenance import fingerprints, image_set
from utils.recorder import Recorder, image_path
from utils.run import Run, begin, generator, script, send
from utils.selection import real_starts, select, training_images
from utils.stats import Matching, layer_weights, mixed_moments
from utils.teachers import load_statistics, load_teachers, warn_of_backbones


def one_of(name, value, first, second):
    """ValueError for another value."""
    if value not in (first, second):
        raise ValueError(f"{name} {value!r} is neither {first!r} nor {second!r}")


def make_batches(num_classes, ipc, batch_size, loop):
    """Fig. 4.   -> list of batches, each a list of (class, index)

    reorder (G-VBSM): as many images a class as fit, so that densification sees several images of one class;
    original (SRe2L): at most one image of each class.
    """
    one_of("loop", loop, "reorder", "original")
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
    """The start of an image, N(0, 1) in normalised units, a function of (seed, class, index) alone.
    -> [3, S, S]"""
    return torch.randn(3, size, size, generator=generator("noise", seed, label, index))


def first_images(members, starts, data, seed):
    """Starts of the images (class, index), noise where there are none.   -> [N, 3, S, S]"""
    return torch.stack([starts[one] if starts else noise(*one, data["image_size"], seed) for one in members])


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
    one_of("choice", choice, "uniform", "cycle")
    if subset > len(matchers):
        raise ValueError(f"a subset of {subset} is more than the {len(matchers)} matchers")
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
    # closed form: bn and conv have no graph, their gradient comes in at the layers' inputs
    bn, conv, state = matcher.inject(inputs, state, kept)
    ce = ce_weight * F.cross_entropy(logits, labels.flatten(), reduction="sum") / labels.shape[1]
    gradient, = torch.autograd.grad(ce + bn + conv, pixels)
    return gradient, (ce.detach(), bn.detach(), conv.detach()), state


def recover_batch(images, labels, matchers, draws, *, bounds, lr=0.05, weight_decay=0.0, ce_weight=1.0,
                  dd_weight=1.0, tau=4.0, dd_scale="sum", dd_on="pixels", dd_autograd=False,
                  unit_gradients=False, averages=None, gradient=None, resume=None):
    """Eq. 2 with Eq. 5-7 and Eq. 10: optimise the images of G batches at once; each moves as if it were
    alone, up to rounding.

    images [G, B, 3, S, S] in normalised units, changed in place; labels [G, B]; matchers:
    `ClosedFormMatching` or `Matching` of each backbone; draws: of `draw_iterations`; bounds: low, high
    [3, 1, 1], of valid pixels. dd_on: pixels, or the view that the backbones see; dd_autograd: Eq. 5 as
    written, not in closed form; unit_gradients: scale each backbone's gradient of a batch to norm 1, so that
    none sets the size of everybody's steps (Adam's second moment); averages: moving averages to start from,
    one a matcher; gradient: in the place of `matching_gradient`; resume: a state. Yields after every step of
    Adam t, losses {ce, bn, conv, dd, and the gradient's norm}, summed over batches, and state(), to resume
    from. ValueError where shapes do not fit.
    """
    if labels.dim() != 2 or images.dim() != 5 or images.shape[:2] != labels.shape:
        raise ValueError(f"images of shape {tuple(images.shape)}, labels of shape {tuple(labels.shape)}; "
                         "expected [groups, batch, 3, size, size] and [groups, batch], as images[None] and "
                         "labels[None] of a single batch")
    one_of("dd_on", dd_on, "pixels", "view")
    if any(len(rows) != len(labels) for draw in draws[:1] for rows in draw["view"].values()):
        raise ValueError(f"draws of other batches than the {len(labels)} groups of images; give "
                         f"draw_iterations batches=range({len(labels)})")
    G, device, gradient = len(labels), images.device, gradient or matching_gradient
    members = class_members((labels + (labels.max() + 1) * torch.arange(G, device=device)[:, None]).flatten())
    pixels = images.detach().requires_grad_()                        # the same memory
    optimizer = torch.optim.Adam([pixels], lr, (0.5, 0.9), weight_decay=weight_decay, fused=pixels.is_cuda)
    averages, first = list(averages or [matcher.start(G) for matcher in matchers]), 0
    if resume:
        first, averages = resume["iterations"], list(send(resume["averages"], device))
        pixels.data.copy_(resume["pixels"])
        optimizer.load_state_dict(resume["adam"])
    for t in range(first, len(draws)):
        optimizer.param_groups[0]["lr"] = lr * (1 + math.cos(math.pi * t / len(draws))) / 2
        view, terms = send(draws[t]["view"], device), []
        for k in draws[t]["backbones"]:                              # Eq. 7: one; Teddy: a subset
            kept = draws[t]["kept"][k]
            dropped = [name for name, keep in zip(matchers[k].targets, kept.tolist()) if not keep]
            slope, losses, averages[k] = gradient(matchers[k], labels, ce_weight, pixels, view,
                                                  send(kept, device), averages[k], dropped)  # Eq. 6, Eq. 10
            norms = torch.linalg.vector_norm(slope, dim=(1, 2, 3, 4), keepdim=True)          # of each batch
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
        targets = {layer: [vector.to(labels.device) for vector in vectors]
                   for layer, vectors in targets.items()}
        weights = layer_weights(model, args.bn_weight, args.conv_weight, args.first_multiplier)
        matchers.append(form(model, targets, weights, alpha=args.alpha, patch=patch))
    return matchers


def make_groups(args, checkpoint, batches, models, statistics, image_size, device):
    """Numbers of the batches that share a pass: --groups-per-step of one size and subset of backbones; with
    --ema-carry each alone. Kept with the unfinished work, for all processes.   -> list of (numbers, slot), a
    slot being what a --subset depends on: the index of the images, or the number"""
    slots = [batch[0][1] if args.loop == "original" else number for number, batch in enumerate(batches)]
    kinds = [(len(batch), args.subset and draw_subset(len(models), args.subset, seed=args.seed, slot=slot))
             for batch, slot in zip(batches, slots)]

    def together(kind, count):
        if args.ema_carry or args.groups_per_step != "auto":
            return 1 if args.ema_carry else args.groups_per_step
        labels = torch.zeros(1, kind[0], dtype=torch.long, device=device)
        matchers = make_matchers(args, models, statistics, labels)
        return min(fitting_groups(matching_gradient, matchers, kind[0], image_size, device),
                   math.ceil(count / world_size()))

    if rank() == 0 and (checkpoint.read("groups") or {}).get("asked") != args.groups_per_step:
        groups = [(numbers, slots[numbers[0]]) for numbers in group_batches(kinds, together)]
        checkpoint.save({"asked": args.groups_per_step, "groups": groups}, "groups")
    barrier()
    return checkpoint.read("groups")["groups"]


def synthesise(args, run, recorder, models, statistics, data, starts, device):
    """Write all images; the processes of torchrun share the batches, but with --ema-carry, where one needs
    the batch before."""
    bounds = [(torch.tensor([bound - m for m in data["mean"]]) / torch.tensor(data["std"])).to(device)
              for bound in (0, 1)]
    settings = dict(
        bounds=[bound[:, None, None] for bound in bounds], lr=args.lr, weight_decay=args.weight_decay,
        ce_weight=args.ce_weight, dd_weight=args.dd_weight, dd_scale=args.dd_scale, dd_on=args.dd_on,
        dd_autograd=args.statistics == "plain", unit_gradients=args.unit_gradients)
    batches = make_batches(len(data["classes"]), args.ipc, args.batch_size, args.loop)
    groups = make_groups(args, run.checkpoint, batches, models, statistics, data["image_size"], device)
    todo = [group for group in groups
            if not recorder.existing([member for number in group[0] for member in batches[number]])]
    barrier()                                                        # until all have seen the same
    todo = todo * (rank() == 0) if args.ema_carry else shard(todo)
    run.start(args.iterations * sum(len(numbers) for numbers, _ in todo), "iterations")
    for numbers, slot in todo:
        members = [member for number in numbers for member in batches[number]]
        images = first_images(members, starts, data, args.seed).unflatten(0, (len(numbers), -1)).to(device)
        labels = torch.tensor([label for label, _ in members], device=device).view(len(numbers), -1)
        matchers = make_matchers(args, models, statistics, labels)
        draws = draw_iterations(
            args.iterations, matchers, data["image_size"], seed=args.seed, batches=numbers,
            choice=args.choice, subset=args.subset, slot=slot, drop_rate=args.drop_rate, crop=args.crop,
            flip=args.flip, roll=args.roll, curriculum=args.crop_curriculum)
        names = ["+".join(list(models)[k] for k in draw["backbones"]) for draw in draws]
        carried = run.checkpoint.read(f"averages{numbers[0] - 1}") if args.ema_carry and numbers[0] else None
        resume, state = recorder.begin(numbers, members, args.iterations, names), None
        for t, losses, state in recover_batch(
                images, labels, matchers, draws, **settings, averages=carried and send(carried, device),
                gradient=graphed(matching_gradient) if args.cuda_graphs else None, resume=resume):
            recorder.step(t, losses, images, state)
        if args.ema_carry:
            run.checkpoint.save((state() if state else resume)["averages"], f"averages{numbers[0]}")
            run.checkpoint.drop(f"averages{numbers[0] - 2}")
        recorder.write(images)
    recorder.close([member for batch in batches for member in batch])


def match_features(args, run, recorder, split, members, data, starts, device):
    """Write all images of --method dm and bilp; members: the real images of each class in the split."""
    everything = [(label, index) for label in range(len(members)) for index in range(args.ipc)]
    images = first_images(everything, starts, data, args.seed).unflatten(0, (-1, args.ipc)).to(device)
    run.start(args.iterations, "iterations")
    for t, losses, state in match_distributions(
            images, members, split.to(device), (data["mean"], data["std"]), iterations=args.iterations,
            seed=args.seed, lr=args.lr, real_batch=args.real_batch, ratio=args.adaptive_ratio,
            period=args.adaptive_period, resume=recorder.begin([0], everything, args.iterations)):
        recorder.step(t, losses, images, state)
    recorder.write(images)


def get_parser():
    parser = identity_flags(Parser(__doc__))
    share, weight, count = number(float, 0, 1), number(float, 0), number(int, 0)
    switch = dict(action=argparse.BooleanOptionalAction, default=False)
    add = parser.add_argument_group("method").add_argument
    add("--alpha", type=share, default=0.8, help="weight of the past in batch statistics, 0 = off [alpha]")
    add("--ema-carry", **switch, help="carry these averages from one batch to the next, one after another")
    add("--drop-rate", type=share, default=0.4, help="chance to skip a convolution's statistics [beta_dr]")
    add("--ce-weight", type=weight, default=1.0, help="of the classification loss, 0 = off")
    add("--bn-weight", type=weight, default=0.01, help="of BatchNorm statistics, 0 = off [L'_BN]")
    add("--conv-weight", type=weight, default=0.01, help="of convolution statistics, 0 = off [L'_Conv]")
    add("--first-multiplier", type=weight, default=10.0, help="of the first layer's statistics, 1 = off")
    add("--dd-weight", type=weight, default=1.0, help="of data densification, 0 = off [L_DD]")
    add("--dd-scale", choices=["sum", "mean"], default="sum", help="Gram matrix; mean: by its dimension")
    add("--dd-on", choices=["pixels", "view"], default="pixels", help="densified; view: augmented, Eq. 4")
    add("--loop", choices=["reorder", "original"], default="reorder", help="grouping of images, Fig. 4")
    add("--choice", choices=["uniform", "cycle"], default="uniform", help="of an iteration's backbone, Eq. 7")
    add("--unit-gradients", **switch, help="scale each backbone's gradient of a batch to norm 1, before L_DD")
    add("--subset", type=count, default=0, help="backbones of a slot, all act [S_i of Teddy]; 0 = one, Eq. 7")
    add("--class-statistics", **switch, help="match those of the mixture of classes in a batch [Teddy]")
    add("--statistics", choices=["closed", "plain"], default="closed", help="Eq. 6, Eq. 10; plain: autograd")
    add = parser.add_argument_group("start and augmentation of the images").add_argument
    add("--init", choices=["noise", "real", "herding", "kcenter", "crops"], default="noise",
        help="noise; training images, random or chosen by the first backbone; or their crops of lowest loss")
    add("--mosaic", type=number(int, 1, 8), default=1, help="tiles a side of a start, 1 = off [RDED]")
    add("--crop", type=crop_name, default="resized", help="augmentation: none, resized, pad<pixels>")
    add("--crop-curriculum", choices=["none", "linear", "cosine"], default="none",
        help="smallest area of --crop resized: falls from 1 to 0.08 of the image [CDA]; none: 0.08")
    add("--flip", **switch, help="augmentation: horizontal flips")
    add("--roll", type=count, default=0, help="augmentation: circular shift of up to so many pixels, 0 = off")
    add = parser.add_argument_group("distribution matching, --method dm and bilp").add_argument
    add("--real-batch", type=number(int, 1), default=256, help="real images of a class in an iteration")
    add("--adaptive-ratio", type=number(float, 0, 0.9), default=0.0, help="share pruned, 0 = off [beta]")
    add("--adaptive-period", type=number(int, 1), default=10, help="iterations between two prunings")
    add = parser.add_argument_group("optimization").add_argument
    add("--iterations", type=number(int, 1), default=4000, help="Adam steps for each batch; SGD steps of dm")
    add("--batch-size", type=number(int, 1), default=50, help="images optimised together")
    add("--lr", type=weight, default=0.05, help="Adam learning rate, cosine to 0; of dm constant")
    add("--weight-decay", type=weight, default=0.0, help="of Adam, 0 = off")
    add("--groups-per-step", type=number_or_auto(int, 1), default="auto",
        help="batches in one pass, auto: as many as fill a GPU; the paper's 1 gives the same up to rounding")
    add("--cuda-graphs", **switch, help="replay a pass as one launch; for GPUs that wait for the host")
    return parser


def check_flags(args, device):
    """Stop where flags contradict each other."""
    if args.cuda_graphs and args.statistics == "plain":
        fail("--cuda-graphs needs --statistics closed; leave it out")
    if args.crop_curriculum != "none" and args.crop != "resized":
        fail(f"--crop-curriculum {args.crop_curriculum} is of --crop resized, not {args.crop}; name both, or "
             "neither")
    if args.mosaic > 1 and args.init == "noise":
        fail(f"--mosaic {args.mosaic} is of real images; name an --init")
    if args.cuda_graphs and device.type != "cuda":
        fail("--cuda-graphs needs a GPU (--device cuda); leave it out")


def load_backbones(args, folder, device):
    """The backbones that a method matches, or the first one where it chooses real images; none where it needs
    none.   -> models, records, statistics, each {backbone: ...}, data of `load_teachers`, fingerprints"""
    matched, first, nothing = args.method not in UNMATCHED, args.backbones[0], ({}, {}, {}, None, {})
    optional = args.method == "dm" and args.init in ("noise", "real")
    if args.method == "random" or optional and not (folder / f"{first}.pt").exists():
        return nothing
    asked = argparse.Namespace(**vars(args) | {"backbones": args.backbones if matched else [first]})
    models, records, data = load_teachers(asked, folder, build_model, device)
    if optional and "kept" not in records[first]:
        return nothing                                               # it would change nothing
    if not matched:
        return models, records, {}, data, {"first backbone": fingerprints(records)["weights"]}
    if args.subset > len(models):
        fail(f"--subset {args.subset} is more than the {len(models)} --backbones; use at most that many")
    statistics = load_statistics(args, folder, models, records)
    stored = {name: stored.get("fingerprint") for name, stored in statistics.items()}
    return models, records, statistics, data, fingerprints(records) | {"statistics": stored}


def warn_and_freeze(args, models, records, num_classes):
    """The models as `synthesise` takes them, after a word on those that match little."""
    unmatched = [name for name, model in models.items()
                 if not any(layer_weights(model, args.bn_weight, args.conv_weight, 1).values())]
    warn_of_backbones(records, num_classes, unmatched if args.bn_weight or args.conv_weight else ())
    return models if args.statistics == "plain" else {name: freeze(model) for name, model in models.items()}


def main(argv=None):
    args = parse_args(get_parser(), "recover", argv)
    device, paths = begin(args)
    check_flags(args, device)
    models, records, statistics, data, inputs = load_backbones(args, paths.teachers, device)
    run, selects = Run("recover", args, paths.run / "result.json", inputs), args.method in SELECTIONS
    if run.finished():
        return None
    seen, chosen, starts = {}, [], {}
    if args.method in UNMATCHED or args.init != "noise":
        data = data or describe(args.dataset, args.data_dir, args.image_size, args.workers,
                                args.data_set["fingerprint"])
        split, members, seen = training_images(args, paths, data, records)
        first = next(iter(models)) if models else None
        by = dict(first=(first, models.get(first), records.get(first)), data=data, seed=args.seed,
                  device=device)
        if selects:
            chosen = select(args.method, args.ipc, members, split, **by)
        elif args.init != "noise":
            starts = real_starts(args.init, args.ipc, members, split, tiles=args.mosaic ** 2, **by)
    classes = data["classes"]
    with run.work(seen, [*paths.images.glob("*/*.png"), *paths.run.glob("log*.jsonl")]):
        recorder = Recorder(run, paths.run, data, args.ipc, log=not selects)
        if args.method not in UNMATCHED:
            models = warn_and_freeze(args, models, records, len(classes))
            synthesise(args, run, recorder, models, statistics, data, starts, device)
        elif rank() == 0 and selects:
            run.start(len(classes), "classes")
            for label, name in enumerate(classes):
                recorder.write_real(label, split.read(chosen[label]))
                run.step(name, dict)                                 # no state: choosing again is quick
        elif rank() == 0:
            match_features(args, run, recorder, split, members, data, starts, device)
        if rank() == 0:
            recorder.grid.save()
            files = [image_path(Path(), data, label, index).as_posix()
                     for label in range(len(classes)) for index in range(args.ipc)]
            metrics = {"images": len(files), "classes": classes, "image_set": image_set(paths.images, files)}
            if records:
                metrics["teacher_top1"] = {name: record["top1"] for name, record in records.items()}
            upstream = {phase: {name: one.get("args") for name, one in files.items()}
                        for phase, files in (("squeeze", records), ("collect_stats", statistics)) if files}
            return run.finish(metrics, f"{len(files)} images of {len(classes)} classes", upstream)


if __name__ == "__main__":
    script(main)
