"""Statistics of layer inputs, and matching them with or without autograd.   G-VBSM, arXiv:2311.17950, Sec. 3.3, App. B.

Needs torch alone. A batch may hold `groups` independent batches, one after the other: x is [groups*B, C, H, W] and each
group has statistics of its own.
"""
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import nn


def channel_stats(x, groups=1):
    """x [groups*B, C, H, W] -> mean, biased variance over (B, H, W), each [groups, C]."""
    var, mean = torch.var_mean(x.unflatten(0, (groups, -1)), dim=(1, 3, 4), correction=0)
    return mean, var


def patch_stats(x, patch, groups=1):
    """x [groups*B, C, H, W] -> mean, biased variance over (B, C, h, w) of each cell of a grid of patch*patch pixels,
    each [groups, ceil(H/patch)*ceil(W/patch)], row-major."""
    var, mean = torch.var_mean(_cells(whole_patches(x, patch), patch, groups), dim=(1, 2, 4, 6), correction=0)
    return mean.flatten(1), var.flatten(1)


def whole_patches(x, patch):
    """x [N, C, H, W], resized bilinearly up to the next multiples of patch where H or W is none (the paper only writes
    ceil; this is the release's reading of it)."""
    size = [-(-side // patch) * patch for side in x.shape[-2:]]
    if size == list(x.shape[-2:]):
        return x
    return F.interpolate(x, size=size, mode="bilinear", align_corners=False)


def _cells(x, patch, groups):
    """x [groups*B, C, H, W] -> view [groups, B, C, H/patch, patch, W/patch, patch]."""
    return x.unflatten(3, (-1, patch)).unflatten(2, (-1, patch)).unflatten(0, (groups, -1))


@torch.no_grad()
def conv_stats(x, patch, groups=1):
    """`channel_stats` and `patch_stats` of x from one set of cell moments, without a graph: the law of total variance
    joins the cells of a channel, and those of a patch.   -> channel_mean, channel_var, patch_mean, patch_var"""
    whole = whole_patches(x, patch)
    mean = F.avg_pool2d(whole, patch).unflatten(0, (groups, -1)).mean(1)                            # [G, C, U, V]
    centred = _cells(whole, patch, groups) - mean[:, None, :, :, None, :, None]
    var = F.avg_pool2d(centred.square_().view_as(whole), patch).unflatten(0, (groups, -1)).mean(1)
    patch_mean, patch_var = mean.mean(1), var.mean(1) + mean.var(1, correction=0)
    if whole is x:
        channel = mean.mean((2, 3)), var.mean((2, 3)) + mean.var((2, 3), correction=0)
    else:                                                   # resizing changes the moments of a channel
        channel = bn_stats(x, groups)
    return *channel, patch_mean.flatten(1), patch_var.flatten(1)


@torch.no_grad()
def bn_stats(x, groups=1):
    """`channel_stats` in two plain passes, some four times faster on a CPU than torch.var_mean, without a graph."""
    x = x.unflatten(0, (groups, -1)).flatten(3)
    mean = x.mean((1, 3))
    return mean, (x - mean[:, None, :, None]).square_().mean((1, 3))


def matched_layers(model):
    """{name: module} of every Conv2d and BatchNorm2d of the model, in its order."""
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, (nn.Conv2d, nn.BatchNorm2d))}


@contextmanager
def layer_inputs(model, names=None, wrap=None):
    """Within the context a forward pass of the model fills the yielded dict with {layer name: input tensor}, for the
    Conv2d and BatchNorm2d layers, or those of `names`; `wrap(tensor)` may replace what a layer is given, once for each
    distinct tensor. No hook outlives the context. Of a layer called twice in one pass the last input is kept."""
    inputs, wrapped = {}, {}

    def hook(name):
        def keep(layer, args):
            inputs[name] = x = args[0]
            if wrap:
                if id(x) not in wrapped:
                    wrapped[id(x)] = wrap(x)
                return (wrapped[id(x)], *args[1:])
        return keep

    handles = [layer.register_forward_pre_hook(hook(name)) for name, layer in matched_layers(model).items()
               if names is None or name in names]
    try:
        yield inputs
    finally:
        for handle in handles:
            handle.remove()


class Inject(torch.autograd.Function):
    """Identity on x whose backward pass adds the gradient of the statistics at x: the sum over `terms`, a list filled
    after the forward pass, of scale * x + shift (see `affine_terms`)."""

    @staticmethod
    def forward(ctx, x, terms):
        ctx.save_for_backward(x)
        ctx.terms = terms
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        x, = ctx.saved_tensors
        for scale, shift, patch in ctx.terms:
            if patch is None:
                grad = grad + torch.addcmul(shift, x.view(_blocks(scale, x)), scale).view_as(x)
            else:                                   # the statistics are of the resized map: pull their gradient back
                with torch.enable_grad():
                    leaf = x.detach().requires_grad_()
                    whole = whole_patches(leaf, patch)
                pulled = torch.addcmul(shift, whole.detach().view(_blocks(scale, whole)), scale)
                grad = grad + torch.autograd.grad(whole, leaf, pulled.view_as(whole))[0]
        return grad, None


def _blocks(scale, x):
    """The view [groups, B, C, U, h, V, w] of x [groups*B, C, H, W] that scale [groups, 1, C or 1, U, 1, V, 1] fits."""
    groups, _, _, rows, _, columns, _ = scale.shape
    return groups, -1, x.shape[1], rows, x.shape[2] // rows, columns, x.shape[3] // columns


def affine_terms(x, patch, statistics, gradient):
    """App. B, Eq. 15: the gradient of the matching terms at x [groups*B, C, H, W] as an affine function of x.

    With n values behind a statistic, d mean / dx = 1 / n and d var / dx = 2 (x - mean) / n; so a loss with gradients
    (gm, gv) at (mean, var) has 2 gv / n * x + (gm - 2 gv * mean) / n at x.
    statistics, gradient: (channel_mean, channel_var[, patch_mean, patch_var]), each [groups, C] or [groups, patches].
    Returns a list of (scale, shift, patch), patch None where it is at x itself, else at `whole_patches(x, patch)`.
    """
    groups, (_, C, H, W) = len(statistics[0]), x.shape
    values = x.numel() // groups

    def affine(mean, gm, gv, n, shape):
        scale = 2 * gv / n
        return scale.view(shape), torch.addcmul(gm / n, scale, mean, value=-1).view(shape)

    channel = affine(statistics[0], *gradient[:2], values // C, (groups, 1, C, 1, 1, 1, 1))
    if len(statistics) == 2:
        return [(*channel, None)]
    rows, columns = -(-H // patch), -(-W // patch)
    patched = affine(statistics[2], *gradient[2:], values // (H * W) * patch * patch,
                     (groups, 1, 1, rows, 1, columns, 1))
    if H % patch or W % patch:
        return [(*channel, None), (*patched, patch)]
    return [(channel[0] + patched[0], channel[1] + patched[1], None)]


class ClosedFormMatching:
    """Eqs. 6 and 10 for all layers of a frozen backbone, without a graph through any statistic.

    model: in eval mode; targets: {conv name: (channel_mean, channel_var, patch_mean, patch_var)}, Eq. 9; BatchNorm's
    are its own running statistics. weights: {layer name: weight of its terms in the loss}; a layer of weight 0 is
    neither reduced nor hooked. alpha, patch: see `sds_match`, `patch_stats`.

        state = matching.start(groups)                             # once for each image batch
        with matching.hooks(dropped) as inputs:
            logits = model(images)
        bn, conv, state = matching.inject(inputs, state)           # losses [], the value of the terms
        classification_loss.backward()                             # adds the gradient of the matching terms
    """

    def __init__(self, model, targets, weights, alpha, patch):
        self.model, self.alpha, self.patch = model, alpha, patch
        layers = {name: layer for name, layer in matched_layers(model).items() if weights[name]}
        self.targets = {name: (layer.running_mean, layer.running_var) if isinstance(layer, nn.BatchNorm2d)
                        else targets[name] for name, layer in layers.items()}
        vectors = [vector for target in self.targets.values() for vector in target]
        self.sizes = [len(vector) for vector in vectors]
        nothing = next(model.parameters()).new_zeros(0)
        self.target = torch.cat([nothing, *vectors])                                # all statistics, one after another
        counts = torch.tensor(self.sizes, dtype=torch.long, device=self.target.device)
        self.segment = torch.repeat_interleave(torch.arange(len(counts), device=counts.device), counts)
        self.owner = [name for name, target in self.targets.items() for _ in target]        # layer of each segment
        self.weight = self.target.new_tensor([weights[name] for name in self.owner])
        self.is_bn = torch.tensor([isinstance(layers[name], nn.BatchNorm2d) for name in self.owner], device=counts.device)

    def start(self, groups):
        """The moving averages before the first batch: (values [groups, all statistics], layers seen so far)."""
        return self.target.new_zeros(groups, len(self.target)), frozenset()

    @contextmanager
    def hooks(self, dropped=()):
        self.terms = {}

        def wrap(x):
            self.terms[id(x)] = []
            return Inject.apply(x, self.terms[id(x)])

        with layer_inputs(self.model, self.targets.keys() - set(dropped), wrap) as inputs:
            yield inputs

    @torch.no_grad()
    def inject(self, inputs, state):
        """Measure the inputs, move the averages, and hand each tensor the gradient of its terms."""
        if not inputs:                                      # every layer dropped, or none has a weight
            return self.target.new_zeros(()), self.target.new_zeros(()), state
        ema, seen = state
        groups, measured, statistics = len(ema), {}, {}
        patched = {id(x) for name, x in inputs.items() if len(self.targets[name]) == 4}
        for name, x in inputs.items():                      # a tensor that several layers share is reduced once
            if id(x) not in measured:
                measured[id(x)] = conv_stats(x, self.patch, groups) if id(x) in patched else bn_stats(x, groups)
            statistics[name] = measured[id(x)][:len(self.targets[name])]
        keep = ema.new_tensor([self.alpha if name in seen else 0.0 for name in self.owner])[self.segment]
        past = dict(zip(self.targets, self._by_layer(ema)))
        current = torch.cat([v for name in self.targets for v in statistics.get(name, past[name])], dim=1)    # dropped: stay
        ema = torch.lerp(current, ema, keep)
        active = ema.new_tensor([name in inputs for name in self.owner]) * self.weight
        norms, gradient = segment_norms(ema - self.target, self.segment, len(self.sizes), active)
        for name, part in zip(self.targets, self._by_layer(gradient)):
            if name in inputs:
                x = inputs[name]
                self.terms[id(x)] += affine_terms(x, self.patch, statistics[name], part)
        terms = (norms * active).sum(0)
        return terms[self.is_bn].sum(), terms[~self.is_bn].sum(), (ema, seen | inputs.keys())

    def _by_layer(self, flat):
        parts = iter(flat.split(self.sizes, dim=1))
        return [[next(parts) for _ in target] for target in self.targets.values()]


def segment_norms(difference, segment, count, weight):
    """difference [groups, n] made of `count` vectors, segment [n] the vector each entry belongs to, weight [count].
    -> norms [groups, count], gradient [groups, n] of the weighted sum of the norms: weight * difference / norm, 0 where
    the norm is 0."""
    squares = difference.new_zeros(len(difference), count).index_add_(1, segment, difference.square())
    norms = squares.sqrt()
    return norms, difference * (weight / norms).nan_to_num_(0, 0, 0)[:, segment]
