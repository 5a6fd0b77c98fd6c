"""The equations as pure functions: Eq. 1, 3-6, 8, 10, 11, 13-14.   G-VBSM, arXiv:2311.17950.
Needs torch alone."""
import torch
import torch.nn.functional as F
from torch import Tensor


def sds_match(current: Tensor, target: Tensor, ema: Tensor | None,
              alpha: float) -> tuple[Tensor, Tensor]:
    """Distance of a smoothed batch statistic from the dataset's, Eq. 6 and Eq. 10. Eq. 13 is its moving
    average, Eq. 14 its loss with the stop-gradient sg.

        ema' = alpha * ema + (1 - alpha) * current        (ema None, at first: ema' = current)
        loss = sum over groups of || current - target - sg(current - ema') ||_2

    current [groups, n], a row for each batch, target [n] or [groups, n], ema like current or None; alpha = 0
    is Eq. 1. The loss has the value || ema' - target ||_2, and at `current` the gradient (ema' - target) /
    || ema' - target ||: Eq. 15, without a factor 1 - alpha; 0 where the norm is 0.   -> loss, a scalar; ema',
    detached.   Tests compare with it; recover.py runs `ClosedFormMatching` or `Matching`."""
    ema = current.detach() if ema is None else alpha * ema + (1 - alpha) * current.detach()
    return torch.linalg.vector_norm(current - target - (current.detach() - ema), dim=-1).sum(), ema


def pooled_rows(images: Tensor, scale: str = "sum") -> Tensor:
    """Eq. 4: images [B, C, H, W] -> rows [B, C*32*32] (smaller images keep their size).
    scale "sum" is the paper's Gram matrix: its eigenvalues grow with the length D of a row, until both
    softmaxes of Eq. 5 are one-hot and its gradient vanishes; "mean" divides the matrix by D."""
    if scale not in ("sum", "mean"):
        raise ValueError(f"scale {scale!r} is neither 'sum' nor 'mean'")
    if max(images.shape[-2:]) > 32:
        images = F.adaptive_avg_pool2d(images, [min(side, 32) for side in images.shape[-2:]])
    rows = images.flatten(1)
    return rows if scale == "sum" else rows / rows.shape[1] ** 0.5


def data_densification(images: Tensor, labels: Tensor, tau: float = 4.0,
                       scale: str = "sum") -> Tensor:
    """Eq. 5: sum over classes of KL( sg(softmax(lambda / tau)) || softmax(lambda) ), lambda the eigenvalues
    of the Gram matrix of the class.   images [B, C, H, W], labels [B] -> scalar; 0 with one image a class"""
    rows = pooled_rows(images, scale)
    loss = rows.new_zeros(())
    for label in labels.unique():
        members = rows[labels == label]
        eigenvalues = torch.linalg.eigvalsh(members @ members.T)
        loss = loss + F.kl_div(eigenvalues.log_softmax(0), (eigenvalues / tau).detach().log_softmax(0),
                               reduction="sum", log_target=True)
    return loss


class ClosedFormDensification(torch.autograd.Function):
    """Eq. 5 on rows [K, n, D] of K classes of n images: forward also computes the gradient
    2 V diag(softmax(lambda) - softmax(lambda / tau)) V^T rows, well defined for equal eigenvalues."""

    @staticmethod
    def forward(ctx, rows: Tensor, tau: float) -> Tensor:
        exact = rows.double() if rows.is_cuda else rows              # a GPU may take float32 factors as TF32
        gram = (exact @ exact.mT).cpu()  # for small matrices the host's eigh is the faster one
        eigenvalues, vectors = (part.to(rows) for part in torch.linalg.eigh(gram))
        soft, sharp = (eigenvalues / tau).log_softmax(-1), eigenvalues.log_softmax(-1)
        ctx.save_for_backward(2 * (vectors * (sharp.exp() - soft.exp()).unsqueeze(-2)) @ (vectors.mT @ rows))
        return F.kl_div(sharp, soft, reduction="sum", log_target=True)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return grad * ctx.saved_tensors[0], None


def densification_closed_form(images: Tensor, members: list[Tensor], tau: float = 4.0,
                              scale: str = "sum") -> Tensor:
    """`data_densification` without a graph through the eigenvalues and without a loop over classes.
    members: index tensors [K, n], one for each class size n, as `class_members` gives them.   -> scalar"""
    rows = pooled_rows(images, scale)
    return sum((ClosedFormDensification.apply(rows[index], tau) for index in members), rows.new_zeros(()))


def class_members(labels: Tensor) -> list[Tensor]:
    """labels [B] -> the images of each class as index tensors [K, n], one for each class size n > 1 (one
    image of a class adds nothing to Eq. 5)."""
    classes, counts = labels.unique(return_counts=True)
    return [torch.stack([(labels == label).nonzero().flatten() for label in classes[counts == n]])
            for n in counts.unique().tolist() if n > 1]


def ensemble_logits(logits: Tensor, normalize: bool) -> Tensor:
    """Eq. 8: logits [K, B, C] of K backbones -> [B, C], their mean; normalize (LN) first scales each [B, C]
    to the mean of the backbones' Frobenius norms."""
    if normalize:
        norms = torch.linalg.vector_norm(logits, dim=(1, 2), keepdim=True)
        logits = logits * (norms.mean() / norms)
    return logits.mean(0)


def mse_gt_loss(student_logits: Tensor, soft_logits: Tensor, labels: Tensor,
                gamma: float) -> Tensor:
    """Eq. 11: the mean over B*C of (f(x) - z)^2, plus gamma * CE(f(x), y), a mean over B.
    logits [B, C], labels [B] -> scalar.
    DEVIATION(paper): it writes the squared norm; gamma = 0.1 / 0.15 was tuned with the mean."""
    return F.mse_loss(student_logits, soft_logits) + gamma * F.cross_entropy(student_logits, labels)


def kl_loss(student_logits: Tensor, soft_logits: Tensor, temperature: float) -> Tensor:
    """Eq. 3 and SRe2L's loss: KL( softmax(z / T) || softmax(f / T) ), mean over B, no factor T^2."""
    return F.kl_div((student_logits / temperature).log_softmax(-1),
                    (soft_logits / temperature).log_softmax(-1), reduction="batchmean", log_target=True)
