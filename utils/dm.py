"""Distribution matching (DM: Zhao & Bilen, WACV 2023, arXiv:2110.04181) and BiLP's adaptive pruning of the real images it
sees (Xu et al., ECCV 2024, arXiv:2305.18381).   Needs torch alone.

`embed` is a function: images [B, 3, S, S] -> features [B, d], of each image alone (no BatchNorm that learns from a batch).
"""
import torch

COPIES = 64             # synthetic images in a pass of `ite_norms`, which bounds its memory


def dm_loss(real, synthetic):
    """||mean(real) - mean(synthetic)||^2, summed over features [N, d] and [n, d] of one class (DM)."""
    return (real.mean(0) - synthetic.mean(0)).square().sum()


def leave_one_out_norms(embed, synthetic, features):
    """||ITE||_2 of the N real images of a class with these features [N, d], as BiLP defines it:
        ITE(x) = d L(D_r, D_s) / d D_s - d L(D_r without x, D_s) / d D_s,
    at the cost of N + 1 gradients; synthetic [n, 3, S, S] is D_s.   -> [N]"""
    synthetic = synthetic.detach().requires_grad_()
    embedded = embed(synthetic)

    def gradient(real):
        return torch.autograd.grad(dm_loss(real, embedded), synthetic, retain_graph=True)[0]

    whole = gradient(features)
    return torch.stack([(whole - gradient(torch.cat([features[:i], features[i + 1:]]))).norm() for i in range(len(features))])


def ite_norms(embed, synthetic, features, products=16):
    """The same by a forward pass, a vector-Jacobian and a Jacobian-vector product of `products` copies of D_s, whatever N is.
    -> [N]

    dL/dD_s = -2 J^T (m_r - m_s), J the Jacobian of m_s = mean embed(D_s), is linear in m_r, and leaving x_i out moves m_r by
    -a_i / (N - 1), a_i = f_i - m_r. So the Taylor form is exact (a factor (N - 1) / N where the samples' weight 1 / N stays):
        ITE_i = -2 / (N - 1) J^T a_i,      ||ITE_i||^2 = 4 / (N - 1)^2  a_i^T M a_i,      M = J J^T.
    M is applied to the `products` leading principal directions B of the a_i, two power iterations from the first of them.
    With a = B c + r, the terms c^T (B^T M B) c + 2 r^T (M B) c are exact; the last, r^T M r, is taken for the least of
    the b^T M b times |r|^2. From N - 1 directions on r = 0, and all is exact.
    """
    N, n = len(features), len(synthetic)
    if N == 1:
        return features.new_zeros(1)                                 # nothing is left to compare with
    centred = features - features.mean(0)
    basis = centred[:products].T
    for _ in range(2):
        basis = torch.linalg.qr(centred.T @ (centred @ basis)).Q     # [d, K]
    image = []
    for directions in basis.T.split(max(1, COPIES // n)):
        copies = synthetic.detach().repeat(len(directions), 1, 1, 1).requires_grad_()
        cotangent = directions.repeat_interleave(n, 0).requires_grad_()
        pulled, = torch.autograd.grad(embed(copies), copies, cotangent / n, create_graph=True)       # J^T b
        pushed, = torch.autograd.grad(pulled, cotangent, pulled.detach())                            # linear in b: J J^T b
        image.append(pushed.unflatten(0, (-1, n)).sum(1))
    image = torch.cat(image)                                                                         # M b, [K, d]
    inner, along = image @ basis, centred @ basis
    rest = centred - along @ basis.T
    squared = ((along @ inner) * along).sum(1) + 2 * (along * (rest @ image.T)).sum(1)
    squared = squared + inner.diagonal().min() * rest.square().sum(1)
    return 2 / (N - 1) * squared.clamp(min=0).sqrt()


def rank_error(values, others):
    """sum |r_i - r'_i| / (N (N - 1)) over the ranks of two scores of N samples (BiLP, supplement Sec. 2): 0 for the same order,
    1/3 on average for a random one."""
    ranks, other_ranks = (scores.argsort().argsort() for scores in (values, others))
    return (ranks - other_ranks).abs().sum().item() / (len(values) * (len(values) - 1))


def new_pruning(num_classes, num_images):
    """State of adaptive pruning: running mean and variance of ||ITE|| per class (nan before the first), and which images of
    the data set are kept."""
    return {"mean": torch.full((num_classes,), torch.nan, dtype=torch.float64),
            "var": torch.full((num_classes,), torch.nan, dtype=torch.float64), "keep": torch.ones(num_images, dtype=torch.bool)}


def prune(state, label, index, norms, ratio, momentum=0.1):
    """Take in ||ITE|| [N] of the real images index [N] of a class. Their running mean, and the running mean of their squared
    distance from it, move by `momentum` (the first ones are set), and of these images those are kept that lie between the
    quantiles ratio/2 and 1 - ratio/2 of the normal distribution with these moments; all where that is none. Changes state.
    -> bool [N]

    The supplement does not say how the ratio is shared between the tails; halves are ours. So is the variance about the running
    mean: norms differ between networks as well as within a batch, and a batch's own variance would prune more than the ratio.
    """
    norms = norms.double().cpu()
    for key, measure in ("mean", lambda: norms.mean()), ("var", lambda: (norms - state["mean"][label]).square().mean()):
        before, now = state[key][label], measure()
        state[key][label] = now if before.isnan() else (1 - momentum) * before + momentum * now
    reach = torch.special.ndtri(torch.tensor(1 - ratio / 2, dtype=torch.float64)) * state["var"][label].sqrt()
    kept = (norms - state["mean"][label]).abs() <= reach
    state["keep"][index] = kept = kept | ~kept.any()
    return kept
