"""Recover: synthesise the distilled images (phase 3 of 5).   G-VBSM, arXiv:2311.17950, Sec. 3, Eqs. 2, 5-7, 10.

Pixels start as noise and are all that is optimised. An iteration augments the batch, draws one backbone (Eq. 7), and takes
an Adam step on   CE + w (L'_BN + L'_Conv) + L_DD   (Table 9; in Eq. 2 CE and L_BN alone).
--method sre2l, cda, scdd and teddy are other settings of the same; random, herding, kcenter and forgetting write real
training images into the same layout instead. dm matches the mean features of the training images in random networks
(arXiv:2110.04181), and bilp prunes these images (arXiv:2305.18381).

reads   data/<dataset>/...                                            the training images: --init, selections, dm, bilp
        runs/<dataset>/teachers/<teachers>/<backbone>.pt              squeeze.py
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
from contextlib import suppress
from functools import partial, reduce
from itertools import groupby
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torchvision.utils import save_image

from models import build_model
from utils import fail
from utils.augment import (apply_resized_crop, apply_siamese, apply_view, draw_resized_crop, draw_siamese, draw_view, normalize,
                           to_uint8)
from utils.checkpoint import load_torch, whole_file, writable
from utils.cli import Parser, crop_name, identity_flags, number, number_or_auto, parse_args
from utils.data import describe, folder_name, load_split, read_images
from utils.dm import dm_loss, ite_norms, new_pruning, prune
from utils.losses import class_members, data_densification, densification_closed_form, sds_match
from utils.presets import SELECTIONS, UNMATCHED
from utils.processes import barrier, rank, shard, warn, world_size
from utils.provenance import check_classes, check_trained, fingerprint, fingerprints, image_set, relevant
from utils.run import Progress, Run, begin, generator, script, send
from utils.selection import herding, k_center, mosaic, most_forgotten, surest_crops
from utils.stats import (ClosedFormMatching, channel_stats, freeze, layer_inputs, layer_target, matched_layers, mixed_moments,
                         patch_stats)
from utils.teachers import at_chance, load_teachers, need_files
from utils.train import Graphed, NonFinite


FILLING = 1 << 22       # pixels in a pass that leave no GPU idle, so 81 batches of 50 at 32x32; an estimate


def make_batches(num_classes, ipc, batch_size, loop):
    """Fig. 4.   -> list of batches, each a list of (class, index)

    reorder (G-VBSM): as many images a class as fit, so that densification sees several images of one class;
    original (SRe2L): at most one image of each class.
    """
    if loop == "original":
        rows = [[(label, index) for label in range(num_classes)] for index in range(ipc)]
    elif ipc > batch_size:
        rows = [[(label, index) for index in range(ipc)] for label in range(num_classes)]
    else:                                                            # whole classes
        together = batch_size // ipc
        rows = [[(label, index) for label in range(first, min(first + together, num_classes)) for index in range(ipc)]
                for first in range(0, num_classes, together)]
    return [row[start:start + batch_size] for row in rows for start in range(0, len(row), batch_size)]


def layer_weights(model, bn_weight, conv_weight, first_multiplier):
    """{layer name: weight of its statistics}; the first layer that is matched counts first_multiplier times: a convolution,
    whose input is the image, as in the release, or without convolutions the first BatchNorm, as in SRe2L."""
    weights = {name: bn_weight if isinstance(layer, nn.BatchNorm2d) else conv_weight
               for name, layer in matched_layers(model).items()}
    if first := [name for name, weight in weights.items() if weight][:1]:
        weights[first[0]] *= first_multiplier
    return weights


class PlainMatching:
    """Eqs. 6 and 10 as they are written, through autograd; the same calls as `ClosedFormMatching`."""

    def __init__(self, model, targets, weights, alpha, patch):
        self.model, self.weights, self.alpha, self.patch = model, weights, alpha, patch
        self.targets = {name: layer_target(layer, targets.get(name))
                        for name, layer in matched_layers(model).items() if weights[name]}

    def start(self, groups):
        return {"groups": groups}

    def hooks(self, dropped=()):
        return layer_inputs(self.model, self.targets.keys() - set(dropped))

    def inject(self, inputs, state, kept=None):
        groups, state = state["groups"], dict(state)
        bn = conv = next(self.model.parameters()).new_zeros(())
        for name, x in inputs.items():
            current = channel_stats(x, groups)
            is_conv = len(self.targets[name]) == 4
            if is_conv:
                current += patch_stats(x, self.patch, groups)
            loss = 0
            for kind, (value, target) in enumerate(zip(current, self.targets[name])):
                term, state[name, kind] = sds_match(value, target, state.get((name, kind)), self.alpha)
                loss = loss + self.weights[name] * term
            bn, conv = (bn, conv + loss) if is_conv else (bn + loss, conv)
        return bn, conv, state


def crop_floor(curriculum, iterations, floor=0.08):
    """The smallest share of the area that a crop of each iteration t of T takes: `floor`, or with CDA's curriculum (its
    Sec. 3.2) from 1 down to it by (1 - t / T), linear, or (1 + cos(pi t / T)) / 2, cosine.   -> number, or [T, 1]"""
    if curriculum == "none":
        return floor
    done = torch.arange(iterations)[:, None] / iterations
    return floor + (1 - floor) * ((1 + torch.cos(math.pi * done)) / 2 if curriculum == "cosine" else 1 - done)


def subset(args, count, slot):
    """Teddy: which --subset of `count` backbones all act on the images of a slot, a function of (seed, slot)."""
    return tuple(sorted(torch.randperm(count, generator=generator("subset", args.seed, slot))[:args.subset].tolist()))


def draw_iterations(args, matchings, numbers, size, slot=0):
    """What is random in the T iterations: a function of (seed, T), a batch's views of its number too.
    -> backbones, T tuples; kept, of each backbone bool [T, layers], false where a convolution is dropped; views, tensors
    [T, batches, ...], one view for a whole batch"""
    draw, T = generator("iterations", args.seed, args.iterations), args.iterations
    uniform = torch.randint(len(matchings), (T,), generator=draw)                                           # Eq. 7
    backbones = [(k,) for k in (uniform if args.choice == "uniform" else torch.arange(T) % len(matchings)).tolist()]
    if args.subset:
        backbones = T * [subset(args, len(matchings), slot)]
    chance = torch.rand(T, max(len(matching.targets) for matching in matchings), generator=draw)
    kept = []
    for matching in matchings:
        is_bn = torch.tensor([len(target) == 2 for target in matching.targets.values()], dtype=torch.bool)
        kept.append((chance[:, :len(is_bn)] >= args.drop_rate) | is_bn)
    views = [draw_view(T, size, args.crop, args.flip, args.roll, generator("views", args.seed, T, number),
                       crop_floor(args.crop_curriculum, T, args.crop_floor)) for number in numbers]
    return backbones, kept, {key: torch.stack([view[key] for view in views], dim=1) for key in views[0]}


def matching_gradient(matching, labels, ce_weight, pixels, view, kept, state, dropped=()):
    """Eq. 2 without densification, for pixels [G, B, 3, S, S] under a view of each batch.
    -> gradient at the pixels, losses (classification, BatchNorm, convolutions), state"""
    G, B = labels.shape
    pixels = pixels.detach().requires_grad_()
    images = apply_view(pixels.flatten(1, 2), view).view(G * B, *pixels.shape[2:])
    with matching.hooks(dropped) as inputs:
        logits = matching.model(images)
    bn, conv, state = matching.inject(inputs, state, kept)           # closed form: without a graph, their gradient comes
    ce = ce_weight * F.cross_entropy(logits, labels.flatten(), reduction="sum") / B             # in at the layers' inputs
    gradient, = torch.autograd.grad(ce + bn + conv, pixels)
    return gradient, (ce.detach(), bn.detach(), conv.detach()), state


def graphed_gradient(matching, labels, ce_weight, keys, pool):
    """`matching_gradient` from its fourth argument on, replayed as a CUDA graph; layers are dropped by `kept` alone.
    keys: those of its view."""
    def flat(pixels, kept, ema, seen, *view):
        view = dict(zip(keys, view))
        gradient, losses, state = matching_gradient(matching, labels, ce_weight, pixels, view, kept, (ema, seen))
        return gradient, *losses, *state

    def gradient(pixels, view, kept, state, dropped):
        gradient, ce, bn, conv, *state = graph(pixels.detach(), kept, *state, *view.values())
        return gradient, (ce, bn, conv), state

    graph = Graphed(flat, pool)
    return gradient


def fitting_groups(matchings, batch_size, image_size, device):
    """--groups-per-step auto: 1 on a CPU, which has no use for more; on a GPU as many batches as fill it and fit."""
    if device.type != "cuda":
        return 1
    pixels, needed = torch.zeros(1, batch_size, 3, image_size, image_size, device=device), 0
    labels = torch.zeros(1, batch_size, dtype=torch.long, device=device)
    for matching in matchings:
        kept = torch.ones(len(matching.targets), dtype=torch.bool, device=device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        matching_gradient(matching, labels, 1.0, pixels, {}, kept, matching.start(1))
        needed = max(needed, torch.cuda.max_memory_allocated(device) - before)
    torch.cuda.empty_cache()
    return max(1, min(int(0.8 * torch.cuda.mem_get_info(device)[0] / needed), FILLING // pixels[0, :, 0].numel()))


def recover_batches(pixels, labels, numbers, matchings, data, args, report=lambda *_: None, start=None,
                    keep=lambda state: None, slot=0):
    """Optimise the images of G batches at once; they move as if each batch were alone, up to rounding.

    pixels [G, B, 3, S, S] in normalised units, changed in place; labels [G, B]; numbers: the batches' numbers, on which
    their augmentation depends; slot: theirs; matchings: one for each backbone, with its model. report(iteration, losses, pixels).
    keep: takes, after every iteration, a function that gives the state; start: a state to go on from.
    """
    G, device = len(labels), pixels.device
    low, high = ((torch.tensor([bound - m for m in data["mean"]]) / torch.tensor(data["std"])).to(pixels)[:, None, None]
                 for bound in (0, 1))
    members = class_members((labels + len(data["classes"]) * torch.arange(G, device=device)[:, None]).flatten())
    backbones, kept, views = draw_iterations(args, matchings, numbers, pixels.shape[-1], slot)
    dropped = [[[name for name, keep in zip(matching.targets, row) if not keep] for row in rows.tolist()]
               for matching, rows in zip(matchings, kept)]
    kept, views = [send(rows, device) for rows in kept], send(views, device)         # nothing more is sent on the way
    optimizer = torch.optim.Adam([pixels.requires_grad_()], lr=args.lr, betas=(0.5, 0.9), fused=pixels.is_cuda)
    states = [matching.start(G) for matching in matchings]           # the averages start anew with every image batch
    if start:
        pixels.data.copy_(start["pixels"])
        optimizer.load_state_dict(start["adam"])
        states = send(start["averages"], device)
    gradients = [partial(matching_gradient, matching, labels, args.ce_weight) for matching in matchings]
    if args.cuda_graphs:
        pool = torch.cuda.graph_pool_handle()
        gradients = [graphed_gradient(matching, labels, args.ce_weight, views, pool) for matching in matchings]
    for t in range(start["iterations"] if start else 0, args.iterations):
        optimizer.param_groups[0]["lr"] = args.lr * (1 + math.cos(math.pi * t / args.iterations)) / 2
        view = {key: rows[t] for key, rows in views.items()}
        terms = []
        for k in backbones[t]:
            gradient, losses, states[k] = gradients[k](pixels, view, kept[k][t], states[k], dropped[k][t])
            norms = torch.linalg.vector_norm(gradient, dim=(1, 2, 3, 4), keepdim=True)   # of each batch, as if it were alone
            if args.unit_gradients:
                gradient = gradient / norms.clamp(min=1e-12)
            terms.append((gradient, *losses, norms.sum()))
        pixels.grad, ce, bn, conv, norm = (reduce(torch.add, term) for term in zip(*terms))
        dd = pixels.new_zeros(())
        if args.dd_weight and args.statistics == "plain":
            dd = args.dd_weight * sum(data_densification(x, y, args.tau, args.dd_scale) for x, y in zip(pixels, labels))
        elif args.dd_weight and members:
            dd = args.dd_weight * densification_closed_form(pixels.flatten(0, 1), members, args.tau, args.dd_scale)
        if dd.requires_grad:
            dd.backward()                                            # adds to the gradient
        optimizer.step()
        with torch.no_grad():
            pixels.clamp_(low, high)
        report(t, {"backbone": backbones[t], "ce": ce, "bn": bn, "conv": conv, "dd": dd, "gradient": norm}, pixels)
        keep(lambda: {"iterations": t + 1, "pixels": pixels.detach(), "adam": optimizer.state_dict(), "averages": states})
    return pixels.detach()


def noise(label, index, size, seed):
    """The start of an image, N(0, 1) in normalised units, a function of (seed, class, index) alone.   -> [3, S, S]"""
    return torch.randn(3, size, size, generator=generator("noise", seed, label, index))


@torch.no_grad()
def real_starts(args, split, data, models, records, kept, device):
    """--init real, herding, kcenter: training images of each class, random or chosen; or crops (RDED, arXiv:2312.03526): of
    --init-images random ones the surest of --init-crops random square crops each, of these the surest.
    With --mosaic, of more images, smaller.   -> {(class, index): [3, S, S]}"""
    starts, model, count = {}, models[args.backbones[0]], args.ipc * args.mosaic ** 2
    selected = select(args.init, count, args, split, data, models, records, device) if args.init in SELECTIONS else None
    for label, name in enumerate(data["classes"]):
        members = class_images(count, args, split, label, name, kept)
        draw, looked_at = generator("init", args.seed, label), args.init_images if args.init == "crops" else count
        chosen = selected[label] if selected else members[torch.randperm(len(members), generator=draw)[:looked_at]]
        images = normalize(split.read(chosen).to(device), data["mean"], data["std"])
        if args.init == "crops":
            S, crops = data["image_size"], args.init_crops
            boxes = draw_resized_crop(len(images) * crops, S, draw, ratio=(1.0, 1.0)).view(len(images), crops, 4).to(device)
            losses = torch.stack([torch.cat([F.cross_entropy(model(views), labels, reduction="none") for views, labels in (
                (apply_resized_crop(part, box), torch.full((len(part),), label, device=device))
                for part, box in zip(images.split(100), boxes[:, i].split(100)))]) for i in range(crops)], dim=1)
            image, crop = surest_crops(losses, count)
            images = apply_resized_crop(images[image], boxes[image, crop])
        starts |= {(label, index): image for index, image in enumerate(mosaic(images, args.mosaic).cpu())}
    return starts


def class_images(count, args, split, label, name, kept):
    """The training images of a class that may be taken, at least `count`.   -> LongTensor"""
    members = kept[split.labels.cpu()[kept] == label]
    if len(members) < count:
        tiles = f" with --mosaic {args.mosaic} takes {count}, which" * (count > args.ipc)
        fail(f"--ipc {args.ipc}{tiles} is more than the {len(members)} training images of class {name}; use at most that many")
    return members


def image_path(folder, data, label, index):
    return folder / folder_name(data["classes"][label]) / f"{index:05d}.png"


def save_png(path, image):
    """image: uint8 [3, S, S]."""
    with whole_file(path) as temporary:
        Image.fromarray(image.permute(1, 2, 0).cpu().numpy()).save(temporary, format="png")


class Grid:
    """grid.png: a row for each of up to 20 classes with up to 10 of its images; grey where there is none yet."""

    def __init__(self, path, num_classes, ipc, size):
        self.path, self.columns = path, min(ipc, 10)
        self.rows = [i * num_classes // min(num_classes, 20) for i in range(min(num_classes, 20))]
        self.images = torch.full((len(self.rows), self.columns, 3, size, size), 0.5)

    def add(self, batch, images):
        """batch: list of (class, index), images uint8 [B, 3, S, S]."""
        for (label, index), image in zip(batch, images):
            if label in self.rows and index < self.columns:
                self.images[self.rows.index(label), index] = image.cpu().float() / 255

    def read(self, files):
        """The same, of {(class, index): file}."""
        for (label, index), file in files.items():
            if label in self.rows and index < self.columns:
                self.add([(label, index)], read_images([file], *2 * self.images.shape[-1:], workers=0))

    def save(self):
        if rank() == 0:
            with whole_file(self.path) as temporary:
                save_image(self.images.flatten(0, 1), temporary, nrow=self.columns, format="png")


class Log:
    """log.jsonl in the folder of a run: `first`, and a line for each entry, which has "batches" and "iteration"; none twice,
    whatever an earlier process wrote. Each process writes into a file of its own until they are merged."""

    def __init__(self, run, first):
        self.run, self.first, self.path = run, first, run / f"log{f'-{rank()}' if rank() else ''}.jsonl"
        self.written = self._entries("log*.jsonl")
        self._write_whole(self._entries(self.path.name))

    def write(self, entry):
        if (entry["batches"][0], entry["iteration"]) not in self.written:
            with writable(self.path), open(self.path, "a") as file:
                file.write(json.dumps(entry) + "\n")

    def merge(self):
        self._write_whole(self._entries("log*.jsonl"))
        for path in self.run.glob("log-*.jsonl"):
            path.unlink()

    def _entries(self, files):
        found = {}
        for path in self.run.glob(files):
            for line in path.read_text(errors="replace").splitlines():
                with suppress(ValueError, KeyError, TypeError, IndexError):              # `first`, or what was cut short
                    entry = json.loads(line)
                    found[entry["batches"][0], entry["iteration"]] = line
        return found

    def _write_whole(self, entries):
        with whole_file(self.path) as temporary:
            lines = [json.dumps(self.first), *(entries[key] for key in sorted(entries))]
            temporary.write_text("".join(f"{line}\n" for line in lines))


def synthesise(args, paths, device, models, statistics, data, starts, work):
    """Write all images; the processes of torchrun deal the batches among them.   starts: {(class, index): [3, S, S]}, or
    {} for noise"""
    if args.statistics == "closed":
        models = {name: freeze(model) for name, model in models.items()}
    log = Log(paths.run, {"args": relevant(args)})
    grid = Grid(paths.run / "grid.png", len(data["classes"]), args.ipc, data["image_size"])
    batches = make_batches(len(data["classes"]), args.ipc, args.batch_size, args.loop)
    if rank() == 0 and (work.read("groups") or {}).get("asked") != args.groups_per_step:
        work.save({"asked": args.groups_per_step, "groups": make_groups(batches, models, statistics, data, args, device)},
                  "groups")
    barrier()
    groups = [[(number, batches[number]) for number in numbers] for numbers in work.read("groups")["groups"]]
    files = [{one: image_path(paths.images, data, *one) for _, batch in group for one in batch} for group in groups]
    todo = [group for group, mine in zip(groups, files) if not all(file.exists() for file in mine.values())]
    for mine in files:
        grid.read({one: file for one, file in mine.items() if file.exists()})          # of an earlier process
    barrier()                                                   # until all have seen the same
    todo = shard(todo)
    progress = Progress("recover", args.iterations * sum(len(batch) for group in todo for _, batch in group))
    for group in todo:
        recover_group(group, models, statistics, data, starts, args, paths, device, grid, log, progress, work)
    barrier()
    if rank() == 0:
        log.merge()
        for mine in files if world_size() > 1 else ():                    # of the other processes
            grid.read(mine)
        grid.save()


def make_matchings(models, statistics, labels, args, device):
    """What each backbone's layers are matched to, for batches of labels [G, B]."""
    matchings = []
    for name, model in models.items():
        targets = statistics[name]["statistics"]
        if args.class_statistics:
            share = F.one_hot(labels, len(statistics[name]["classes"])).double().mean(1).cpu()
            targets = {layer: [moment.float() for pair in zip(*[iter(vectors)] * 2) for moment in mixed_moments(*pair, share)]
                       for layer, vectors in statistics[name]["class_statistics"].items()}
        targets = {layer: [vector.to(device) for vector in vectors] for layer, vectors in targets.items()}
        weights = layer_weights(model, args.bn_weight, args.conv_weight, args.first_multiplier)
        matching = PlainMatching if args.statistics == "plain" else ClosedFormMatching
        matchings.append(matching(model, targets, weights, args.alpha, statistics[name]["patch"]))
    return matchings


def slot_of(number, batch, args):
    """That of a batch, on which its --subset of backbones depends: the index of its images, or its number."""
    return batch[0][1] if args.loop == "original" else number


def make_groups(batches, models, statistics, data, args, device):
    """Numbers of the batches that share a pass, --groups-per-step of one size and subset of backbones.   -> list of lists"""
    groups = []

    def kind(number):
        slot = slot_of(number, batches[number], args)
        return len(batches[number]), args.subset and subset(args, len(models), slot)

    for (size, _), alike in groupby(range(len(batches)), key=kind):
        alike, together = list(alike), args.groups_per_step
        if together == "auto":
            matchings = make_matchings(models, statistics, torch.zeros(1, size, dtype=torch.long), args, device)
            together = min(fitting_groups(matchings, size, data["image_size"], device), math.ceil(len(alike) / world_size()))
        groups += [alike[first:first + together] for first in range(0, len(alike), together)]
    return groups


def recover_group(group, models, statistics, data, starts, args, paths, device, grid, log, progress, work):
    """Synthesise some batches, [(number, [(class, index)])], together; log, draw, keep and save them."""
    numbers, flat = [number for number, _ in group], [one for _, batch in group for one in batch]
    shape, piece = (len(group), -1, 3, data["image_size"], data["image_size"]), f"batch{numbers[0]}"
    pixels = [starts[one] if starts else noise(*one, data["image_size"], args.seed) for one in flat]
    pixels = torch.stack(pixels).view(shape).to(device)
    labels, slot = torch.tensor([label for label, _ in flat], device=device).view(len(group), -1), slot_of(*group[0], args)
    matchings = make_matchings(models, statistics, labels, args, device)
    nonfinite, start = NonFinite(["ce", "bn", "conv", "dd", "pixel"], device), work.read(piece)
    if start and start["numbers"] != numbers:                        # another --groups-per-step
        start = None
    progress.skip(len(flat) * start["iterations"] if start else 0)

    def named(backbones):
        return "+".join(list(models)[k] for k in backbones)

    def check():
        if found := nonfinite.first():
            t, term = found
            backbones = draw_iterations(args, matchings, numbers, data["image_size"], slot)[0][t]
            fail(f"{term} is not finite in iteration {t}, backbone {named(backbones)}, batches {numbers}; use a smaller --lr")

    def report(t, losses, pixels):
        backbone = named(losses.pop("backbone"))
        nonfinite.update(t, *(losses[term] for term in nonfinite.names[:-1]), pixels.detach().sum())
        last = t + 1 == args.iterations
        if t % args.log_every == 0 or last:
            check()
            log.write({"iteration": t, "batches": numbers, "backbone": backbone,
                       **{term: value.item() / len(group) for term, value in losses.items()}})
        if args.grid_every and t % args.grid_every == 0:
            grid.add(flat, to_uint8(pixels.flatten(0, 1), data["mean"], data["std"]))
            grid.save()
        progress.step(lambda: f"batches {numbers[0]}-{numbers[-1]}  ce {losses['ce'].item():.3f}", len(flat))

    def keep(state):
        def checked():
            check()
            return state() | {"numbers": numbers}
        work.save_if_due(checked, piece)

    images = recover_batches(pixels, labels, numbers, matchings, data, args, report, start, keep, slot).flatten(0, 1)
    images = to_uint8(images, data["mean"], data["std"])
    for one, image in zip(flat, images):
        save_png(image_path(paths.images, data, *one), image)
    work.drop(piece)
    grid.add(flat, images)
    grid.save()


def load_statistics(args, paths, models, records):
    """The files of Eq. 9, each checked to belong to its backbone's weights; none where only BatchNorms act.
    -> {backbone: file's dict, "fingerprint"}"""
    if not (args.conv_weight or args.class_statistics):
        return {name: {"statistics": {}, "patch": 4} for name in models}
    stored, single = {}, " --class-statistics" * args.class_statistics
    command = need_files(args, paths.teachers, ".stats.pt", f"collect_stats.py{single}")
    for name, model in models.items():
        path, again = paths.teachers / f"{name}.stats.pt", f"{command} --backbones {name} --overwrite"
        stored[name] = load_torch(path, again, ("statistics", "patch", "checkpoint", "classes", "args"))
        stored[name]["fingerprint"] = fingerprint(path)
        convolutions = {layer for layer, module in model.named_modules() if isinstance(module, nn.Conv2d)}
        check_classes(stored[name]["classes"], records[name]["data"]["classes"], path, f"{name}.pt")
        if stored[name]["checkpoint"] != records[name]["fingerprint"]:
            fail(f"{path} belongs to other weights than {name}.pt; {again}")
        if stored[name]["statistics"].keys() != convolutions:
            fail(f"{path} does not hold the convolutions of {name}; {again}")
        if stored[name]["patch"] != (patch := stored[args.backbones[0]]["patch"]):
            fail(f"{path} was collected with --patch {stored[name]['patch']}, {args.backbones[0]}'s with {patch}; {again}")
        if args.class_statistics and stored[name].get("class_statistics", {}).keys() != matched_layers(model).keys():
            fail(f"{path} holds no statistics of single classes; {again}")
    return stored


def warn_of_backbones(args, models, records, num_classes):
    """Say which backbones know nothing, within two standard errors of a guess, and which have nothing that is matched."""
    for name, record in records.items():
        if at_chance(record["top1"], num_classes, record["tested"]):
            warn(f"{name} is right on {record['top1']:.1f} % of the test images, no better than chance "
                 f"({100 / num_classes:.1f} %); train it longer with squeeze.py")
        if (args.bn_weight or args.conv_weight) and not any(layer_weights(
                models[name], args.bn_weight, args.conv_weight, 1).values()):
            warn(f"{name} has no BatchNorm, and --conv-weight is 0: its statistics are not matched")


def features(model, split, data, device):
    """What the last linear layer of a backbone is given for every training image.   -> [N, d]"""
    linear, found = [layer for layer in model.modules() if isinstance(layer, nn.Linear)], []
    hook = linear[-1].register_forward_pre_hook(lambda layer, inputs: found.append(inputs[0].float().cpu()))
    with torch.inference_mode():
        for images, _ in split.batches(500):
            model(normalize(send(images, device), data["mean"], data["std"]))
    hook.remove()
    return torch.cat(found)


def select(method, count, args, split, data, models, records, device):
    """Which training images of each class a method of SELECTIONS takes.   -> [LongTensor [count]]"""
    name = args.backbones[0]
    kept = records.get(name, {}).get("kept", torch.arange(len(split)))
    by_features = method in ("herding", "kcenter")
    if by_features and not any(isinstance(layer, nn.Linear) for layer in models[name].modules()):
        fail(f"--backbones {name}: {method} takes the input of a linear layer as features, and it has none; name another first")
    known = features(models[name], split, data, device) if by_features else None
    forgotten = records[name].get("forgetting") if method == "forgetting" else {}
    if forgotten is None:
        fail(f"--backbones {name}: squeeze.py counts what a backbone forgets, but not of pretrained and weak ones, nor with "
             "--objective moco; name another first")
    chosen = []
    for label, title in enumerate(data["classes"]):
        members = class_images(count, args, split, label, title, kept)
        chosen.append(members[
            torch.randperm(len(members), generator=generator("random", args.seed, label))[:count] if method == "random" else
            herding(known[members], count) if method == "herding" else
            k_center(known[members], count) if method == "kcenter" else
            most_forgotten(forgotten["events"][members], forgotten["learned"][members], count)])
    return chosen


def write_selection(args, paths, data, split, chosen, work):
    grid = Grid(paths.run / "grid.png", len(data["classes"]), args.ipc, data["image_size"])
    progress = Progress("recover", len(data["classes"]))
    for label, name in enumerate(data["classes"]):
        images = split.read(chosen[label])
        for index, image in enumerate(images):
            save_png(image_path(paths.images, data, label, index), image)
        grid.add([(label, index) for index in range(args.ipc)], images)
        progress.step(name)
        work.save_if_due(dict)                                              # nothing: choosing again is quick
    grid.save()


def random_embedding(data, key, device):
    """A ConvNet as deep as is usual at this image size, random weights of `generator(*key)`: images -> its last features."""
    size = data["image_size"]
    with torch.random.fork_rng(devices=[]):                          # build_model draws from torch's global generator
        torch.default_generator.manual_seed(int(torch.randint(1 << 62, (), generator=generator(*key))))
        model = build_model(f"convnet_w128_d{max(3, math.ceil(math.log2(size)) - 2)}", len(data["classes"]), size)
    layers = [nn.AvgPool2d(2) if isinstance(layer, nn.AvgPool2d) else layer for layer in list(model.children())[:-1]]
    return nn.Sequential(*layers).requires_grad_(False).to(device)   # not `Halve`, whose second derivative takes a CPU long


def match_distributions(pixels, split, kept, data, args, report=lambda *_: None, start=None, keep=lambda state: None):
    """Optimise the images of all classes by DM.   pixels [classes, ipc, 3, S, S] in normalised units, changed in place and,
    as in the original, not clamped; kept [n]: the real images, of the split; report(iteration, loss, share of real images
    kept, pixels); keep, start as in `recover_batches`. An iteration's network is a function of (seed, iteration), a class's
    real images and augmentation of the class too. Every --adaptive-period iterations the real images are drawn from all,
    scored, and those that fall out are left out; otherwise they are drawn from those kept, so that none is lost for ever.
    """
    members = [kept[split.labels.cpu()[kept] == label] for label in range(len(data["classes"]))]
    optimizer = torch.optim.SGD([pixels.requires_grad_()], lr=args.lr, momentum=0.5)
    pixels.grad, pruning = torch.zeros_like(pixels), new_pruning(len(members), len(split))
    if start:
        pixels.data.copy_(start["pixels"])
        optimizer.load_state_dict(start["sgd"])
        pruning = start["pruning"]
    for t in range(start["iterations"] if start else 0, args.iterations):
        model, total = random_embedding(data, ("dm network", args.seed, t), pixels.device), 0
        renewing = args.adaptive_ratio > 0 and t % args.adaptive_period == 0
        for label, pool in enumerate(members):
            draw = generator("dm", args.seed, t, label)
            view, synthetic = draw_siamese(data["image_size"], draw), pixels[label].detach().requires_grad_()
            pool = pool if renewing else pool[pruning["keep"][pool]]
            index = pool[torch.randperm(len(pool), generator=draw)[:args.real_batch]]

            def embed(images):
                return model(apply_siamese(images, view))

            with torch.no_grad():
                real = embed(normalize(split.read(index).to(pixels.device), data["mean"], data["std"]))
            if renewing:
                norms = ite_norms(embed, synthetic, real, args.adaptive_products)
                real = real[prune(pruning, label, index, norms, args.adaptive_ratio).to(real.device)]
            loss = dm_loss(real, embed(synthetic))
            pixels.grad[label], = torch.autograd.grad(loss, synthetic)
            total = total + loss.detach()
        optimizer.step()
        report(t, total, pruning["keep"].double().mean().item(), pixels)
        keep(lambda: {"iterations": t + 1, "pixels": pixels.detach(), "sgd": optimizer.state_dict(), "pruning": pruning})
    return pixels.detach()


def write_matched(args, paths, device, split, kept, data, starts, work):
    """--method dm, bilp: synthesise all images; log, draw, keep and save them."""
    one_by_one = [(label, index) for label in range(len(data["classes"])) for index in range(args.ipc)]
    pixels = [starts[one] if starts else noise(*one, data["image_size"], args.seed) for one in one_by_one]
    pixels = torch.stack(pixels).unflatten(0, (-1, args.ipc)).to(device)
    log = Log(paths.run, {"args": relevant(args)})
    grid = Grid(paths.run / "grid.png", len(data["classes"]), args.ipc, data["image_size"])
    nonfinite, start, progress = NonFinite(["loss", "pixel"], device), work.read(), Progress("recover", args.iterations)
    progress.skip(start["iterations"] if start else 0)

    def check():
        if found := nonfinite.first():
            fail(f"{found[1]} is not finite in iteration {found[0]}; use a smaller --lr")

    def draw(images):
        grid.add(one_by_one, images)
        grid.save()

    def report(t, loss, kept, pixels):
        nonfinite.update(t, loss, pixels.detach().sum())
        if t % args.log_every == 0 or t + 1 == args.iterations:
            check()
            log.write({"iteration": t, "batches": [0], "dm": loss.item(), "kept": kept})
        if args.grid_every and t % args.grid_every == 0:
            draw(to_uint8(pixels.flatten(0, 1), data["mean"], data["std"]))
        progress.step(lambda: f"dm {loss.item():.3f}  kept {100 * kept:.0f} %")

    def keep(state):
        def checked():
            check()
            return state()
        work.save_if_due(checked)

    pixels = match_distributions(pixels, split.to(device), kept, data, args, report, start, keep)
    images = to_uint8(pixels.flatten(0, 1), data["mean"], data["std"])
    for one, image in zip(one_by_one, images):
        save_png(image_path(paths.images, data, *one), image)
    draw(images)


def get_parser():
    parser = identity_flags(Parser(__doc__))
    method = parser.add_argument_group("method")
    method.add_argument("--alpha", type=number(float, 0, 1), default=0.8,
                        help="weight of the past in batch statistics, 0 = off [alpha]")
    method.add_argument("--drop-rate", type=number(float, 0, 1), default=0.4,
                        help="probability of skipping a convolution's statistics, 0 = never, 1 = always [beta_dr]")
    method.add_argument("--ce-weight", type=number(float, 0), default=1.0, help="of the classification loss, 0 = off")
    method.add_argument("--bn-weight", type=number(float, 0), default=0.01,
                        help="of BatchNorm statistics, 0 = off [L'_BN]")
    method.add_argument("--conv-weight", type=number(float, 0), default=0.01,
                        help="of convolution statistics, 0 = off [L'_Conv]")
    method.add_argument("--dd-weight", type=number(float, 0), default=1.0, help="of data densification, 0 = off [L_DD]")
    method.add_argument("--first-multiplier", type=number(float, 0), default=10.0,
                        help="of the first layer's statistics, 1 = off")
    method.add_argument("--tau", type=number(float, 1), default=4.0,
                        help="temperature of data densification, 1 = off [tau, Eq. 5]")
    method.add_argument("--dd-scale", choices=["sum", "mean"], default="sum",
                        help="Gram matrix as in the paper, or divided by its feature dimension")
    method.add_argument("--loop", choices=["reorder", "original"], default="reorder", help="grouping of images, Fig. 4")
    method.add_argument("--choice", choices=["uniform", "cycle"], default="uniform",
                        help="of the backbone of an iteration, Eq. 7")
    method.add_argument("--unit-gradients", action=argparse.BooleanOptionalAction, default=False,
                        help="scale what a backbone says of a batch's pixels to norm 1, so that none whose statistics are far "
                        "off sets the size of everybody's steps (Adam's second moment); densification is added after it")
    method.add_argument("--subset", type=number(int, 0), default=0,
                        help="so many backbones, drawn for each image slot, act in every iteration [S_i of Teddy]; 0 = one, Eq. 7")
    method.add_argument("--class-statistics", action=argparse.BooleanOptionalAction, default=False,
                        help="match those of the mixture of classes in a batch, for unbalanced data [Teddy]")
    method.add_argument("--init", choices=["noise", "real", "herding", "kcenter", "crops"], default="noise",
                        help="the pixels' start: noise; training images, random or chosen by the first backbone; or the crops "
                        "it is surest of")
    method.add_argument("--init-images", type=number(int, 1), default=300, help="of a class that --init crops looks at")
    method.add_argument("--init-crops", type=number(int, 1), default=5, help="of each of them")
    method.add_argument("--mosaic", type=number(int, 1, 8), default=1,
                        help="tiles a side of a start, each a whole image, smaller; 1 = off [factor of RDED]")
    method.add_argument("--crop", type=crop_name, default="resized", help="augmentation: none, resized, pad<pixels>")
    method.add_argument("--crop-floor", type=number(float, 0.01, 1), default=0.08,
                        help="of --crop resized: the smallest share of the area that a crop takes, 1 = off")
    method.add_argument("--crop-curriculum", choices=["none", "linear", "cosine"], default="none",
                        help="of --crop resized: its smallest area falls from 1 to --crop-floor [CDA]")
    method.add_argument("--flip", action=argparse.BooleanOptionalAction, default=False,
                        help="augmentation: horizontal flips")
    method.add_argument("--roll", type=number(int, 0), default=0,
                        help="augmentation: circular shift of up to so many pixels, 0 = off")
    matching = parser.add_argument_group("distribution matching, --method dm and bilp")
    matching.add_argument("--real-batch", type=number(int, 1), default=256, help="real images of a class in an iteration")
    matching.add_argument("--adaptive-ratio", type=number(float, 0, 0.9), default=0.0,
                          help="share of real images that adaptive pruning leaves out, 0 = off [beta]")
    matching.add_argument("--adaptive-period", type=number(int, 1), default=10, help="iterations between two prunings")
    matching.add_argument("--adaptive-products", type=number(int, 1), default=16,
                          help="directions in which effects are measured; 16 err by 6 %% in rank, 32 by 3 %%")
    optimization = parser.add_argument_group("optimization")
    optimization.add_argument("--iterations", type=number(int, 1), default=4000,
                              help="Adam steps for each batch of images; SGD steps of dm")
    optimization.add_argument("--batch-size", type=number(int, 1), default=50, help="images optimised together")
    optimization.add_argument("--lr", type=number(float, 0), default=0.05, help="Adam learning rate, cosine to 0; of dm constant")
    optimization.add_argument("--groups-per-step", type=number_or_auto(int, 1), default="auto",
                              help="batches in one pass, auto: as many as fill a GPU; 1 is the paper's loop, and the images "
                              "are the same up to rounding")
    optimization.add_argument("--cuda-graphs", action=argparse.BooleanOptionalAction, default=False,
                              help="replay each backbone's pass as one launch; for GPUs that wait for the host")
    optimization.add_argument("--statistics", choices=["closed", "plain"], default="closed",
                              help="gradient of the statistics in closed form, or by autograd as Eqs. 6 and 10 read")
    output = parser.add_argument_group("output")
    output.add_argument("--log-every", type=number(int, 1), default=100, help="iterations between lines of log.jsonl")
    output.add_argument("--grid-every", type=number(int, 0), default=500,
                        help="iterations between grid.png, 0 = at the end")
    return parser


def main(argv=None):
    args = parse_args(get_parser(), "recover", argv)
    device, paths = begin(args)
    if args.cuda_graphs and (device.type != "cuda" or args.statistics == "plain"):
        fail("--cuda-graphs needs a GPU (--device cuda) and --statistics closed; leave it out")
    if args.crop_curriculum != "none" and args.crop != "resized":
        fail(f"--crop-curriculum {args.crop_curriculum} is of --crop resized, not {args.crop}; name both, or neither")
    if args.init == "crops" and args.init_images < (count := args.ipc * args.mosaic ** 2):
        fail(f"--init-images {args.init_images} is fewer than --ipc {args.ipc} "
             f"{f'with --mosaic {args.mosaic} ' * (args.mosaic > 1)}takes; use at least {count}")
    if args.mosaic > 1 and args.init == "noise":
        fail(f"--mosaic {args.mosaic} is of real images; name an --init")
    selects, taught = args.method in SELECTIONS, args.method not in UNMATCHED
    result, upstream, made_from, records, models = paths.run / "result.json", {}, {}, {}, {}
    if args.method != "random":
        asked = argparse.Namespace(**vars(args) | {"backbones": args.backbones if taught else args.backbones[:1]})
        models, records, data = load_teachers(asked, paths.teachers, build_model, device)
        upstream["squeeze"] = {name: record["args"] for name, record in records.items()}
        made_from = fingerprints(records) if taught else {"first backbone": fingerprints(records)["weights"]}
    if taught:
        if args.subset > len(models):
            fail(f"--subset {args.subset} is more than the {len(models)} --backbones; use at most that many")
        statistics = load_statistics(args, paths, models, records)
        upstream["collect_stats"] = {name: stored.get("args") for name, stored in statistics.items()}
        made_from["statistics"] = {name: stored.get("fingerprint") for name, stored in statistics.items()}
    run = Run("recover", args, result, made_from)
    if run.finished():
        return None
    seen, starts = {}, {}
    if not taught or args.init != "noise":
        data = data if records else describe(args.dataset, args.data_dir, args.image_size, args.workers, args.data_set["fingerprint"])
        split = load_split(args.dataset, args.data_dir, "train", data["image_size"], args.workers, holdout=args.holdout,
                           imbalance=args.imbalance)
        check_classes(split.classes, data["classes"], f"--dataset {args.dataset}", f"the teachers in {paths.teachers}")
        check_trained(split, records, paths)
        seen = {"data": fingerprint(json.dumps([data, len(split)]))}
        kept = records.get(args.backbones[0], {}).get("kept", torch.arange(len(split)))
    if selects:
        chosen = select(args.method, args.ipc, args, split, data, models, records, device)
    elif args.init != "noise":
        if data["image_size"] % args.mosaic:
            fail(f"--mosaic {args.mosaic} does not divide the {data['image_size']} pixels of an image; use a number that does")
        starts = real_starts(args, split, data, models, records, kept, device)
    old = [*paths.images.glob("*/*.png"), *paths.run.glob("log*.jsonl")]
    with run.work(seen, old) as work:
        if taught:
            warn_of_backbones(args, models, records, len(data["classes"]))
            synthesise(args, paths, device, models, statistics, data, starts, work)
        elif rank() == 0 and not selects:
            write_matched(args, paths, device, split, kept, data, starts, work)
        elif rank() == 0:
            write_selection(args, paths, data, split, chosen, work)
        if rank() == 0:
            files = [image_path(Path(), data, label, index).as_posix()
                     for label in range(len(data["classes"])) for index in range(args.ipc)]
            metrics = {"images": len(files), "classes": data["classes"], "image_set": image_set(paths.images, files)}
            if records:
                metrics["teacher_top1"] = {name: record["top1"] for name, record in records.items()}
            told = f"{len(files)} images of {len(data['classes'])} classes"
            return run.finish(metrics, told, upstream)


if __name__ == "__main__":
    script(main)
