"""Distribution matching (DM: Zhao & Bilen, WACV 2023, arXiv:2110.04181) and BiLP's adaptive pruning of the
real images it sees (Xu et al., ECCV 2024, arXiv:2305.18381).

`embed` is a function: images [B, 3, S, S] -> features [B, d], of each image alone (no BatchNorm that learns
from a batch).
"""
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from models import build_model
from utils.augment import apply_siamese, draw_siamese, normalize
from utils.recorder import Recorder
from utils.run import generator
from utils.selection import RealImages

COPIES = 64             # synthetic images in a pass of `ite_norms`, which bounds its memory


def dm_loss(real: Tensor, synthetic: Tensor) -> Tensor:
    """||mean(real) - mean(synthetic)||^2, summed over features [N, d] and [n, d] of one class (DM)."""
    return (real.mean(0) - synthetic.mean(0)).square().sum()


def ite_norms(embed: Callable, synthetic: Tensor, features: Tensor, products: int = 16) -> Tensor:
    """||ITE||_2, the effect of one real image on the gradient, of the N real images of a class with these
    features [N, d], as BiLP defines it for the loss L of `dm_loss`, with synthetic [n, 3, S, S] as D_s:
        ITE(x) = d L(D_r, D_s) / d D_s - d L(D_r without x, D_s) / d D_s,
    by a forward pass, a vector-Jacobian and a Jacobian-vector product of `products` copies of D_s, whatever N
    is; 16 err by 6 % in rank, 32 by 3 %.   -> [N]

    dL/dD_s = -2 J^T (m_r - m_s), J the Jacobian of m_s = mean embed(D_s), is linear in m_r, and leaving x_i
    out moves m_r by -a_i / (N - 1), a_i = f_i - m_r. So the Taylor form is exact (a factor (N - 1) / N where
    the samples' weight 1 / N stays):
        ITE_i = -2 / (N - 1) J^T a_i,      ||ITE_i||^2 = 4 / (N - 1)^2  a_i^T M a_i,      M = J J^T.
    M is applied to the leading principal directions B of the a_i, found by two power iterations that start at
    the first `products` of the a_i. With a = B c + r, the terms c^T (B^T M B) c + 2 r^T (M B) c are exact;
    the last, r^T M r, is approximated by (min over b of b^T M b) |r|^2. With N - 1 or more directions r = 0,
    and all is exact.
    """
    N, n = len(features), len(synthetic)
    if N == 1:
        return features.new_zeros(1)                                 # nothing is left to compare with
    centred = features - features.mean(0)
    basis = centred[:products].T
    for _ in range(2):
        basis = torch.linalg.qr(centred.T @ (centred @ basis)).Q     # [d, K]
    mapped = []                                                      # M b of each direction b
    for directions in basis.T.split(max(1, COPIES // n)):
        copies = synthetic.detach().repeat(len(directions), 1, 1, 1).requires_grad_()
        cotangent = directions.repeat_interleave(n, 0).requires_grad_()
        pulled, = torch.autograd.grad(embed(copies), copies, cotangent / n, create_graph=True)       # J^T b
        pushed, = torch.autograd.grad(pulled, cotangent, pulled.detach())  # linear in b: J J^T b
        mapped.append(pushed.unflatten(0, (-1, n)).sum(1))
    mapped = torch.cat(mapped)                                       # [K, d]
    inner, along = mapped @ basis, centred @ basis
    rest = centred - along @ basis.T
    squared = ((along @ inner) * along).sum(1) + 2 * (along * (rest @ mapped.T)).sum(1)
    squared = squared + inner.diagonal().min() * rest.square().sum(1)
    return 2 / (N - 1) * squared.clamp(min=0).sqrt()


def new_pruning(num_classes: int, num_images: int) -> dict[str, Tensor]:
    """State of adaptive pruning: running mean and variance of ||ITE|| per class (nan before the first), and
    which images of the data set are kept."""
    mean, var = torch.full((2, num_classes), torch.nan, dtype=torch.float64)
    return {"mean": mean, "var": var, "keep": torch.ones(num_images, dtype=torch.bool)}


def prune(state: dict[str, Tensor], label: int, index: Tensor, norms: Tensor, ratio: float) -> Tensor:
    """Update the class's running mean and variance by ||ITE|| [N] of its real images index [N], then keep the
    images between the quantiles ratio/2 and 1 - ratio/2 of the normal distribution with these moments, or all
    where none lies there. Changes state.   -> bool [N]

    Ours, as the supplement does not say: equal tails, and the variance about the running mean, since norms
    differ between networks too, and a batch's own variance would prune more than the ratio."""
    norms, mean, var = norms.double().cpu(), state["mean"], state["var"]
    first = mean[label].isnan()
    mean[label] = norms.mean() if first else 0.9 * mean[label] + 0.1 * norms.mean()
    spread = (norms - mean[label]).square().mean()
    var[label] = spread if first else 0.9 * var[label] + 0.1 * spread
    reach = torch.special.ndtri(torch.tensor(1 - ratio / 2, dtype=torch.float64)) * var[label].sqrt()
    kept = (norms - mean[label]).abs() <= reach
    state["keep"][index] = kept = kept | ~kept.any()
    return kept


def random_embedding(num_classes: int, size: int, key: tuple, device: torch.device) -> nn.Module:
    """A ConvNet as deep as usual at this size, weights of `generator(*key)`: images -> its last features."""
    with torch.random.fork_rng(devices=[]):  # build_model draws from torch's global generator
        torch.default_generator.manual_seed(int(torch.randint(1 << 62, (), generator=generator(*key))))
        model = build_model(f"convnet_w128_d{max(3, math.ceil(math.log2(size)) - 2)}", num_classes, size)
    layers = [nn.AvgPool2d(2) if isinstance(layer, nn.AvgPool2d) else layer     # not `Halve`, whose second
              for layer in list(model.children())[:-1]]                         # derivative takes a CPU long
    return nn.Sequential(*layers).requires_grad_(False).to(device)


def run_dm(recorder: Recorder, real: RealImages, by_class: list[list[tuple]], images: Tensor, *,
           iterations: int, seed: int, lr: float, real_batch: int, ratio: float, period: int) -> None:
    """DM for all classes, logged, saved and written. images [classes, ipc, 3, S, S] in normalised units,
    numbered (class, index) as `by_class`, are changed in place and, as in the original, not clamped.

    An iteration's network is a function of (seed, iteration), a class's real images and augmentation of the
    class too. With a ratio, every `period` iterations the real images are drawn from all and scored anew, so
    that none is lost for ever; in between only kept ones are drawn."""
    if recorder.load_existing(by_class):                             # written before a kill
        return
    mean_std, size, device = (recorder.data["mean"], recorder.data["std"]), images.shape[-1], images.device
    members, split = real.members, real.split.to(device)
    recorder.run.start(iterations, "iterations")
    pixels = images.detach().requires_grad_()                        # the same memory
    optimizer = torch.optim.SGD([pixels], lr=lr, momentum=0.5)
    pixels.grad, pruning, first = torch.zeros_like(pixels), new_pruning(len(members), len(split)), 0
    if resume := recorder.begin([0], by_class, iterations):
        first, pruning = resume["iterations"], resume["pruning"]
        pixels.data.copy_(resume["pixels"])
        optimizer.load_state_dict(resume["sgd"])
    for t in range(first, iterations):
        model = random_embedding(len(members), size, ("dm network", seed, t), device)
        renewing, total = ratio > 0 and t % period == 0, 0
        for label, pool in enumerate(members):
            rng = generator("dm", seed, t, label)
            view, synthetic = draw_siamese(size, rng), pixels[label].detach().requires_grad_()
            pool = pool if renewing else pool[pruning["keep"][pool]]
            index = pool[torch.randperm(len(pool), generator=rng)[:real_batch]]

            def embed(images):
                return model(apply_siamese(images, view))

            with torch.no_grad():
                features = embed(normalize(split.read(index).to(device), *mean_std))
            if renewing:
                kept = prune(pruning, label, index, ite_norms(embed, synthetic, features), ratio)
                features = features[kept.to(device)]
            loss = dm_loss(features, embed(synthetic))
            pixels.grad[label], = torch.autograd.grad(loss, synthetic)
            total = total + loss.detach()
        optimizer.step()
        losses = {"dm": total, "kept": pruning["keep"].double().mean()}      # kept: share of the real images
        recorder.step(t, losses, images, lambda: {"iterations": t + 1, "pixels": pixels.detach(),
                                                  "sgd": optimizer.state_dict(), "pruning": pruning})
    recorder.write(images)
