"""Relabel: soft labels by the ensemble of backbones (phase 4 of 5).   G-VBSM, arXiv:2311.17950, Sec. 3.2, Eqs. 3, 8.

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
import time
from contextlib import ExitStack, suppress
from pathlib import Path

import numpy as np
import torch

from models import build_model
from utils import fail
from utils.augment import apply_epoch, draw_epoch
from utils.data import load_folder, preset_column
from utils.losses import ensemble_logits
from utils.presets import Parser, identity_flags, number, parse_args
from utils.run import (Progress, array_file, channels_last, check_classes, finish, finished, fingerprint, generator,
                       load_json, load_teachers, pick_device, run_paths, send)

DRAWN = {"crop": (np.int16, (4,)), "flip": (np.bool_, ()), "partner": (np.int32, ()), "box": (np.int16, (4,)),
         "ratio": (np.float32, ())}                                   # what a mixed sample is made with


@torch.inference_mode()
def label_epoch(images, units, draw, batch_size, models, mix, logit_norm):
    """Ensemble logits of one epoch's mixed samples, Eq. 8 batch by batch.
    images: uint8 [N, 3, S, S]; units: their mean and deviation [2, 3]   -> [N, classes]"""
    draw, logits = send(draw, images.device), None
    for batch in draw["order"].split(batch_size):
        mixed = apply_epoch(images, draw, batch, mix, units)
        ensemble = ensemble_logits(torch.stack([model(mixed) for model in models]), logit_norm)
        logits = ensemble.new_empty(len(images), ensemble.shape[1]) if logits is None else logits
        logits[batch] = ensemble
    return logits


def label_epochs(images, units, models, batch_size, classes, args, folder):
    """Labels and draws of all epochs, into the files of a folder; none is kept in memory."""
    shape, progress = (args.epochs, len(images)), Progress("relabel", args.epochs)
    with ExitStack() as stack:
        files = {key: stack.enter_context(array_file(folder / f"{key}.npy", (*shape, *extra), kind))
                 for key, (kind, extra) in {"logits": (np.float16, (classes,)), **DRAWN}.items()}
        for epoch in range(args.epochs):
            draw = draw_epoch(len(images), images.shape[-1], batch_size, args.mix, generator("relabel", args.seed, epoch))
            logits = label_epoch(images, units, draw, batch_size, models, args.mix, args.logit_norm).half().cpu()
            if not logits.isfinite().all():
                raise FloatingPointError(f"the ensemble's logits are not finite in float16 in epoch {epoch}")
            for key, append in files.items():
                append(draw.get(key, logits).numpy())
            progress.step()


def get_parser():
    parser = identity_flags(Parser(__doc__))
    method = parser.add_argument_group("method")
    method.add_argument("--images", type=Path, metavar="DIR",
                        help="a folder <class>/<file> of any origin, instead of the run's images")
    method.add_argument("--logit-norm", action=argparse.BooleanOptionalAction, default=True,
                        help="scale each backbone's logits to the mean norm before averaging [LN, Eq. 8]")
    method.add_argument("--mix", choices=["cutmix", "mixup", "none"], default="cutmix", help="how two images become one")
    method.add_argument("--epochs", type=number(int, 1), default=300, help="how many times every image is labelled")
    method.add_argument("--batch-size", type=number(int, 1), default=64,
                        help="images that share a mix box and Eq. 8's norms")
    method.add_argument("--whole-up-to", type=number(int, 0), default=100,
                        help="sets of up to so many images make one batch, 0 = never [||S||]")
    return parser


def main(argv=None):
    args, started = parse_args(get_parser(), "relabel", argv, preset_column), time.time()
    device, paths = pick_device(args.device, args.precision), run_paths(args)
    models, records, data = load_teachers(args, paths.teachers, build_model, device)
    upstream, folder = {"squeeze": {name: record["args"] for name, record in records.items()}}, args.images or paths.images
    if not args.images:
        recovered = load_json(paths.run / "result.json", f"run: python recover.py --dataset {args.dataset} "
                              f"--ipc {args.ipc} --method {args.method}", ("args", "upstream", "images"))
        upstream = recovered["upstream"] | {"recover": recovered["args"]}
    if finished(paths.labels / "result.json", args, upstream, "images"):
        return
    raw, _, classes, ids = load_folder(folder, data["image_size"], args.workers)
    check_classes(classes, data["classes"], folder, f"the teachers in {paths.teachers}")
    if not args.images and len(raw) != recovered["images"]:
        fail(f"{folder} holds {len(raw)} images of the {recovered['images']} there were; run recover.py --overwrite")
    batch_size = len(raw) if len(raw) <= args.whole_up_to else args.batch_size
    with suppress(NotADirectoryError):                               # array_file will tell
        (paths.labels / "result.json").unlink(missing_ok=True)       # labels half made anew are not finished
    units = torch.tensor([data["mean"], data["std"]], device=device)
    label_epochs(raw.to(device), units, [channels_last(model) for model in models.values()], batch_size, len(classes),
                 args, paths.labels)
    return finish(paths.labels / "result.json", "relabel", args,
                  {"images": len(raw), "classes": classes, "data": data, "image_set": fingerprint(*ids, raw.numpy()),
                   "teachers": {name: record["fingerprint"] for name, record in records.items()},
                   "teacher_top1": {name: record["top1"] for name, record in records.items()}, "label_batch": batch_size},
                  started, upstream)


if __name__ == "__main__":
    main()
