"""Relabel: soft labels by the ensemble of backbones (phase 4 of 5).   G-VBSM, arXiv:2311.17950, Eq. 8.

For each epoch every image is cropped, flipped and mixed (CutMix); the backbones see the mixed image, and
their logits are averaged, with or without logit normalisation (Eq. 8). Logits are stored, so Eq. 3's
temperature is the student's choice. What was drawn is stored beside them, a row for each mixed sample, so
that training replays what was labelled, in batches of any size.

reads   runs/<dataset>/teachers/<teachers>/<backbone>.pt         squeeze.py
        runs/<dataset>/<run>/images/<class>/<id>.png             recover.py, or any ImageFolder (--images)
writes  runs/<dataset>/<run>/labels/...                          logits and what was drawn (utils/labels.py)

python relabel.py --dataset cifar100 --ipc 10                                  # paper setting, Table 9
python relabel.py --dataset shapes                                             # smoke run: seconds
images=runs/cifar100/gvbsm-ipc10/images
python relabel.py --dataset cifar100 --ipc 10 --tag noln --no-logit-norm --images $images
"""
import argparse
from pathlib import Path

import torch

from models import build_model
from utils import fail
from utils.augment import apply_epoch, draw_epoch
from utils.checkpoint import load_json
from utils.cli import Parser, call, identity_flags, number, parse_args
from utils.data import check_count, list_folder, load_folder, read_class_map
from utils.labels import LabelWriter
from utils.losses import ensemble_logits
from utils.processes import barrier, rank, shard, warn
from utils.provenance import check_recovered, fingerprints, image_set
from utils.run import Run, begin, generator, script, send
from utils.teachers import load_teachers
from utils.train import channels_last

SATURATING_PIXELS = 1 << 20       # in a pass, so 1024 images at 32x32, leave no GPU idle; an estimate


@torch.inference_mode()
def label_epoch(images, mean_std, draw, batch_size, models, mix, logit_norm, together=1):
    """Ensemble logits of one epoch's mixed samples, Eq. 8 batch by batch; `together` batches share a pass.
    images: uint8 [N, 3, S, S]; mean_std: [2, 3]; draw: of `draw_epoch`   -> [N, classes]"""
    draw, logits = send(draw, images.device), None
    for rows in draw["order"].split(batch_size * together):
        mixed = apply_epoch(images, draw, rows, mix, mean_std)
        outputs = torch.stack([model(mixed) for model in models])
        logits = outputs.new_empty(len(images), outputs.shape[2]) if logits is None else logits
        for batch, output in zip(rows.split(batch_size), outputs.split(batch_size, dim=1)):
            logits[batch] = ensemble_logits(output, logit_norm)
    return logits


def label_epochs(images, mean_std, models, draws, *, batch_size, mix="cutmix", logit_norm=True):
    """Label each of `draws`, an iterable of (epoch, draw of `draw_epoch`).   models: {name: in eval mode}
    -> yields epoch, draw, logits float16 [N, classes] on the CPU.   ValueError where logits are not finite"""
    pixels = images[0, 0].numel() * batch_size
    together = 1 if images.device.type == "cpu" else max(1, SATURATING_PIXELS // pixels)
    for epoch, draw in draws:
        def labels(chosen, norm=False):
            return label_epoch(images, mean_std, draw, batch_size, chosen, mix, norm, together).half().cpu()

        logits = labels(list(models.values()), logit_norm)
        if not logits.isfinite().all():
            names = [name for name, model in models.items() if not labels([model]).isfinite().all()]
            raise ValueError(f"the logits of {' '.join(names) or 'the ensemble'} are not finite in float16 "
                             f"in epoch {epoch}")
        yield epoch, draw, logits


@torch.inference_mode()
def logit_rms(images, mean_std, draw, batch_size, models, mix):
    """Root mean square of each model's logits on the first batch of an epoch.   -> {name: float}
    A model whose logits are far larger than the others' sets the mean norm of Eq. 8, the scale of all
    labels."""
    draw = send(draw, images.device)
    mixed = apply_epoch(images, draw, draw["order"][:batch_size], mix, mean_std)
    return {name: model(mixed).square().mean().sqrt().item() for name, model in models.items()}


def warn_of_scales(rms):
    """Say whose logits are far larger than another's.   rms: of `logit_rms`"""
    least, most = min(rms, key=rms.get), max(rms, key=rms.get)
    if rms[most] > 8 * rms[least]:
        warn(f"the logits of {most} are of size {rms[most]:.3g}, those of {least} {rms[least]:.3g}, as when "
             "a BatchNorm's running statistics have not settled; train it again with another --seed or "
             "--schedule, or leave it out")


def get_parser():
    parser = identity_flags(Parser(__doc__))
    method = parser.add_argument_group("method")
    method.add_argument("--images", type=Path, metavar="DIR",
                        help="a folder <class>/<file> of any origin, instead of the run's images")
    method.add_argument("--class-map", type=Path, metavar="FILE",
                        help="JSON {folder: class} where folders of --images have other names")
    method.add_argument("--logit-norm", action=argparse.BooleanOptionalAction, default=True,
                        help="scale each backbone's logits to the mean norm before averaging [LN, Eq. 8]")
    method.add_argument("--mix", choices=["cutmix", "mixup", "none"], default="cutmix",
                        help="how two images become one")
    method.add_argument("--flip", action=argparse.BooleanOptionalAction, default=True,
                        help="mirror half of the views [not in the paper's tables]")
    method.add_argument("--crop-floor", type=number(float, 0.01, 1), default=0.08,
                        help="smallest share of the area that a random crop takes, 1 = off")
    method.add_argument("--epochs", type=number(int, 1), default=300,
                        help="how many times every image is labelled")
    method.add_argument("--batch-size", type=number(int, 1), default=64,
                        help="images that share a mix box and Eq. 8's norms")
    method.add_argument("--whole-up-to", type=number(int, 0), default=100,
                        help="sets of up to so many images make one batch, 0 = never [||S||]")
    return parser


def earlier_phases(args, paths, records, data):
    """What the labels are made from.   -> folder of images, hashes, {phase: arguments}"""
    folder, upstream = args.images or paths.images, {}
    if args.images:
        images = image_set(folder, list_folder(folder)[2])
    else:
        recovered = load_json(paths.run / "result.json", "run: " + call("recover.py", args),
                              ("args", "upstream", "made_from", "image_set", "classes"))
        check_recovered(recovered, args, paths, data, records)
        upstream, images = recovered["upstream"] | {"recover": recovered["args"]}, recovered["image_set"]
    squeezed = {name: record["args"] for name, record in records.items()}
    upstream["squeeze"] = upstream.get("squeeze", {}) | squeezed
    return folder, fingerprints(records) | {"images": images}, upstream


def main(argv=None):
    args = parse_args(get_parser(), "relabel", argv)
    device, paths = begin(args)
    models, records, data = load_teachers(args, paths.teachers, build_model, device)
    folder, inputs, upstream = earlier_phases(args, paths, records, data)
    run = Run("relabel", args, paths.labels / "result.json", inputs)
    if run.finished():
        return None
    images, labels, classes, files = load_folder(folder, data["image_size"], args.workers, data["classes"],
                                                 read_class_map(args.class_map))
    if args.images:
        check_count(labels, args.ipc, folder)
    if not args.images and image_set(folder, files) != inputs["images"]:
        fail(f"{folder} holds other images than recover.py wrote; run recover.py --overwrite, or name them "
             "with --images")
    images, mean_std = images.to(device), torch.tensor([data["mean"], data["std"]], device=device)
    models = {name: channels_last(model) for name, model in models.items()}
    batch_size = len(images) if len(images) <= args.whole_up_to else args.batch_size
    piece = f"epochs-{rank()}"

    def draw(epoch):                                                 # a function of (seed, epoch)
        rng = generator("relabel", args.seed, epoch)
        return draw_epoch(len(images), data["image_size"], batch_size, args.mix, rng, (args.crop_floor, 1.0),
                          args.flip)

    def state():
        writer.sync()
        return {"done": sorted(done)}

    with run.work() as checkpoint:
        writer = LabelWriter(checkpoint.folder, args.epochs, len(images), len(classes))
        rms = logit_rms(images, mean_std, draw(0), batch_size, models, args.mix)
        warn_of_scales(rms)
        done = {epoch for saved in checkpoint.states() for epoch in saved["done"]}
        if rank() == 0 and not done:
            writer.create()
        barrier()                                                    # until all processes know what is done
        todo = shard([epoch for epoch in range(args.epochs) if epoch not in done])
        if todo:
            run.start(len(todo), "epochs")
            labelled = label_epochs(images, mean_std, models, ((epoch, draw(epoch)) for epoch in todo),
                                    batch_size=batch_size, mix=args.mix, logit_norm=args.logit_norm)
            with writer.opened():
                try:
                    for epoch, drawn, logits in labelled:
                        writer.write(epoch, logits, drawn)
                        done.add(epoch)
                        run.step(state=state, piece=piece)
                except ValueError as error:
                    fail(f"--backbones: {error}; train again with squeeze.py, or name others")
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
