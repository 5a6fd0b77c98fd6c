"""MoCo on small images, as the squeeze of SC-DD (Sec. 2.4): contrast of two views, a monitor, a linear probe.

MoCo v2's CIFAR-10 recipe: no MLP head, BatchNorm in splits instead of several GPUs, asymmetric loss.
"""
import argparse
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models import build_model
from utils import fail
from utils.augment import apply_colour, apply_view, draw_colour, draw_view, normalize
from utils.checkpoint import Checkpoint
from utils.data import Split
from utils.processes import print_rank0, world_size
from utils.run import generator, send
from utils.train import Training, fit, make_step, shuffled


class SplitBatchNorm(nn.BatchNorm2d):
    """BatchNorm2d that in training normalises `splits` parts of the batch by their own statistics, as so many
    GPUs would. Part j are the samples j, j + splits, j + 2 splits, ...: x [N, C, H, W] is read as [N /
    splits, splits * C, H, W]. The running statistics become the mean over the parts of what each would have
    made of them."""
    splits = 8

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        parts = x.reshape(len(x) // self.splits, self.splits * x.shape[1], *x.shape[2:])
        running = self.running_mean.repeat(self.splits), self.running_var.repeat(self.splits)
        affine = self.weight.repeat(self.splits), self.bias.repeat(self.splits)
        parts = F.batch_norm(parts, *running, *affine, True, self.momentum, self.eps)
        with torch.no_grad():
            self.num_batches_tracked += 1
            for mine, theirs in zip((self.running_mean, self.running_var), running):
                mine.copy_(theirs.view(self.splits, -1).mean(0))
        return parts.reshape(x.shape)


def with_norms(model: nn.Module, kind: type) -> nn.Module:
    """Its BatchNorm2d layers become SplitBatchNorm, or nn.BatchNorm2d again, in place.   -> the model"""
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.__class__ = kind
    return model


def last_linear(model: nn.Module) -> str:
    """Name of the model's last nn.Linear, its classifier."""
    return [name for name, layer in model.named_modules() if isinstance(layer, nn.Linear)][-1]


def as_encoder(model: nn.Module, dim: int = 128) -> nn.Module:
    """Make a classifier one of MoCo's encoders, in place: its last nn.Linear gives `dim` numbers, its
    BatchNorms are split.   -> the model"""
    name = last_linear(model)
    old = model.get_submodule(name)
    model.set_submodule(name, nn.Linear(old.in_features, dim).to(old.weight))
    return with_norms(model, SplitBatchNorm)


class MoCo(nn.Module):
    """Momentum contrast of two encoders, each images -> [N, dim], not normalised; the module gives the loss.

    query is trained; key, of the same architecture, starts as its copy, follows its parameters and keeps
    buffers of its own. queue [dim, size]: unit columns, random at first; pointer: the column that is replaced
    next. The state_dict holds all that a next step depends on.
    """

    def __init__(self, query, key, dim=128, size=4096, momentum=0.99, temperature=0.1):
        super().__init__()
        key.load_state_dict(query.state_dict())
        self.query, self.key = query, key.requires_grad_(False)
        self.momentum, self.temperature = momentum, temperature
        self.register_buffer("queue", F.normalize(torch.randn(dim, size), dim=0))
        self.register_buffer("pointer", torch.tensor(0))

    def forward(self, query_images: Tensor, key_images: Tensor, order: Tensor) -> Tensor:
        """InfoNCE of two views [N, 3, S, S] of the same images: the mean cross-entropy of (query . its key,
        query . queue) / temperature against the former. First the key encoder follows the query's, at the end
        the N keys enter the queue.
        order: a permutation of the N keys, in which their encoder sees them (ShuffleBN)."""
        query = F.normalize(self.query(query_images))
        with torch.no_grad():
            for mine, theirs in zip(self.key.parameters(), self.query.parameters()):
                mine.lerp_(theirs, 1 - self.momentum)
            key = F.normalize(self.key(key_images[order]))[order.argsort()]
        negative = query @ self.queue.clone()                        # the backward pass needs it as it was
        logits = torch.cat([(query * key).sum(1, keepdim=True), negative], 1) / self.temperature
        with torch.no_grad():                        # the oldest columns; behind the last comes the first
            size = self.queue.shape[1]
            columns = (self.pointer + torch.arange(len(key), device=key.device)) % size
            self.queue[:, columns[-size:]] = key[-size:].T
            self.pointer.copy_((self.pointer + len(key)) % size)
        return F.cross_entropy(logits, torch.zeros(len(logits), dtype=torch.long, device=logits.device))


def train_moco(model: nn.Module, key: nn.Module, splits: dict[str, Split], rows: Tensor, mean_std: Tensor,
               training: Training, queue: int, checkpoint: Checkpoint) -> None:
    """SC-DD, Sec. 2.4: train a classifier's features on two views of each of the training images `rows`,
    without labels, in place; its last layer is then of no use.
    key: another model of its kind; queue: keys that MoCo contrasts with; mean_std [2, 3] on the device"""
    split, device, name = splits["train"], mean_std.device, f"moco {checkpoint.result.stem}"
    moco = MoCo(as_encoder(model), as_encoder(key), size=queue).to(device)
    optimizer, schedule = training.optimizer(moco.query)
    schedule.step()                                                  # MoCo counts epochs from 1
    step = make_step(optimizer, lambda *views: (moco(*views),))

    def view(images, rng):
        crop = draw_view(len(images), split.image_size, "resized", True, 0, rng)
        colour = draw_colour(len(images), rng)
        images = apply_view(images.float() / 255, send(crop, device))
        return normalize(255 * apply_colour(images, send(colour, device)), *mean_std)

    def train_epoch(epoch, batches, rng):
        for images, _ in split.batches(batches):
            images = send(images, device)
            first, second = view(images, rng), view(images, rng)
            loss, = step(first, second, send(torch.randperm(len(images), generator=rng), device))
            yield loss

    draws = shuffled(rows, training.batch_size, partial(generator, "moco", training.seed), drop_last=True)
    for epoch in fit((moco, optimizer, schedule), draws, train_epoch, epochs=training.epochs, name=name,
                     resume=checkpoint.load("moco"), save=partial(checkpoint.save_if_due, piece="moco")):
        if epoch % max(1, training.epochs // 10) == 0 or epoch == training.epochs:
            top1 = neighbours_top1(moco.query, splits, rows, mean_std)
            print_rank0(f"{name}  epoch {epoch}: {top1:.2f} % of the test images by their nearest neighbours")
    with_norms(model, nn.BatchNorm2d)


@torch.inference_mode()
def neighbours_top1(model: nn.Module, splits: dict[str, Split], rows: Tensor, mean_std: Tensor) -> float:
    """`knn_top1` of a model: the bank is `rows` of splits["train"], the queries are splits["test"]."""
    model.eval()
    found = []
    for split, chosen in (splits["train"], rows), (splits["test"], torch.arange(len(splits["test"]))):
        batches = [(model(normalize(send(images, mean_std.device), *mean_std)), send(labels, mean_std.device))
                   for images, labels in split.batches(chosen.split(500))]
        found += [torch.cat(parts) for parts in zip(*batches)]
    return knn_top1(*found, len(splits["train"].classes))


@torch.inference_mode()
def knn_top1(bank: Tensor, bank_labels: Tensor, queries: Tensor, labels: Tensor, classes: int, k: int = 200,
             temperature: float = 0.1, chunk: int = 512) -> float:
    """Top-1 in % of queries [M, D] by a vote of the k nearest of bank [N, D] in cosine similarity, each with
    the weight exp(similarity / temperature)."""
    bank, queries, correct = F.normalize(bank), F.normalize(queries), 0
    for rows, truth in zip(queries.split(chunk), labels.split(chunk)):
        similarity, nearest = (rows @ bank.T).topk(min(k, len(bank)))
        votes = rows.new_zeros(len(rows), classes)
        votes.scatter_add_(1, bank_labels[nearest], (similarity / temperature).exp())
        correct += (votes.argmax(1) == truth).sum()
    return 100 * correct.item() / len(labels)


class Probe(nn.Module):
    """A linear classifier on the features of a model, which takes the place of its last nn.Linear. Only it is
    trained: all below stays in eval mode and as it is."""

    def __init__(self, model, classes):
        super().__init__()
        self.name = last_linear(model)
        old = model.get_submodule(self.name)
        model.set_submodule(self.name, nn.Identity())
        self.features = model.requires_grad_(False)
        self.linear = nn.Linear(old.in_features, classes).to(old.weight)

    def train(self, mode: bool = True) -> "Probe":
        super().train(mode)
        self.features.eval()
        return self

    def forward(self, images: Tensor) -> Tensor:
        with torch.no_grad():
            features = self.features(images)
        return self.linear(features)

    def classifier(self) -> nn.Module:
        """The model with the trained layer in it, an ordinary one again."""
        self.features.set_submodule(self.name, self.linear)
        return self.features


def check_objective(args: argparse.Namespace) -> None:
    """Stop where squeeze.py cannot train MoCo or a probe by these arguments, whatever the data."""
    for name in args.backbones:
        with torch.device("meta"):
            if not any(isinstance(layer, nn.Linear) for layer in build_model(name, 10, 224).modules()):
                fail(f"--backbones {name}: MoCo and the probe replace its last linear layer, and it has "
                     "none; name others")
    if args.objective == "probe":
        return
    if args.weights or args.pretrained:
        fail("--objective moco trains the weights; leave out --weights, add --no-pretrained, or use "
             "--objective probe")
    if args.epochs < 2:
        fail(f"--epochs {args.epochs}: MoCo counts its cosine's epochs from 1, so that the last has the rate "
             "0; use at least 2")
    if world_size() > 1:
        fail("--objective moco trains in one process; run it without torchrun")
    if args.batch_size % 8 or args.batch_size < 16:
        fail(f"--batch-size {args.batch_size}: MoCo normalises 8 parts of a batch, each of at least 2 "
             "images; use a multiple of 8 from 16 on")


def check_moco_data(split: Split, count: int, batch_size: int) -> None:
    """Stop where MoCo cannot train on `count` images of a split: streamed ones, or fewer than a batch."""
    if split.streamed:
        fail(f"--objective moco is for images of at most 64 pixels, not {split.image_size}; use a smaller "
             "--image-size, or --objective probe --weights FILE with an encoder that was trained elsewhere")
    if count < batch_size:
        fail(f"--batch-size {batch_size} is more than the {count} training images, and MoCo takes only "
             "whole batches; use a smaller one")
