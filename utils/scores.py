"""BiLP's preemptive pruning (arXiv:2305.18381, supplement Sec. 6.4): the training images of largest loss are
left out.
"""
import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models import build_model
from utils import fail
from utils.augment import normalize
from utils.checkpoint import Checkpoint, load_finished, save_torch
from utils.data import Split
from utils.processes import barrier, print_rank0, rank, shard, world_size
from utils.provenance import AGAIN, relevant
from utils.run import generator, send
from utils.selection import drop_largest, last_epoch_weights
from utils.train import Record, Training, fit, make_step, shuffled


SCORES = ["score_trials", "score_epochs", "score_lr", "score_batch_size"]


def kept_rows(split: Split, mean_std: Tensor, args: argparse.Namespace, path: Path, hashes: dict,
              later: list[Path]) -> Tensor:
    """Which training images squeeze.py trains on: of every class all but the --prune-ratio of largest losses,
    stored at `path`.   hashes: of the data; later: files that are made from these images   -> sorted [n]"""
    if not args.prune_ratio:
        return torch.arange(len(split))
    own = {key: relevant(args)[key] for key in ("seed", *SCORES)}
    if stored := load_finished(path, args, hashes, own, ("scores",)):
        scores = stored["scores"]
        if len(scores) != len(split):
            fail(f"{path} holds {len(scores)} losses, of {len(split)} training images; {AGAIN}")
    else:
        with Checkpoint(path, args, hashes, own, later) as checkpoint:
            scores = score_images(split, mean_std, trials=args.score_trials, epochs=args.score_epochs,
                                  lr=args.score_lr, batch_size=args.score_batch_size, seed=args.seed,
                                  checkpoint=checkpoint)
            if rank() == 0:
                save_torch(path, {"scores": scores, "args": own, "made_from": hashes})
    kept = drop_largest(scores, split.labels.cpu(), args.prune_ratio)
    print_rank0(f"squeeze trains on {len(kept)} of {len(split)} images, those of smaller loss")
    return kept


def score_images(split: Split, mean_std: Tensor, *, trials: int, epochs: int, lr: float, batch_size: int,
                 seed: int, checkpoint: Checkpoint) -> Tensor:
    """The loss of every training image for a small ConvNet, smoothed along the epochs of a training
    (`last_epoch_weights`); the mean over `trials` trainings, which the processes of torchrun share.   -> [N]
    The paper does not say: SGD with momentum 0.9, no augmentation, and an image's loss is the one it is
    trained with.   mean_std [2, 3] on the device"""
    device, mine, piece = mean_std.device, shard(range(trials)), f"{rank()} of {world_size()}"
    record = Record(device, trial=0, scores=torch.zeros(len(split), device=device))
    resume = checkpoint.load(piece)
    if not resume or "scores" not in resume:                         # else all of its trainings are done
        for i in range(resume["trained"][-1]["trial"] if resume else 0, len(mine)):
            torch.manual_seed(generator("score", seed, mine[i]).initial_seed())
            model = score_network(len(split.classes), split.image_size).to(device)
            training = Training("score", epochs, batch_size, lr, weight_decay=0, schedule="constant")
            optimizer, schedule = training.optimizer(model)
            record["trial"] = i
            for _ in fit((model, optimizer, schedule, record),
                         shuffled(torch.arange(len(split)), batch_size,
                                  partial(generator, "score", seed, mine[i])),
                         add_losses(model, optimizer, record, split, mean_std, last_epoch_weights(epochs)),
                         epochs=epochs, name=f"squeeze scores, training {i + 1} of {len(mine)}",
                         resume=resume, save=partial(checkpoint.save_if_due, piece=piece),
                         remedy="use a smaller --score-lr"):
                pass
            resume = None                                            # was of one training
        checkpoint.save({"scores": record["scores"]}, piece)
    barrier()
    total = sum(checkpoint.read(f"{other} of {world_size()}")["scores"] for other in range(world_size()))
    barrier()                                                   # before the pieces are removed
    return total.cpu() / trials


def score_network(num_classes: int, image_size: int) -> nn.Module:
    """A ConvNet of 128 channels and three blocks, its last map averaged to 128 numbers (BiLP, Suppl. 6.2)."""
    *blocks, _, _ = build_model("convnet_w128", num_classes, image_size)  # without flatten and linear layer
    return nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, num_classes))


def add_losses(model: nn.Module, optimizer: torch.optim.Optimizer, record: Record, split: Split,
               mean_std: Tensor, weights: Tensor) -> Callable:
    """-> train_epoch of `fit`: cross-entropy; record["scores"] [N] gains weights[epoch] times each loss."""
    def loss_of(images, labels):
        losses = F.cross_entropy(model(normalize(images, *mean_std)), labels, reduction="none")
        return losses.mean(), losses.detach()

    step = make_step(optimizer, loss_of)

    def train_epoch(epoch, batches, rng):
        for batch, (images, labels) in zip(batches, split.batches(batches)):
            loss, losses = step(*send([images, labels], mean_std.device))
            record["scores"][send(batch, mean_std.device)] += weights[epoch].item() * losses
            yield loss
    return train_epoch
