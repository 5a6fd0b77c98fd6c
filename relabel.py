"""Relabel: soft labels by the ensemble of backbones (phase 4 of 5).   G-VBSM, arXiv:2311.17950, Sec. 3.2, Eq. 8.

For each epoch every image is cropped, flipped and mixed (CutMix); the backbones see the mixed image, and their logits are
averaged, with or without logit normalisation (Eq. 8). Logits are stored, so Eq. 3's temperature is the student's choice.
Beside them stands what was drawn, one row for each mixed sample, so that training replays exactly what was labelled, in
batches of any size.

reads   runs/<dataset>/teachers/<teachers>/<backbone>.pt         squeeze.py
        runs/<dataset>/<run>/images/<class>/<id>.png             recover.py, or any ImageFolder (--images)
writes  runs/<dataset>/<run>/labels/logits.npy                   float16 [epochs, N, classes], memory-mapped
        runs/<dataset>/<run>/labels/{crop,flip,partner,box,ratio}.npy   what was drawn, [epochs, N, ...]
        runs/<dataset>/<run>/labels/result.json                  classes, fingerprint of the images, arguments

python relabel.py --dataset cifar100 --ipc 10                                                # paper setting, Table 9
python relabel.py --dataset cifar100 --ipc 10 --tag noln --no-logit-norm --images runs/cifar100/gvbsm-ipc10/images
python relabel.py --dataset shapes                                                           # smoke run: seconds
"""
import argparse
import math
import os
import sys
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import numpy as np
import torch

from models import build_model
from utils import fail
from utils.augment import apply_epoch, draw_epoch
from utils.checkpoint import load_json, whole_file, writable
from utils.cli import Parser, call, identity_flags, number, parse_args
from utils.data import folder_name, list_folder, load_folder, preset_column
from utils.losses import ensemble_logits
from utils.processes import barrier, rank, shard
from utils.provenance import check_classes, check_recovered, fingerprints, image_set
from utils.run import Progress, Run, begin, channels_last, generator, script, send
from utils.teachers import load_teachers

DRAWN = {"crop": (np.int16, (4,)), "flip": (np.bool_, ()), "partner": (np.int32, ()), "box": (np.int16, (4,)),
         "ratio": (np.float32, ())}                                   # what a mixed sample is made with
FILLING = 1 << 20       # pixels in a pass that leave no GPU idle, so 1024 images at 32x32; an estimate


class RowFile:
    """An .npy file of this shape whose rows are written in any order, by any process.

    Not through a memory map, whose pages count as the process's own and whose errors, such as a full disk, kill it.
    """

    def __init__(self, path, shape, dtype):
        self.path, self.shape, self.dtype = path, tuple(shape), np.dtype(dtype)

    def create(self):
        """All zeros, which take no room on the disk."""
        with whole_file(self.path) as temporary, open(temporary, "wb") as file:
            np.lib.format.write_array_header_1_0(
                file, {"descr": self.dtype.str, "fortran_order": False, "shape": self.shape})
            file.truncate(file.tell() + self.dtype.itemsize * math.prod(self.shape))

    @contextmanager
    def opened(self):
        with writable(self.path):
            self.file = open(self.path, "r+b", buffering=0)
        with self.file:
            yield

    def write(self, index, row):
        size, rest = self.dtype.itemsize * math.prod(self.shape[1:]), memoryview(np.ascontiguousarray(row, self.dtype)).cast("B")
        with writable(self.path):
            self.file.seek(index * size - self.shape[0] * size, os.SEEK_END)
            while rest:                                              # a disk may have room for a part alone
                rest = rest[self.file.write(rest):]

    def sync(self):
        """What is written stays after a power cut."""
        with writable(self.path):
            os.fsync(self.file.fileno())


@torch.inference_mode()
def label_epoch(images, units, draw, batch_size, models, mix, logit_norm, together=1):
    """Ensemble logits of one epoch's mixed samples, Eq. 8 batch by batch, of which `together` go through the models at once.
    images: uint8 [N, 3, S, S]; units: their mean and deviation [2, 3]   -> [N, classes]"""
    draw, logits = send(draw, images.device), None
    for rows in draw["order"].split(batch_size * together):
        mixed = apply_epoch(images, draw, rows, mix, units)
        outputs = torch.stack([model(mixed) for model in models])
        logits = outputs.new_empty(len(images), outputs.shape[2]) if logits is None else logits
        for batch, output in zip(rows.split(batch_size), outputs.split(batch_size, dim=1)):
            logits[batch] = ensemble_logits(output, logit_norm)
    return logits


def draw_labelled(args, images, batch_size, epoch):
    """What is random in an epoch, a function of (seed, epoch)."""
    return draw_epoch(len(images), images.shape[-1], batch_size, args.mix, generator("relabel", args.seed, epoch),
                      (args.crop_floor, 1.0))


@torch.inference_mode()
def logit_rms(images, units, draw, batch_size, models, mix):
    """Root mean square of each model's logits on the first batch of an epoch.   -> [float]   One that is far above the others
    rules the mean norm of Eq. 8, and with it the scale of all labels."""
    draw = send(draw, images.device)
    mixed = apply_epoch(images, draw, draw["order"][:batch_size], mix, units)
    return [model(mixed).square().mean().sqrt().item() for model in models]


def label_epochs(images, units, models, batch_size, classes, args, folder, work):
    """Labels and draws of all epochs, into the files of a folder; none is kept in memory. The processes of torchrun deal
    the epochs among them."""
    shape, piece = (args.epochs, len(images)), f"epochs-{rank()}"
    files = {key: RowFile(work.folder / f"{key}.npy", (*shape, *extra), kind)
             for key, (kind, extra) in {"logits": (np.float16, (classes,)), **DRAWN}.items()}
    done = {epoch for state in work.states() for epoch in state["done"]}
    if rank() == 0 and not done:
        for file in files.values():
            file.create()
    barrier()                                                   # until all know what is done

    def state():
        for file in files.values():
            file.sync()
        return {"done": sorted(done)}

    todo = shard([epoch for epoch in range(args.epochs) if epoch not in done])
    together = 1 if images.device.type == "cpu" else max(1, FILLING // (batch_size * images[0, 0].numel()))
    progress = Progress("relabel", len(todo))
    with ExitStack() as stack:
        for file in files.values() if todo else ():
            stack.enter_context(file.opened())
        for epoch in todo:
            draw = draw_labelled(args, images, batch_size, epoch)
            logits = label_epoch(images, units, draw, batch_size, models, args.mix, args.logit_norm, together).half().cpu()
            if not logits.isfinite().all():
                blame(images, units, draw, batch_size, models, args, epoch)
            for key, file in files.items():
                file.write(epoch, draw.get(key, logits).numpy())
            done.add(epoch)
            work.save_if_due(state, piece)
            progress.step()
        if todo:
            work.save(state(), piece)
    barrier()
    if rank() == 0:
        for file in files.values():                                  # some may have been moved before a kill
            with writable(folder), suppress(FileNotFoundError):
                os.replace(file.path, folder / file.path.name)


def blame(images, units, draw, batch_size, models, args, epoch):
    """Say whose logits are not finite in float16."""
    guilty = [name for name, model in zip(args.backbones, models) if not label_epoch(
        images, units, draw, batch_size, [model], args.mix, False).half().isfinite().all()]
    fail(f"--backbones: the logits of {' '.join(guilty) or 'the ensemble'} are not finite in float16 in epoch {epoch}; "
         "train again with squeeze.py, or name others")


def warn(rms):
    """Say whose logits are far larger than another's.   rms: {backbone: of `logit_rms`}"""
    least, most = min(rms, key=rms.get), max(rms, key=rms.get)
    if rms[most] > 8 * rms[least] and rank() == 0:
        print(f"warning: the logits of {most} are of size {rms[most]:.3g}, those of {least} {rms[least]:.3g}, as when a "
              "BatchNorm's running statistics have not settled; train it again with another --seed or --schedule, or leave it out",
              file=sys.stderr)


def get_parser():
    parser = identity_flags(Parser(__doc__))
    method = parser.add_argument_group("method")
    method.add_argument("--images", type=Path, metavar="DIR",
                        help="a folder <class>/<file> of any origin, instead of the run's images")
    method.add_argument("--logit-norm", action=argparse.BooleanOptionalAction, default=True,
                        help="scale each backbone's logits to the mean norm before averaging [LN, Eq. 8]")
    method.add_argument("--mix", choices=["cutmix", "mixup", "none"], default="cutmix", help="how two images become one")
    method.add_argument("--crop-floor", type=number(float, 0.01, 1), default=0.08,
                        help="smallest share of the area that a random crop takes, 1 = off")
    method.add_argument("--epochs", type=number(int, 1), default=300, help="how many times every image is labelled")
    method.add_argument("--batch-size", type=number(int, 1), default=64,
                        help="images that share a mix box and Eq. 8's norms")
    method.add_argument("--whole-up-to", type=number(int, 0), default=100,
                        help="sets of up to so many images make one batch, 0 = never [||S||]")
    return parser


def main(argv=None):
    args = parse_args(get_parser(), "relabel", argv, preset_column)
    device, paths = begin(args)
    models, records, data = load_teachers(args, paths.teachers, build_model, device)
    squeezed, upstream, folder = {name: record["args"] for name, record in records.items()}, {}, args.images or paths.images
    if args.images:
        images = image_set(folder, list_folder(folder)[2])
    else:
        recovered = load_json(paths.run / "result.json", "run: " + call("recover.py", args),
                              ("args", "upstream", "made_from", "image_set", "classes"))
        upstream, images = recovered["upstream"] | {"recover": recovered["args"]}, recovered["image_set"]
        check_recovered(recovered, args, paths, data, records)
    upstream["squeeze"] = upstream.get("squeeze", {}) | squeezed
    made_from, result = fingerprints(records) | {"images": images}, paths.labels / "result.json"
    run = Run("relabel", args, result, made_from)
    if run.finished():
        return None
    raw, _, classes, files = load_folder(folder, data["image_size"], args.workers)
    check_classes(classes, sorted(map(folder_name, data["classes"])), folder, f"the teachers in {paths.teachers}")
    if not args.images and image_set(folder, files) != images:
        fail(f"{folder} holds other images than recover.py wrote; run recover.py --overwrite, or name them with --images")
    batch_size = len(raw) if len(raw) <= args.whole_up_to else args.batch_size
    raw, units = raw.to(device), torch.tensor([data["mean"], data["std"]], device=device)
    models = [channels_last(model) for model in models.values()]
    with run.work() as work:
        first = draw_labelled(args, raw, batch_size, 0)
        rms = dict(zip(args.backbones, logit_rms(raw, units, first, batch_size, models, args.mix)))
        warn(rms)
        label_epochs(raw, units, models, batch_size, len(classes), args, paths.labels, work)
        metrics = {"images": len(raw), "classes": data["classes"], "data": data,
                   "teacher_top1": {name: record["top1"] for name, record in records.items()}, "teacher_logit_rms": rms,
                   "label_batch": batch_size}
        return run.finish(metrics, f"{args.epochs} epochs of labels for {len(raw)} images", upstream)


if __name__ == "__main__":
    script(main)
