"""Relabel: soft labels by the ensemble of backbones (phase 4 of 5).   G-VBSM, arXiv:2311.17950, Eq. 8.

For each epoch every image is cropped, flipped and mixed (CutMix); the backbones see the mixed image, and
their logits are averaged after logit normalisation (Eq. 8; for ResNet50, ResNet101 and transformers as
students --no-logit-norm, Table 6).
Logits are stored, so that Eq. 3's temperature is the student's choice; the draws beside them, a row for each
mixed sample, so that training replays what was labelled, in batches of any size.

reads   runs/<dataset>/teachers/<teachers>/<backbone>.pt         squeeze.py
        runs/<dataset>/<run>/images/<class>/<id>.png             recover.py, or any ImageFolder (--images)
writes  runs/<dataset>/<run>/labels/...                          logits and what was drawn (utils/labels.py)

python relabel.py --dataset cifar100 --ipc 10                                  # paper setting, Table 9
python relabel.py --dataset shapes                                             # smoke run: seconds
images=runs/cifar100/gvbsm-ipc10/images
python relabel.py --dataset cifar100 --ipc 10 --tag noln --no-logit-norm --images $images
"""
import argparse
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from utils import fail
from utils.augment import apply_epoch
from utils.cli import identity_flags, parse_args
from utils.distilled import check_recovered, class_map_hash, earlier_result, images_hash, load_images
from utils.labels import LabelWriter, draw_labels
from utils.losses import ensemble_logits
from utils.parser import Parser, number
from utils.processes import barrier, rank, shard, warn
from utils.provenance import fingerprints
from utils.run import Run, begin, script, send
from utils.stats import require_eval
from utils.teachers import load_teachers
from utils.train import channels_last, full_batch

SATURATING_PIXELS = 1 << 20       # so many in a pass (1024 images of 32x32) keep a GPU busy; an estimate


@torch.inference_mode()
def label_epoch(images: Tensor, mean_std: Tensor, draw: dict[str, Tensor], batch_size: int,
                models: list[nn.Module], mix: str, logit_norm: bool, together: int = 0) -> Tensor:
    """Ensemble logits of one epoch's mixed samples. The norms of Eq. 8 are those of one batch; `together`
    batches share a pass, by default one on a CPU and as many as keep a GPU busy.
    images: uint8 [N, 3, S, S]; mean_std: [2, 3]; draw: from `draw_epoch`   -> [N, classes] by image"""
    for model in models:
        require_eval(model)
    draw, logits = send(draw, images.device), []
    busy = SATURATING_PIXELS // (images[0, 0].numel() * batch_size) if images.is_cuda else 1
    for rows in draw["order"].split(batch_size * (together or max(1, busy))):
        mixed = apply_epoch(images, draw, rows, mix, mean_std)
        outputs = torch.stack([model(mixed) for model in models])
        logits += [ensemble_logits(output, logit_norm) for output in outputs.split(batch_size, dim=1)]
    return torch.cat(logits)[draw["order"].argsort()]                # back to the order of the images


@torch.inference_mode()
def logit_rms(images: Tensor, mean_std: Tensor, draw: dict[str, Tensor], batch_size: int,
              models: dict[str, nn.Module], mix: str) -> dict[str, float]:
    """Root mean square of each model's logits on the first batch of an epoch.   -> {name: float}
    Warns if one exceeds 8 times another (our choice): it would decide the mean norm of Eq. 8, so the scale of
    all, or the plain mean."""
    draw = send(draw, images.device)
    mixed = apply_epoch(images, draw, draw["order"][:batch_size], mix, mean_std)
    rms = {name: model(mixed).square().mean().sqrt().item() for name, model in models.items()}
    least, most = min(rms, key=rms.get), max(rms, key=rms.get)
    if rms[most] > 8 * rms[least]:
        warn(f"the logits of {most} are of size {rms[most]:.3g}, those of {least} {rms[least]:.3g}, as when "
             "a BatchNorm's running statistics have not settled; train it again with another --seed or "
             "--schedule, or leave it out")
    return rms


def get_parser():    # its defaults hold where utils/presets.py has none
    parser = identity_flags(Parser(__doc__))
    switch = dict(action=argparse.BooleanOptionalAction, default=True)
    add = parser.add_argument_group("method").add_argument
    add("--images", type=Path, metavar="DIR",
        help="a folder <class>/<file> of any origin, instead of the run's images")
    add("--class-map", type=Path, metavar="FILE",
        help="JSON {folder: class} where folders of --images have other names")
    add("--logit-norm", **switch, help="scale each backbone's logits to the mean norm [LN, Eq. 8]")
    add("--mix", choices=["cutmix", "mixup", "none"], default="cutmix", help="how two images become one")
    add("--flip", **switch, help="mirror views at random [not in the paper's tables]")
    add("--crop-floor", type=number(float, 0.01, 1), default=0.08,
        help="smallest share of the area that a random crop takes, 1 = off")
    add("--epochs", type=number(int, 1), default=300, help="how many times every image is labelled")
    add("--batch-size", type=number(int, 1), default=64, help="images that share a mix box and Eq. 8's norms")
    add("--whole-up-to", type=number(int, 0), default=100,
        help="sets of up to so many images make one batch, 0 = never [||S||]")
    return parser


def main(argv=None):
    args = parse_args(get_parser(), "relabel", argv)
    device, paths = begin(args)
    models, records, data = load_teachers(args, paths.teachers, device)
    folder, recovered, upstream = args.images or paths.images, {}, {}
    if not args.images:
        recovered, upstream = earlier_result("recover", args, paths.run)
        check_recovered(recovered, args, paths, data, records)
    upstream["squeeze"] = upstream.get("squeeze", {}) | {name: one["args"] for name, one in records.items()}
    inputs = fingerprints(records) | {"images": images_hash(folder, recovered)} | class_map_hash(args)
    run = Run("relabel", args, paths.labels / "result.json", inputs)
    if run.finished():
        return None
    images, _ = load_images(args, folder, data, inputs["images"])
    images, mean_std = images.to(device), torch.tensor([data["mean"], data["std"]], device=device)
    models = {name: channels_last(model) for name, model in models.items()}
    batch_size = full_batch(len(images), args.whole_up_to, args.batch_size)
    draw = partial(draw_labels, args, data["image_size"], len(images))
    piece = f"epochs-{rank()}"

    with run.work() as checkpoint:
        writer = LabelWriter(checkpoint.folder, args.epochs, len(images), len(data["classes"]))
        rms = logit_rms(images, mean_std, draw(0), batch_size, models, args.mix)
        done = {epoch for saved in checkpoint.states() for epoch in saved["done"]}
        if rank() == 0 and not done:
            writer.create()
        barrier()                        # before any of them writes, all know what is done, and files exist

        def state():
            writer.sync()
            return {"done": sorted(done)}

        if todo := shard([epoch for epoch in range(args.epochs) if epoch not in done]):
            run.start(len(todo), "epochs")
            for epoch in todo:
                drawn = draw(epoch)
                label = partial(label_epoch, images, mean_std, drawn, batch_size, mix=args.mix)
                logits = label(list(models.values()), logit_norm=args.logit_norm).half().cpu()
                if not logits.isfinite().all():
                    names = [name for name, model in models.items()
                             if not label([model], logit_norm=False).half().isfinite().all()]
                    fail(f"--backbones: the logits of {' '.join(names) or 'the ensemble'} are not finite in "
                         f"float16 in epoch {epoch}; train again with squeeze.py, or name others")
                writer.write(epoch, logits, drawn)
                done.add(epoch)
                run.step(state=state, piece=piece)
            checkpoint.save(state(), piece)
        barrier()
        if rank() == 0:
            writer.move(paths.labels)
        metrics = {"images": len(images), "classes": data["classes"], "data": data, "label_batch": batch_size,
                   "teacher_top1": {name: record["top1"] for name, record in records.items()},
                   "teacher_logit_rms": rms}
        return run.finish(metrics, f"{args.epochs} epochs of labels for {len(images)} images", upstream)


if __name__ == "__main__":
    script(main)
