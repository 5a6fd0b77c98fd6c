"""Recover: synthesise the distilled images (phase 3 of 5).   G-VBSM, arXiv:2311.17950, Eq. 2, 5-7, 10.

Only the pixels are optimised; they start as noise (or --init). An iteration augments the batch, draws one
backbone (Eq. 7), and takes an Adam step on   CE + w (L'_BN + L'_Conv) + L_DD   (App. A; Eq. 2: CE + L_BN).
sre2l, cda, scdd and teddy are other settings of this. dm and bilp match mean features of training images in
random networks (utils/dm.py); random, herding, kcenter, forgetting write real images (utils/selection.py).

reads   data/<dataset>/...                                      training images: --init, selections, dm, bilp
        runs/<dataset>/teachers/<teachers>/<backbone>.pt        squeeze.py; dm can do without
        runs/<dataset>/teachers/<teachers>/<backbone>.stats.pt  collect_stats.py
writes  runs/<dataset>/<run>/images/<class>/<id>.png            an ImageFolder
        runs/<dataset>/<run>/grid.png, result.json; log.jsonl where images are optimised

python recover.py --dataset cifar100 --ipc 10                              # paper setting, Table 9
python recover.py --dataset cifar100 --ipc 10 --drop-rate 0 --tag nodrop   # ablation, as in Fig. 6
python recover.py --dataset shapes                                         # smoke run: a minute, no download
"""
import argparse
import math
from collections.abc import Callable, Iterable, Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from utils import fail, one_of
from utils.augment import apply_view, draw_view, pixel_bounds
from utils.cli import identity_flags, parse_args
from utils.data import describe
from utils.dm import run_dm
from utils.losses import class_members, data_densification, densification_closed_form
from utils.parser import Parser, crop_name, number
from utils.passes import graphed, make_passes
from utils.presets import SELECTIONS, UNMATCHED
from utils.processes import barrier, rank, shard
from utils.recorder import Recorder
from utils.run import Run, begin, generator, script, send
from utils.selection import real_images
from utils.teachers import load_backbones, make_matchers, warn_of_backbones, warn_of_unmatched


def make_batches(num_classes: int, ipc: int, batch_size: int, loop: str) -> list[list[tuple[int, int]]]:
    """Fig. 4.   -> batches of (class, index)
    reorder (G-VBSM): whole classes, batch_size // ipc of them (a larger one is split), so that densification
    sees several images of one class; original (SRe2L): at most one image of each class."""
    one_of("loop", loop, "reorder", "original")
    if loop == "original":
        rows = [[(label, index) for label in range(num_classes)] for index in range(ipc)]
    else:
        classes = max(1, batch_size // ipc)
        rows = [[(label, index) for label in range(first, min(first + classes, num_classes))
                 for index in range(ipc)] for first in range(0, num_classes, classes)]
    return [row[start:start + batch_size] for row in rows for start in range(0, len(row), batch_size)]


def noise(label: int, index: int, size: int, seed: int) -> Tensor:
    """N(0, 1) in normalised units, a function of (seed, class, index) alone.   -> [3, S, S]"""
    return torch.randn(3, size, size, generator=generator("noise", seed, label, index))


def first_images(batches: list[list[tuple]], starts: dict[tuple, Tensor], size: int, seed: int) -> Tensor:
    """What batches of (class, index) begin with: starts [3, S, S], or noise if {}.   -> [G, B, 3, S, S]"""
    return torch.stack([torch.stack([starts[key] if starts else noise(*key, size, seed) for key in batch])
                        for batch in batches])


def draw_iterations(iterations: int, matchers: list, image_size: int, *, seed: int,
                    batches: Iterable[int] = (0,), choice: str = "uniform", subset: int = 0, slot: int = 0,
                    drop_rate: float = 0.4, crop: str = "resized", flip: bool = False,
                    roll: int = 0) -> list[dict]:
    """What is random in a run of T iterations: a function of seed, T and the matchers, views also of a
    batch's number in `batches`. Batches have the same backbones and dropped layers: they can share a pass.
    choice: uniform, Eq. 7, or cycle; subset (Teddy): so many backbones act in every iteration, drawn by
    (seed, slot), by one chance to drop; drop_rate: beta_dr, of convolutions; crop, flip, roll: `draw_view`'s
    -> T dicts: size; backbones, a tuple of numbers; kept, {number: bool [layers of matcher.targets], false
    where a convolution is dropped}; view, tensors [batches, ...], one view for a whole batch"""
    T, K, rng = iterations, len(matchers), generator("iterations", seed, iterations)
    one_of("choice", choice, "uniform", "cycle")
    if subset > K:
        raise ValueError(f"a subset of {subset} is more than the {K} matchers")
    uniform = torch.randint(K, (T,), generator=rng)      # Eq. 7; cycle draws it too, to drop the same layers
    backbones = [(k,) for k in (uniform if choice == "uniform" else torch.arange(T) % K).tolist()]
    if subset:                                                       # Teddy: the same in each iteration
        drawn = torch.randperm(K, generator=generator("subset", seed, slot))[:subset]
        backbones = T * [tuple(sorted(drawn.tolist()))]
    chance = torch.rand(T, max(len(matcher.targets) for matcher in matchers), generator=rng)
    kept = []
    for matcher in matchers:
        is_bn = torch.tensor([len(target) == 2 for target in matcher.targets.values()], dtype=torch.bool)
        kept.append((chance[:, :len(is_bn)] >= drop_rate) | is_bn)
    views = [draw_view(T, image_size, crop, flip, roll, generator("views", seed, T, batch))
             for batch in batches]
    views = {key: torch.stack([view[key] for view in views], dim=1) for key in views[0]}
    return [{"size": image_size, "backbones": backbones[t], "kept": {k: kept[k][t] for k in backbones[t]},
             "view": {key: rows[t] for key, rows in views.items()}} for t in range(T)]


def apply_views(pixels: Tensor, view: dict[str, Tensor]) -> Tensor:
    """Each batch's one view of its B images, as 3B channels.   [G, B, 3, S, S] -> [G*B, 3, S, S]"""
    return apply_view(pixels.flatten(1, 2), view).view(-1, *pixels.shape[2:])


def matching_gradient(matcher, labels: Tensor, ce_weight: float, pixels: Tensor, view: dict[str, Tensor],
                      kept: Tensor, state, dropped: Iterable[str] = ()) -> tuple:
    """Gradient of ce_weight CE + L'_BN + L'_Conv, weighted by the matcher, at pixels [G, B, 3, S, S] under a
    view of each batch. kept: bool [layers], those that count; dropped: names of the others, which get no
    hook (a CUDA graph hooks all and goes by kept); state: moving averages of Eq. 6, Eq. 10.
    -> gradient, losses (classification, BatchNorm, convolutions) summed over batches, new state"""
    pixels = pixels.detach().requires_grad_()
    views = apply_views(pixels, view)
    with matcher.hooks(dropped) as inputs:
        logits = matcher.model(views)
    # closed form: bn and conv are values; the backward pass of ce adds their gradient at the layers' inputs,
    # so weigh them in `layer_weights`, not here. --statistics plain: they have a graph
    bn, conv, state = matcher.inject(inputs, state, kept)
    ce = ce_weight * F.cross_entropy(logits, labels.flatten(), reduction="sum") / labels.shape[1]
    gradient, = torch.autograd.grad(ce + bn + conv, pixels)
    return gradient, (ce.detach(), bn.detach(), conv.detach()), state


def recover_batch(images: Tensor, labels: Tensor, matchers: list, draws: list[dict], *, bounds: Iterable,
                  lr: float = 0.05, weight_decay: float = 0.0, ce_weight: float = 1.0, dd_weight: float = 1.0,
                  tau: float = 4.0, dd_scale: str = "sum", dd_on: str = "pixels", dd_autograd: bool = False,
                  unit_gradients: bool = False, averages: list | None = None,
                  gradient: Callable = matching_gradient, resume: dict | None = None) -> Iterator[tuple]:
    """Minimise CE (Eq. 2) + L'_BN (Eq. 6) + L'_Conv (Eq. 10) + L_DD (Eq. 5) by Adam, lr a cosine to 0.
    images [G, B, 3, S, S], normalised, changed in place: G batches ("groups"), each as if alone; labels
    [G, B]; matchers: `ClosedFormMatching` or `Matching` of each backbone; draws: of `draw_iterations`;
    bounds: low, high [3, 1, 1] of valid pixels. dd_on: pixels, or the view the backbones see
    (DEVIATION(paper), Eq. 4: X~ is the augmented batch); unit_gradients: scale each backbone's gradient of a
    batch to norm 1; averages: those of another state(), by default new (DEVIATION(paper), Eq. 6: not those of
    all past batches); gradient: as `matching_gradient`; resume: a state(). ValueError: misfit shapes.
    Yields after every Adam step: t, the weighted losses {ce, bn, conv, dd, gradient: its norm without dd},
    summed over batches and backbones, and state, a function that gives what to resume from."""
    if labels.dim() != 2 or images.dim() != 5 or images.shape[:2] != labels.shape:
        raise ValueError(f"images of shape {(*images.shape,)}, labels of shape {(*labels.shape,)}: expected "
                         "[groups, batch, 3, size, size], [groups, batch]; [None] makes one group of a batch")
    G, S, device = len(labels), images.shape[-1], images.device
    one_of("dd_on", dd_on, "pixels", "view")
    if any(draw["size"] != S or any(len(rows) != G for rows in draw["view"].values()) for draw in draws[:1]):
        raise ValueError(f"draws are of other groups or sizes; give draw_iterations {S}, batches=range({G})")
    shifts = (labels.max() + 1) * torch.arange(G, device=device)[:, None]      # L_DD of each batch alone
    members = class_members((labels + shifts).flatten())
    pixels = images.detach().requires_grad_()                        # in the memory of images
    optimizer = torch.optim.Adam([pixels], lr, (0.5, 0.9), weight_decay=weight_decay, fused=pixels.is_cuda)
    first, averages = 0, list(send(averages or [matcher.start(G) for matcher in matchers], device))
    if resume:
        first, averages = resume["iterations"], list(send(resume["averages"], device))
        pixels.data.copy_(resume["pixels"])
        optimizer.load_state_dict(resume["adam"])

    def state():
        return {"iterations": t + 1, "pixels": pixels.detach(), "adam": optimizer.state_dict(),
                "averages": averages}

    for t in range(first, len(draws)):
        optimizer.param_groups[0]["lr"] = lr * (1 + math.cos(math.pi * t / len(draws))) / 2
        view, total = send(draws[t]["view"], device), None
        for k in draws[t]["backbones"]:                              # Eq. 7: one; Teddy: a subset
            kept = draws[t]["kept"][k]
            dropped = [name for name, keep in zip(matchers[k].targets, kept.tolist()) if not keep]
            pixel_grad, losses, averages[k] = gradient(matchers[k], labels, ce_weight, pixels, view,
                                                       send(kept, device), averages[k], dropped)
            norms = torch.linalg.vector_norm(pixel_grad, dim=(1, 2, 3, 4), keepdim=True)     # of each batch
            if unit_gradients:
                pixel_grad = pixel_grad / norms.clamp(min=1e-12)
            terms = pixel_grad, *losses, norms.sum()
            total = terms if total is None else tuple(map(torch.add, total, terms))
        pixels.grad, ce, bn, conv, norm = total
        dd = pixels.new_zeros(())
        if dd_weight and members:                                                            # Eq. 5
            densified = pixels if dd_on == "pixels" else apply_views(pixels, view).view(pixels.shape)
            dd = dd_weight * (sum(data_densification(x, y, tau, dd_scale) for x, y in zip(densified, labels))
                              if dd_autograd else
                              densification_closed_form(densified.flatten(0, 1), members, tau, dd_scale))
            dd.backward()                                            # adds to the gradient
        optimizer.step()
        with torch.no_grad():
            pixels.clamp_(*bounds)
        yield t, {"ce": ce, "bn": bn, "conv": conv, "dd": dd.detach(), "gradient": norm}, state


def synthesise(args: argparse.Namespace, run: Run, recorder: Recorder, models: dict[str, nn.Module],
               statistics: dict[str, dict], starts: dict[tuple, Tensor], device: torch.device) -> None:
    """Optimise all images by `recover_batch`; torchrun's processes share batches, not with --ema-carry."""
    data, size = recorder.data, recorder.data["image_size"]
    moved = args.ipc - int(args.stay * args.ipc + 1e-9)              # images of each class, the first ones
    batches = make_batches(len(data["classes"]), moved, args.batch_size, args.loop)
    # Teddy: batches of one slot share a pass and backbones; slot: index of an image, or number of the batch
    slots = [(batch[0][1] if args.loop == "original" else i) if args.subset else 0
             for i, batch in enumerate(batches)]
    match = partial(make_matchers, models, statistics, plain=args.statistics == "plain", alpha=args.alpha,
                    class_statistics=args.class_statistics, bn_weight=args.bn_weight,
                    conv_weight=args.conv_weight, first_multiplier=args.first_multiplier)
    passes = make_passes(run.checkpoint, 1 if args.ema_carry else args.groups_per_step,
                         [(len(batch), slot) for batch, slot in zip(batches, slots)],
                         matching_gradient, match, size, device)
    todo = [numbers for numbers in passes if not recorder.load_existing([batches[i] for i in numbers])]
    barrier()                                                        # none writes until all have looked
    todo = shard(todo) if not args.ema_carry else todo if rank() == 0 else []    # carried: by one process
    recorder.keep({key: image for key, image in starts.items() if key[1] >= moved})
    run.start(args.iterations * sum(map(len, todo)), "iterations")
    for numbers in todo:
        together = [batches[i] for i in numbers]
        images = first_images(together, starts, size, args.seed).to(device)
        labels = torch.tensor([[label for label, _ in batch] for batch in together], device=device)
        matchers = match(labels)
        draws = draw_iterations(args.iterations, matchers, size, seed=args.seed, batches=numbers,
                                choice=args.choice, subset=args.subset, slot=slots[numbers[0]],
                                drop_rate=args.drop_rate, crop=args.crop, flip=args.flip, roll=args.roll)
        names = ["+".join(list(models)[k] for k in draw["backbones"]) for draw in draws]
        resume, state = recorder.begin(numbers, together, args.iterations, names), None
        for t, losses, state in recover_batch(
                images, labels, matchers, draws, bounds=send(pixel_bounds(data["mean"], data["std"]), device),
                lr=args.lr, weight_decay=args.weight_decay, dd_weight=args.dd_weight, dd_scale=args.dd_scale,
                dd_on=args.dd_on, dd_autograd=args.statistics == "plain", unit_gradients=args.unit_gradients,
                averages=run.checkpoint.read(f"averages{numbers[0] - 1}") if args.ema_carry else None,
                gradient=graphed(matching_gradient) if args.cuda_graphs else matching_gradient,
                resume=resume):
            recorder.step(t, losses, images, state)
        if args.ema_carry:
            run.checkpoint.save((state() if state else resume)["averages"], f"averages{numbers[0]}")
            run.checkpoint.drop(f"averages{numbers[0] - 2}")
        recorder.write(images)


def get_parser():    # its defaults hold where utils/presets.py has none
    parser = identity_flags(Parser(__doc__))
    share, weight, count = number(float, 0, 1), number(float, 0), number(int, 0)
    switch = dict(action=argparse.BooleanOptionalAction, default=False)
    add = parser.add_argument_group("method").add_argument
    add("--alpha", type=share, default=0.8, help="weight of the past in batch statistics, 0 = off [alpha]")
    add("--ema-carry", **switch, help="carry the averages of Eq. 6 from batch to batch, one after another")
    add("--drop-rate", type=share, default=0.4, help="chance to skip a convolution's statistics [beta_dr]")
    add("--bn-weight", type=weight, default=0.01, help="of BatchNorm statistics, 0 = off [L'_BN]")
    add("--conv-weight", type=weight, default=0.01, help="of convolution statistics, 0 = off [L'_Conv]")
    add("--first-multiplier", type=weight, default=10.0, help="of the first layer's statistics, 1 = off")
    add("--dd-weight", type=weight, default=1.0, help="of data densification, 0 = off [L_DD]")
    add("--dd-scale", choices=["sum", "mean"], default="sum", help="of Eq. 5's matrix; mean: over pixels")
    add("--dd-on", choices=["pixels", "view"], default="pixels", help="input of Eq. 4; view: augmented")
    add("--loop", choices=["reorder", "original"], default="reorder", help="grouping of images, Fig. 4")
    add("--choice", choices=["uniform", "cycle"], default="uniform", help="of an iteration's backbone, Eq. 7")
    add("--unit-gradients", **switch, help="scale each backbone's gradient of a batch to norm 1, before L_DD")
    add("--subset", type=count, default=0, help="backbones that act together [|S_i|, Teddy]; 0 = one, Eq. 7")
    add("--class-statistics", **switch, help="targets: those of the classes in a batch, mixed [Teddy]")
    add("--statistics", choices=["closed", "plain"], default="closed", help="plain: by autograd")
    add("--adaptive-ratio", type=number(float, 0, 0.9), default=0.0, help="dm, bilp: share of real ones cut")
    add("--adaptive-period", type=number(int, 1), default=10, help="iterations from cut to cut")
    add = parser.add_argument_group("start and augmentation of the images").add_argument
    add("--init", choices=["noise", "real", "herding", "kcenter", "crops"], default="noise",
        help="noise; training images, random or chosen by the first backbone; or their crops of lowest loss")
    add("--stay", type=number(float, 0, 0.9), default=0.0, help="share that stays as it starts, rounded down")
    add("--mosaic", type=number(int, 1, 8), default=1, help="tiles a side of a start, 1 = off [RDED]")
    add("--crop", type=lambda name: name if name in ("linear", "cosine") else crop_name(name),
        default="resized", help="none, resized, pad<pixels>; linear, cosine: resized, ever smaller [CDA]")
    add("--flip", **switch, help="augmentation: horizontal flips")
    add("--roll", type=count, default=0, help="augmentation: circular shift of up to so many pixels, 0 = off")
    add = parser.add_argument_group("optimization").add_argument
    add("--iterations", type=number(int, 1), default=4000, help="Adam steps for each batch; SGD steps of dm")
    add("--batch-size", type=number(int, 1), default=50,
        help="images optimised together; of dm and bilp: real images of a class in an iteration")
    add("--lr", type=weight, default=0.05, help="Adam learning rate, cosine to 0; of dm constant")
    add("--weight-decay", type=weight, default=0.0, help="of Adam, 0 = off")
    add("--groups-per-step", type=number(int, 1, word="auto"), default="auto",
        help="batches in one pass, auto: as many as fill a GPU; the same up to rounding")
    add("--cuda-graphs", **switch, help="replay a pass as one launch; for GPUs that wait for the host")
    return parser


def main(argv=None):
    args = parse_args(get_parser(), "recover", argv)
    device, paths = begin(args)
    if args.cuda_graphs and (args.statistics == "plain" or device.type != "cuda"):
        fail("--cuda-graphs needs a GPU (--device cuda) and --statistics closed; leave it out")
    models, records, statistics, data, inputs = load_backbones(args, paths.teachers, device)
    run = Run("recover", args, paths.run / "result.json", inputs)
    if run.finished():
        return None
    data = data or describe(args.dataset, args.data_dir, args.image_size, args.workers,
                            args.data_set["fingerprint"])
    real = real_images(args, paths, data, models, records, device)
    with run.work(real.fingerprint, [*paths.images.glob("*/*.png"), *paths.run.glob("log*.jsonl")]):
        recorder = Recorder(run, data, log=args.method not in SELECTIONS)
        if args.method not in UNMATCHED:
            warn_of_unmatched(models, args.bn_weight, args.conv_weight)
            warn_of_backbones(records, len(data["classes"]))
            synthesise(args, run, recorder, models, statistics, real.starts, device)
        elif rank() == 0 and args.method in SELECTIONS:
            recorder.copy(real.split, real.chosen)
        elif rank() == 0:                                            # dm and bilp
            by_class = make_batches(len(data["classes"]), args.ipc, args.ipc, "reorder")
            images = first_images(by_class, real.starts, data["image_size"], args.seed).to(device)
            run_dm(recorder, real, by_class, images, iterations=args.iterations, seed=args.seed, lr=args.lr,
                   real_batch=args.batch_size, ratio=args.adaptive_ratio, period=args.adaptive_period)
        return recorder.finish(records, statistics)


if __name__ == "__main__":
    script(main)
