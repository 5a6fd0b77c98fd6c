"""Squeeze: train the backbones on the whole data set (phase 1 of 5).
G-VBSM, arXiv:2311.17950, Sec. 2, Tables 7-9.

Plain supervised training, the last epoch is kept; BatchNorm's running mean and variance become the statistics
of Eq. 1. On ImageNet-1k torchvision's pretrained weights take its place (--pretrained), or any classifier's
(--weights FILE). --objective moco is SC-DD's squeeze instead (arXiv:2404.07976, Sec. 2.4): MoCo, which sees
no labels, and then a linear probe as the classifier. --objective probe trains that probe alone, on the
self-supervised encoder of --weights FILE.

reads   data/<dataset>/...                                      the training and test images
writes  runs/<dataset>/teachers/<teachers>/<backbone>.pt        weights, classes, test accuracy, arguments
        runs/<dataset>/teachers/<teachers>/<backbone>@<epoch>.pt, <backbone>@pruned<i>.pt    weak teachers, when asked for
        runs/<dataset>/teachers/<teachers>/scores.pt            losses of the training images, with --prune-ratio
        runs/<dataset>/teachers/<teachers>/squeeze.json         the RESULT line

python squeeze.py --dataset cifar100                                       # paper setting, Table 9
python squeeze.py --dataset cifar10 --epochs 20 --teachers e20             # ablation, Table 11
python squeeze.py --dataset shapes                                         # smoke run: a minute, no download
"""
import argparse
import json
import os
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from models import build_model
from models.pruning import coupled, random_channels, shrink, widths
from utils import fail
from utils.adopt import adopt, has_large_stem, load_pretrained
from utils.augment import apply_view, draw_view, normalize
from utils.checkpoint import Checkpoint, load_finished, load_torch, reason, save_torch
from utils.cli import Parser, crop_name, epoch_range, identity_flags, number, parse_args
from utils.data import describe, load_split
from utils.ddp import gathered, in_parallel, share, share_weight
from utils.moco import MoCo, Probe, as_encoder, contrast, join_norms, neighbours_top1
from utils.processes import barrier, print_rank0, rank, rank0_first, world_size
from utils.provenance import AGAIN, check_classes, check_data, fingerprint, relevant
from utils.run import Run, begin, generator, peak_memory, script, send
from utils.scores import score_images
from utils.selection import count_forgetting, drop_largest
from utils.teachers import TEACHER, check_models, costs
from utils.train import Record, channels_last, fit, learning_rates, make_step, shuffled, split_accuracy, with_precision

PROBE = ["probe_epochs", "probe_lr", "probe_weight_decay"]
SCORES = ["score_trials", "score_epochs", "score_lr", "score_batch_size"]
# Teddy, supplement Sec. D.1: parameters a pruned teacher keeps; epochs of its last
PRUNED_SHARE, PRUNED_EPOCHS = 0.66, 2


def classify(model, optimizer, record, split, mean_std, *, crop, cuda_graphs=False):
    """-> train_epoch of `fit`: cross-entropy on flipped and cropped images of the split; streamed ones come
    so.
    record: of `forgetting_record`, which this goes on counting; mean_std [2, 3] on the device"""
    network, batch, view = in_parallel(model, mean_std.device), (), {}

    def loss_of(images, labels, *params):
        """-> loss, whether each image is classified correctly; of this process's share of `batch` and its
        `view`"""
        images = apply_view(images.float(), dict(zip(view, params)))
        logits = network(normalize(images, *mean_std))
        loss = F.cross_entropy(logits, labels) * share_weight(len(images), len(batch))
        return loss, logits.argmax(1) == labels

    step = make_step(optimizer, loss_of, cuda_graphs)

    def train_epoch(epoch, batches, rng):
        nonlocal batch, view
        for batch, (images, labels) in zip(batches,
                                           split.batches([share(rows) for rows in batches], crop_seed=epoch)):
            view = {} if split.streamed else draw_view(len(batch), split.image_size, crop, True, 0, rng)
            loss, correct = step(*send([images, labels, *map(share, view.values())], mean_std.device))
            record["correct"][send(batch, mean_std.device)] = gathered(correct, len(batch))
            yield loss
        correct = record["correct"]
        record["events"], record["learned"] = count_forgetting(record["events"], record["learned"],
                                                               record["prev_correct"], correct)
        record["prev_correct"], record["correct"] = correct, torch.zeros_like(correct)
    return train_epoch


def forgetting_record(count, device):
    """Of each of `count` images: forgetting events, whether ever learned, whether correct in this epoch and
    the one before."""
    flags = {key: torch.zeros(count, dtype=torch.bool, device=device)
             for key in ("learned", "correct", "prev_correct")}
    return Record(device, events=torch.zeros(count, dtype=torch.int16, device=device), **flags)


def sgd(model, args):
    """-> optimizer, the schedule of its learning rate"""
    optimizer = torch.optim.SGD(model.parameters(), lr=args.lr, momentum=args.momentum,
                                weight_decay=args.weight_decay, fused=next(model.parameters()).is_cuda)
    return optimizer, learning_rates(optimizer, args.schedule, args.epochs, warmup_epochs=args.warmup_epochs,
                                     step_epochs=args.step_epochs, step_factor=args.step_factor)


def train(name, model, split, train_rows, mean_std, args, checkpoint, *, record):
    """Supervised training in place on the images train_rows [N] of a split.
    -> generator of `fit`; args: of the training,
    args.remedy: printed where it does not converge"""
    optimizer, schedule = sgd(model, args)
    return fit((model, optimizer, schedule, record),
               shuffled(train_rows, args.batch_size, "squeeze", args.seed),
               classify(model, optimizer, record, split, mean_std, crop=args.crop,
                        cuda_graphs=args.cuda_graphs),
               epochs=args.epochs, name=name, resume=checkpoint.load(), remedy=args.remedy,
               save=checkpoint.save_if_due if rank() == 0 else None)  # the state is everybody's


def train_moco(model, key, splits, train_rows, mean_std, args, checkpoint):
    """SC-DD, Sec. 2.4: make the model a classifier whose last layer alone has seen labels, in place: MoCo
    with `key`, another model of its kind, and then `train_probe`. Either goes on from its checkpoint."""
    name = checkpoint.result.stem
    if checkpoint.read() is None:  # of the probe, which holds the features too
        moco = MoCo(as_encoder(model), as_encoder(key), size=args.queue).to(mean_std.device)
        optimizer, schedule = sgd(moco.query, args)
        schedule.step()                                              # MoCo counts epochs from 1
        for epoch in fit((moco, optimizer, schedule),
                         shuffled(train_rows, args.batch_size, "moco", args.seed, drop_last=True),
                         contrast(moco, optimizer, splits["train"], mean_std), epochs=args.epochs,
                         name=f"moco {name}",
                         resume=checkpoint.load("moco"), save=partial(checkpoint.save_if_due, piece="moco")):
            if epoch % max(1, args.epochs // 10) == 0 or epoch == args.epochs:
                top1 = neighbours_top1(moco.query, splits, train_rows, mean_std)
                print_rank0(f"moco {name}  epoch {epoch}: {top1:.2f} % of the test images by their nearest "
                            f"neighbours")
        join_norms(model)
    train_probe(model, splits["train"], train_rows, mean_std, args, checkpoint)


def train_probe(model, split, train_rows, mean_std, args, checkpoint):
    """Replace the model's last linear layer by one that is trained while all below stays as it is, in place
    (SC-DD, Table 16)."""
    probe, how = Probe(model, len(split.classes)), changed(
        args, epochs=args.probe_epochs, lr=args.probe_lr, momentum=0.9, weight_decay=args.probe_weight_decay,
        schedule="cosine", warmup_epochs=0, batch_size=256, crop="resized", remedy="use a smaller --probe-lr")
    for _ in train(f"probe {checkpoint.result.stem}", probe, split, train_rows, mean_std, how, checkpoint,
                   record=forgetting_record(len(split), mean_std.device)):
        pass
    probe.classifier()


def changed(args, **values):
    """A copy of the arguments with other values."""
    return argparse.Namespace(**vars(args) | values)


def prune_teacher(name, model, args, paths):
    """Teddy, supplement Sec. D.1: the trained weights, without random channels, in place.
    -> channels left, {layer: number}"""
    backbone = name.partition("@")[0]
    barrier()                                                   # until it is written
    try:
        model.load_state_dict(load_torch(path := paths.teachers / f"{backbone}.pt", AGAIN,
                                         TEACHER)["weights"])
    except RuntimeError as error:
        fail(f"{path} does not hold weights of {backbone} ({reason(error)}); {AGAIN}")
    chosen = random_channels(model, PRUNED_SHARE, generator("pruned", args.seed, name))
    return widths(shrink(model, chosen), chosen)


def fine_tuning(name, args):
    """How a pruned teacher is trained: 0 to PRUNED_EPOCHS epochs, more from one teacher to the next, at a
    rate of 0.1 that
    is 0.001 in the last one.   -> arguments"""
    epochs = (int(name.partition("@pruned")[2]) - 1) * (PRUNED_EPOCHS + 1) // args.pruned
    return changed(args, epochs=epochs, lr=0.1, batch_size=32, schedule="step", step_epochs=1,
                   step_factor=0.01 ** (1 / max(1, epochs - 1)), warmup_epochs=0, weight_decay=1e-4,
                   momentum=0.9, remedy="leave out --pruned")


def kept_rows(split, mean_std, args, paths, input_hashes, later):
    """Which training images are trained on: of every class all but the --prune-ratio of largest losses.
    -> sorted [n]
    later: files that are made from them"""
    if not args.prune_ratio:
        return torch.arange(len(split))
    path, own = paths.teachers / "scores.pt", {key: relevant(args)[key] for key in ("seed", *SCORES)}
    if stored := load_finished(path, args, input_hashes, own, ("scores",)):
        if len(scores := stored["scores"]) != len(split):
            fail(f"{path} holds {len(scores)} losses, of {len(split)} training images; {AGAIN}")
    else:
        with Checkpoint(path, args, input_hashes, own, later) as checkpoint:
            scores = score_images(split, mean_std, trials=args.score_trials, epochs=args.score_epochs,
                                  lr=args.score_lr,
                                  batch_size=args.score_batch_size, seed=args.seed, checkpoint=checkpoint)
            if rank() == 0:
                save_torch(path, {"scores": scores, "args": own, "made_from": input_hashes})
    kept = drop_largest(scores, split.labels.cpu(), args.prune_ratio)
    print_rank0(f"squeeze trains on {len(kept)} of {len(split)} images, those of smaller loss")
    return kept


def get_parser():
    parser = identity_flags(Parser(__doc__))
    method = parser.add_argument_group("method")
    method.add_argument("--pretrained", action=argparse.BooleanOptionalAction, default=False,
                        help="torchvision's ImageNet weights instead of training")
    method.add_argument("--crop", type=crop_name, default="pad4",
                        help="augmentation beside flips: none, resized, pad<pixels>")
    method.add_argument("--download", action="store_true",
                        help="fetch a named data set or pretrained weights when missing")
    method.add_argument("--weights", type=Path, metavar="FILE",
                        help="a state dict for the one --backbones: a classifier's, or with --objective "
                        "probe an encoder's")
    method.add_argument("--objective", choices=["supervised", "moco", "probe"], default="supervised",
                        help="moco trains without labels, then a linear probe with them; probe: that alone "
                        "[SC-DD]")
    moco = parser.add_argument_group("MoCo [SC-DD]")
    moco.add_argument("--queue", type=number(int, 1), default=4096, help="keys that MoCo contrasts with [K]")
    moco.add_argument("--probe-epochs", type=number(int, 1), default=100, help="of the linear probe")
    moco.add_argument("--probe-lr", type=number(float, 0), default=30.0,
                      help="SGD learning rate of the probe, cosine")
    moco.add_argument("--probe-weight-decay", type=number(float, 0), default=0.0,
                      help="of the probe, 0 = off")
    pool = parser.add_argument_group("weak teachers [Teddy]")
    pool.add_argument("--save-epochs", type=epoch_range, default="none", metavar="FIRST:LAST:STEP",
                      help="also keep the weights after these epochs, as <backbone>@<epoch>, or none")
    pool.add_argument("--pruned", type=number(int, 0, 1000), default=0,
                      help="also make so many, <backbone>@pruned<i>: without random channels, fine-tuned a "
                      "little")
    pruning = parser.add_argument_group("pruning of the training images [BiLP]")
    pruning.add_argument("--prune-ratio", type=number(float, 0, 0.999), default=0.0,
                         help="of each class's images, those of largest loss, not trained on [alpha]")
    pruning.add_argument("--score-trials", type=number(int, 1), default=50,
                         help="trainings that an image's loss is averaged over")
    pruning.add_argument("--score-epochs", type=number(int, 1), default=100, help="of each")
    pruning.add_argument("--score-lr", type=number(float, 0), default=3e-3, help="SGD learning rate of each")
    pruning.add_argument("--score-batch-size", type=number(int, 1), default=512,
                         help="images per step of each")
    optimization = parser.add_argument_group("optimization")
    optimization.add_argument("--epochs", type=number(int, 1), default=50,
                              help="passes over the training images")
    optimization.add_argument("--batch-size", type=number(int, 1), default=64,
                              help="images per step; a last one alone joins the batch before")
    optimization.add_argument("--lr", type=number(float, 0), default=0.05, help="SGD learning rate")
    optimization.add_argument("--momentum", type=number(float, 0, 1), default=0.9,
                              help="SGD momentum, 0 = off")
    optimization.add_argument("--weight-decay", type=number(float, 0), default=0.0,
                              help="SGD weight decay, 0 = off")
    optimization.add_argument("--schedule", choices=["constant", "cosine", "step"], default="constant",
                              help="of the learning rate")
    optimization.add_argument("--warmup-epochs", type=number(int, 0), default=0,
                              help="of a rising learning rate first, 0 = off")
    optimization.add_argument("--cuda-graphs", action=argparse.BooleanOptionalAction, default=False,
                              help="replay a step of supervised training as one launch; for GPUs that wait "
                              "for the host")
    return parser


def main(argv=None):
    args = parse_args(get_parser(), "squeeze", argv)
    args.weights_file = args.weights
    if args.weights:
        if not args.weights.is_file():
            fail(f"--weights {args.weights}: no such file; name a checkpoint")
        args.weights, args.pretrained = f"sha256:{fingerprint(args.weights)[:16]}", False  # whatever its path
    device, paths = begin(args)
    if device.type == "cuda" and (gpus := torch.cuda.device_count()) < int(os.environ.get("LOCAL_WORLD_SIZE",
                                                                                          1)):
        fail(f"--nproc-per-node is more than the {gpus} GPUs of this machine; squeeze.py takes one for each "
             f"process")
    if args.cuda_graphs and (device.type != "cuda" or world_size() > 1):
        fail("--cuda-graphs needs a GPU (--device cuda) and a single process; leave it out")
    check_backbones(args)
    names, result = [one for name in args.backbones
                     for one in teachers_of(name, args)], paths.teachers / "squeeze.json"
    accuracies, variances = already_there(names, args, paths)
    todo = [name for name in names if name not in accuracies]
    run = Run("squeeze", args, result)
    if not todo and run.unchanged(settings(args) | {"backbones": args.backbones}, top1=accuracies):
        return None
    made = make(todo, args, device, paths, accuracies, variances) if todo else {}
    spent = costs(result) | made  # now, for it may be another process's too
    summary = ", ".join(f"{name} {accuracies[name]:.1f} %" for name in names)
    return run.finish({"top1": {name: accuracies[name] for name in names},
                       "first_bn_variance": {name: variances[name] for name in names}, "costs": spent},
                      f"{summary} of the test images (chance {100 / args.data_set['classes']:.1f} %)",
                      seconds=sum(spent[name]["seconds"] for name in names if name in spent))


def load_data(args, device):
    """-> {split: images}, what teachers remember of the data (`describe`)"""
    with rank0_first():
        splits = {split: load_split(args.dataset, args.data_dir, split, args.image_size, args.workers,
                                    args.download, args.holdout, args.imbalance).to(device)
                  for split in ("train", "test")}
    data = describe(args.dataset, args.data_dir, args.image_size, args.workers, args.data_set["fingerprint"])
    check_classes(splits["test"].classes, data["classes"], "the test split", "the training split")
    if args.objective == "supervised":
        splits["train"].check_crop("resized" if args.weights else args.crop)
    check_models("--backbones", args.backbones, build_model, len(data["classes"]), data["image_size"])
    return splits, data


def make(todo, args, device, paths, accuracies, variances):
    """Train teachers, test them and write their checkpoints; what they reach goes to accuracies and
    variances, {name: value}.
    -> {name: what it took}"""
    splits, data = load_data(args, device)
    mean_std, split = torch.tensor([data["mean"], data["std"]], device=device), splits["train"]
    input_hashes = {"data": fingerprint(json.dumps([data, len(split)]))}
    files = [paths.teachers / f"{name}.pt" for name in todo]
    rows = kept_rows(split, mean_std, args, paths, input_hashes, files)
    if args.objective == "moco":
        check_moco_data(split, rows, args)

    def place(model):
        return with_precision(channels_last(model.to(device)), device, args.precision)

    def save(name, model, backbone, **more):
        """Test a model and write its checkpoint."""
        accuracies[name] = split_accuracy(model, splits["test"], mean_std, jointly=True)
        print_rank0(f"{name}: {accuracies[name]:.2f} % of the test images")
        variances[name] = first_bn_variance(name, model.state_dict())
        if rank() == 0:
            save_torch(paths.teachers / f"{name}.pt",
                       {"backbone": backbone, "data": data, "top1": accuracies[name],
                        "tested": len(splits["test"]), "trained": len(split),
                        "weights": {key: value.cpu() for key, value in model.state_dict().items()},
                        "args": relevant(args), **more})

    made = {}
    for i, name in enumerate(todo):
        backbone, _, kind = name.partition("@")
        if kind.isdigit():
            continue                                                 # saved while its backbone was trained
        how = changed(args, step_epochs=30, step_factor=0.1, remedy="use a smaller --lr")
        more = {"kept": rows} if args.prune_ratio else {}
        model, backbone = initial_model(backbone, args, data)
        if kind:
            how, more["widths"] = fine_tuning(name, args), prune_teacher(name, model, args, paths)
        model = place(model)
        identity = settings(args, name) | {"objective": args.objective, "backbone": name,
                                           "save_epochs": args.save_epochs}
        with Checkpoint(files[i], args, input_hashes, identity, files[i + 1:]) as checkpoint:
            if args.objective == "moco":
                train_moco(model, place(network(backbone, data)), splits, rows, mean_std, how, checkpoint)
            elif args.objective == "probe":
                train_probe(model, split, rows, mean_std, how, checkpoint)
            elif kind or not (args.pretrained or args.weights):
                record = forgetting_record(len(split), device)
                for epoch in train(f"squeeze {name}", model, split, rows, mean_std, how, checkpoint,
                                   record=record):
                    if epoch in saved_epochs(args) and not kind:
                        save(f"{name}@{epoch}", model, backbone, **more)
                if not kind:
                    more["forgetting"] = {key: record[key].cpu() for key in ("events", "learned")}
            save(name, model, backbone, **more)
            made[name] = {"seconds": round(checkpoint.seconds(), 1), "peak_memory": peak_memory()}
    return made


def network(backbone, data):
    return build_model(backbone, len(data["classes"]), data["image_size"])


def initial_model(backbone, args, data):
    """A backbone with the weights of --weights or --pretrained, or as it is trained from.
    -> model, its name"""
    torch.manual_seed(generator("weights", args.seed, backbone).initial_seed())
    if args.weights and has_large_stem(network(backbone, data), args.weights_file):
        backbone += "_stem7"
    model = network(backbone, data)
    if args.weights:
        adopt(model, args.weights_file, encoder=args.objective == "probe")
    elif args.pretrained:
        with rank0_first():
            load_pretrained(backbone, model, args.download)
    return model, backbone


def already_there(names, args, paths):
    """Of the teachers that need not be made.   -> {name: top-1}, {name: `first_bn_variance`}"""
    accuracies, variances = {}, {}
    for name in names:
        path = paths.teachers / f"{name}.pt"
        own = settings(args, name) | {"objective": args.objective}
        if record := load_finished(path, args, settings=own, keys=TEACHER):
            check_data(record["data"].get("fingerprint"), args, path)
            accuracies[name], variances[name] = record["top1"], first_bn_variance(name, record["weights"])
    for name in names:
        backbone, _, kind = name.partition("@")
        if name not in accuracies and kind.isdigit() and backbone in accuracies:
            fail(f"{paths.teachers / name}.pt is missing, and could be saved while {backbone}.pt was trained "
                 f"alone; {AGAIN}, "
                 "or name another --teachers")
    return accuracies, variances


def check_backbones(args):
    """Stop where those that are asked for cannot be made, whatever the data."""
    if weak := [name for name in args.backbones if "@" in name]:
        fail(f"--backbones {weak[0]}: squeeze.py makes it of {weak[0].partition('@')[0]}; name that, and "
             f"--save-epochs or --pruned")
    check_models("--backbones", args.backbones, build_model)
    if args.objective == "moco":
        check_moco(args)
    if args.objective == "probe" and not args.weights:
        fail("--objective probe trains a classifier on an encoder: name its checkpoint (MoCo, SwAV, DINO) "
             "with "
             "--weights FILE and its network with --backbones, or use --objective moco up to 64 pixels")
    if args.weights and len(args.backbones) > 1:
        fail(f"--weights {args.weights_file} is of one network, and --backbones names {len(args.backbones)}; "
             f"name one, and call "
             "squeeze.py again for each other")
    if args.weights and args.objective == "moco":
        fail("--objective moco trains the weights; leave out --weights, or use --objective probe")
    if args.weights and (saved_epochs(args) or args.pruned):
        fail("--weights: adopted weights have no epochs and make no weak teachers; leave out --save-epochs "
             "and --pruned")
    if max(saved_epochs(args), default=1) > args.epochs:
        fail(f"--epochs {args.epochs} is too few for --save-epochs {args.save_epochs}; use more")
    if args.warmup_epochs >= args.epochs:
        fail(f"--epochs {args.epochs} is too few for --warmup-epochs {args.warmup_epochs}; use more")
    if args.pretrained and saved_epochs(args):
        fail(f"--save-epochs {args.save_epochs}: pretrained weights have no epochs; use --save-epochs none "
             f"or --no-pretrained")
    for name in args.backbones if args.pruned else ():
        with torch.device("meta"):
            if not coupled(build_model(name, 10, 224)):
                fail(f"--pruned {args.pruned}: {name} has no channels that can be removed; name other "
                     f"--backbones")


def teachers_of(name, args):
    """The names of a backbone and of the weak teachers made with it."""
    return [name, *(f"{name}@{epoch}" for epoch in saved_epochs(args)),
            *(f"{name}@pruned{i + 1}" for i in range(args.pruned))]


def saved_epochs(args):
    """Those of --save-epochs."""
    first, last, step = map(int, (args.save_epochs if args.save_epochs != "none" else "1:0:1").split(":"))
    return range(first, last + 1, step)


def check_moco(args):
    """Stop where MoCo cannot be trained, whatever the data."""
    if args.pretrained:
        fail("--objective moco trains the weights that --pretrained would take from torchvision; add "
             "--no-pretrained")
    if saved_epochs(args) or args.pruned:
        fail("--objective moco makes no weak teachers; leave out --save-epochs and --pruned")
    if args.epochs < 2:
        fail(f"--epochs {args.epochs}: MoCo counts its cosine's epochs from 1, so that the last has the rate "
             f"0; use at least 2")
    if world_size() > 1:
        fail("--objective moco trains in one process; run it without torchrun")
    if args.batch_size % 8 or args.batch_size < 16:
        fail(f"--batch-size {args.batch_size}: MoCo normalises 8 parts of a batch, each of at least 2 "
             f"images; "
             "use a multiple of 8 from 16 on")
    for name in args.backbones:
        with torch.device("meta"):
            if not any(isinstance(layer, nn.Linear) for layer in build_model(name, 10, 224).modules()):
                fail(f"--backbones {name}: MoCo's outputs take the place of a linear layer, and it has none; "
                     f"name others")


def check_moco_data(split, kept, args):
    """The same, for these training images."""
    if split.streamed:
        fail(f"--objective moco is for images of at most 64 pixels, not {split.image_size}; use a smaller "
             f"--image-size, or "
             "--objective probe --weights FILE with an encoder that was trained elsewhere")
    if len(kept) < args.batch_size:
        fail(f"--batch-size {args.batch_size} is more than the {len(kept)} training images, and MoCo takes "
             f"whole batches "
             "alone; use a smaller one")


def first_bn_variance(name, weights):
    """Variance over the channels of the first BatchNorm's running means (SC-DD, Table 2: the larger, the more
    a squeezed backbone tells), of a state_dict; None without BatchNorm. Also printed."""
    means = next((value for key, value in weights.items() if key.endswith("running_mean")), None)
    variance = None if means is None else means.float().var(correction=0).item()
    if means is not None:
        print_rank0(f"{name}: the running means of its first BatchNorm vary by {variance:.5f} over the "
                    f"channels")
    return variance


def settings(args, name=""):
    """The arguments that decide a backbone's weights."""
    names = ["dataset", "holdout", "imbalance", "image_size", "seed", "precision", "pretrained", "weights",
             "prune_ratio"]
    names += SCORES * (args.prune_ratio > 0) + ["objective"] * (args.objective != "supervised")
    if args.objective == "probe":
        names += PROBE
    elif not (args.pretrained or args.weights):
        names += ["epochs", "batch_size", "lr", "momentum", "weight_decay", "schedule", "warmup_epochs"]
        names += ["queue", *PROBE] if args.objective == "moco" else ["crop"]
    if "@pruned" in name:
        names += ["crop", "pruned"]
    return {name: relevant(args)[name] for name in names}


if __name__ == "__main__":
    script(main)
