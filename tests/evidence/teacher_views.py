"""How well do the teachers know a set of images? Their accuracy and entropy on random crops of it.

python -m tests.evidence.teacher_views --dataset cifar10 --teachers annealed --backbones convnet_w128 wrn16_2 \
    --folders runs/cifar10/random-ipc10/images runs/cifar10/gvbsm-ipc10-best/images

Prints a row for the training images, the test images and each folder: of the views that relabel.py draws
(RandomResizedCrop, flip, unmixed), the share in % whose class each teacher finds, that of the mean of their
logits, and the entropy in nats of its softmax. --holdout splits the data as in every phase.
"""
from pathlib import Path

import torch

import relabel
from utils.augment import apply_epoch, draw_epoch
from utils.cli import parse_args
from utils.data import load_folder, load_split
from utils.run import begin, generator
from utils.teachers import load_teachers

VIEWS = 5000                                    # of each set, several of an image where it has fewer


@torch.inference_mode()
def knowledge(images, labels, mean_std, models, seed=0, batch_size=100):
    """images: uint8 [N, 3, S, S]; labels: [N]   -> {name: % of views recognised, "mean", "entropy"}"""
    hits, entropy, count = dict.fromkeys([*models, "mean"], 0), 0.0, 0
    for epoch in range(max(1, VIEWS // len(images))):
        draw = draw_epoch(len(images), images.shape[-1], batch_size, "none", generator("views", seed, epoch))
        for rows in draw["order"].split(batch_size):
            views = apply_epoch(images, draw, rows, "none", mean_std)
            logits = {name: model(views) for name, model in models.items()}
            logits["mean"] = torch.stack(list(logits.values())).mean(0)
            for name, output in logits.items():
                hits[name] += (output.argmax(1) == labels[rows]).sum().item()
            chances = logits["mean"].log_softmax(1)
            entropy -= (chances.exp() * chances).sum().item()
            count += len(rows)
    return {name: 100 * hit / count for name, hit in hits.items()} | {"entropy": entropy / count}


def main(argv=None):
    parser = relabel.get_parser()
    parser.description = __doc__
    parser.add_argument("--folders", type=Path, nargs="*", default=[],
                        help="distilled images, <class>/<file>")
    args = parse_args(parser, "relabel", argv)
    device, paths = begin(args)
    models, _, data = load_teachers(args, paths.teachers, device)
    mean_std, size, sets = torch.tensor([data["mean"], data["std"]]), data["image_size"], {}
    for name in "train", "test":
        split = load_split(args.dataset, args.data_dir, name, size, args.workers, holdout=args.holdout)
        rows = torch.randperm(len(split), generator=generator("rows", 0))[:VIEWS]
        sets[{"train": "training images", "test": "test images"}[name]] = split.read(rows), split.labels[rows]
    for folder in args.folders:
        sets[folder.parent.name] = load_folder(folder, size, args.workers, data["classes"])[:2]
    print("| set | " + " | ".join([*models, "mean of logits", "entropy"]) + " |")
    print("|" + " --- |" * (len(models) + 3))
    for name, (images, labels) in sets.items():
        found = knowledge(images, labels, mean_std, models)
        print(f"| {name} | " + " | ".join(f"{found[key]:.1f}" for key in [*models, "mean"])
              + f" | {found['entropy']:.2f} |", flush=True)


if __name__ == "__main__":
    main()
