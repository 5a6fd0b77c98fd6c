"""Eq. 6 and Eq. 10 in closed form: the gradient that App. B derives is added at the layers' inputs, and no
graph leads through any statistic.   G-VBSM, arXiv:2311.17950, App. B, Eq. 12 and Eq. 15.

tests/test_recover_math.py: test_the_closed_form_gives_the_losses_and_the_pixel_gradient_as_written shows that
losses and gradients equal those of utils/stats.py: Matching. `freeze` makes a backbone fast to match.
"""
import operator
from collections import Counter
from collections.abc import Iterable

import torch
import torch.fx
import torch.nn.functional as F
from torch import Tensor, nn

from utils.stats import (at_least_float32, check_input, checked_targets, layer_inputs, require_eval,
                         whole_patches)


def _batch_moments(x, groups):
    """x [groups*B, C, H, W] -> mean, biased variance over B of every pixel, each [groups, C, H, W]."""
    order, back = ((0, 2, 3, 1), (0, 3, 1, 2)) if x.stride(1) == 1 else ((0, 1, 2, 3),) * 2   # as in memory
    x = x.permute(order)
    rows, shape = at_least_float32(x).flatten(1), (groups, *x.shape[1:])
    if x.device.type == "cpu":  # each pixel as a BatchNorm's channel: a tenth of the time of var_mean
        moments = [torch.batch_norm_update_stats(group, None, None, 0.0) for group in rows.chunk(groups)]
        mean, var = map(torch.stack, zip(*moments)) if groups > 1 else moments[0]
    else:
        var, mean = torch.var_mean(rows.unflatten(0, (groups, -1)), 1, correction=0)
    return mean.view(shape).permute(back), var.view(shape).permute(back)


def _joined(mean, var, dims):
    """Moments of equal parts -> moments of their union along dims: the law of total variance."""
    centre = mean.mean(dims, keepdim=True)
    return centre.squeeze(dims), (mean - centre).square_().add_(var).mean(dims)


@torch.no_grad()
def conv_stats(x: Tensor, patch: int, groups: int = 1) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`channel_stats` and `patch_stats` of x together, without a graph, in float32 at least.
    -> channel_mean, channel_var, patch_mean, patch_var"""
    moments = _batch_moments(x, groups)
    channel = _joined(*moments, (2, 3))
    whole = whole_patches(x, patch)
    if whole is not x:                                      # resizing changes the moments of a channel
        moments = _batch_moments(whole, groups)
    pixels = _joined(*moments, (1,))  # [groups, H, W]
    cells = (m.unflatten(2, (-1, patch)).unflatten(1, (-1, patch)) for m in pixels)
    return *channel, *(m.flatten(1) for m in _joined(*cells, (2, 4)))


@torch.no_grad()
def bn_stats(x: Tensor, groups: int = 1) -> tuple[Tensor, Tensor]:
    """`channel_stats` of x, without a graph, in float32 at least."""
    return _joined(*_batch_moments(x, groups), (2, 3))


class Inject(torch.autograd.Function):
    """Identity on x whose backward pass adds the gradient of the statistics at x. terms, a dict filled after
    the forward pass: `affine_terms` [2, groups, n] of the n channels under 0, of the patches under 2.
    ValueError while it is empty, as the gradient would lack them silently."""

    @staticmethod
    def forward(ctx, x: Tensor, terms: dict, patch: int) -> Tensor:
        ctx.save_for_backward(x)
        ctx.terms, ctx.patch = terms, patch
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        if not ctx.terms:
            raise ValueError("backward() came before inject(); call matching.inject(inputs, state) first")
        x, = ctx.saved_tensors
        if 0 not in ctx.terms:  # of a layer called twice, the input before the last
            return grad, None, None
        channels, patches, patch = ctx.terms[0], ctx.terms.get(2), ctx.patch
        if patches is not None and (x.shape[2] % patch or x.shape[3] % patch):  # of the resized map
            with torch.enable_grad():
                leaf = x.detach().requires_grad_()
                whole = whole_patches(leaf, patch)
            none = torch.zeros_like(channels)
            pulled = _add_affine(torch.zeros_like(whole), whole.detach(), none, patches, patch)
            grad, patches = grad + torch.autograd.grad(whole, leaf, pulled)[0], None
        return _add_affine(grad, x, channels, patches, patch), None, None


def _add_affine(grad, x, channels, patches, patch):
    """grad + (scale * x + shift) / n for the channels, of n = B*H*W values, and the patches, of n =
    B*C*patch*patch. channels, patches (or None): scale and shift [2, groups, number of them]"""
    (C, H, W), groups = x.shape[1:], channels.shape[1]
    layout = torch.channels_last if x.stride(1) == 1 else torch.contiguous_format
    spread = torch.empty(2 * groups, C, H, W, dtype=channels.dtype, device=x.device, memory_format=layout)
    both = spread.unflatten(0, (2, groups))
    if patches is None:
        both.copy_(channels[..., None, None])
    else:
        cells = patches.view(2, groups, 1, H // patch, 1, W // patch, 1)
        cells = cells.expand(-1, -1, -1, -1, patch, -1, patch).reshape(2, groups, 1, H, W)
        torch.add(channels[..., None, None], cells, alpha=H * W / (C * patch ** 2), out=both)
    n, (scale, shift) = x.numel() / (groups * C), both.unsqueeze(2)
    grad, x = grad.unflatten(0, (groups, -1)), x.unflatten(0, (groups, -1))
    return torch.addcmul(grad, x, scale, value=1 / n).add_(shift, alpha=1 / n).flatten(0, 1)


def affine_terms(mean: Tensor, mean_slope: Tensor, var_slope: Tensor) -> Tensor:
    """Eq. 12 and Eq. 15 (App. B): mean_slope and var_slope are a loss's gradients at the mean and variance of
    n values. Its gradient at a value x is (scale * x + shift) / n, as d mean / dx = 1 / n and d var / dx =
    2 (x - mean) / n.   -> scale, shift as one tensor [2, ...]"""
    scale = 2 * var_slope
    return torch.stack([scale, torch.addcmul(mean_slope, scale, mean, value=-1)])


class FrozenNorm(nn.BatchNorm2d):
    """A BatchNorm2d in eval mode as the affine map gain * x + offset, gain and offset [C]; `freeze` makes it.
    `folded`: the convolution before it has taken the map into its weights, so x comes mapped already;
    `overwritten`: a later layer may change the output in place."""
    folded = overwritten = False

    def compute_map(self) -> None:
        weight, bias = (self.weight, self.bias) if self.affine else (1, 0)
        self.register_buffer("gain", weight * (self.running_var + self.eps).rsqrt(), persistent=False)
        self.register_buffer("offset", bias - self.running_mean * self.gain, persistent=False)

    def fold_into(self, convolution: nn.Conv2d, overwritten: bool) -> None:
        weight = convolution.weight * self.gain[:, None, None, None]
        bias = 0 if convolution.bias is None else convolution.bias
        convolution.weight = nn.Parameter(weight, requires_grad=False)
        convolution.bias = nn.Parameter(bias * self.gain + self.offset, requires_grad=False)
        self.folded, self.overwritten = True, overwritten

    def forward(self, x: Tensor) -> Tensor:
        if not self.folded:
            return torch.addcmul(self.offset[:, None, None], x, self.gain[:, None, None])
        return x.clone() if self.overwritten else x                  # x is needed in the backward pass


def _leaves_alone(user, node, layers):
    """Whether `user` surely leaves its input `node` unchanged; torch.fx shows += as +."""
    if user.op == "call_module":
        layer = layers[user.target]
        return isinstance(layer, nn.Conv2d) or type(layer).__module__ == nn.ReLU.__module__
    return (user.target in (F.relu, torch.relu, torch.cat) and not user.kwargs.get("inplace")
            or user.target is operator.add and user.args[0] is not node)


def freeze(model: nn.Module) -> nn.Module:
    """Make a model in eval mode fast to match, in place; as a function it stays as it is, up to rounding, and
    nothing in it is trainable any more. Every BatchNorm2d becomes a `FrozenNorm`, and a convolution takes it
    into its weights where torch.fx can tell that nobody else reads what the convolution gives, and the norm's
    weights exceed 1 % of its biases, so that its input can be computed from its output. The layout becomes
    channels_last, but for a model with a GroupNorm, whose backward pass is several times slower in it. A
    frozen model is returned as it is. ValueError for one in train mode, and later by state_dict(), whose
    weights would fit no other model."""
    require_eval(model)
    model.requires_grad_(False)
    layers = dict(model.named_modules())
    norms = {name: layer for name, layer in layers.items() if isinstance(layer, nn.BatchNorm2d)}
    if any(isinstance(norm, FrozenNorm) for norm in norms.values()):
        return model
    try:
        nodes = torch.fx.Tracer().trace(model).nodes
    except Exception:                                       # its flow depends on values
        nodes = ()
    calls = Counter(node.target for node in nodes)
    for norm in norms.values():
        norm.__class__ = FrozenNorm
        norm.compute_map()
    for node in nodes:
        if node.target in norms:
            norm, source, convolution = norms[node.target], node.args[0], layers.get(node.args[0].target)
            alone = isinstance(convolution, nn.Conv2d) and (
                len(source.users) == calls[source.target] == calls[node.target] == 1)
            if alone and norm.affine and (norm.weight.abs() > 0.01 * norm.bias.abs()).all():
                norm.fold_into(convolution, not all(_leaves_alone(user, node, layers) for user in node.users))
    for layer in layers.values():
        if hasattr(layer, "inplace") and norms:
            layer.inplace = False  # it would overwrite what a folded norm still needs
    if not any(isinstance(layer, nn.GroupNorm) for layer in layers.values()):
        model.to(memory_format=torch.channels_last)
    if norms:
        model.register_state_dict_pre_hook(_keep_weights)
    return model


def _keep_weights(model, prefix, keep_vars):
    raise ValueError("a frozen model's weights fit no other model; take state_dict() before freeze()")


class ClosedFormMatching:
    """Eq. 6 and Eq. 10 as `utils.stats.Matching`, with the same arguments and calls, but without a graph
    through any statistic: `inject` returns values, and any backward pass through the model, of the
    classification loss or of (0 * logits).sum(), adds their gradient, whatever factor the loss has: weigh it
    by `weights`.   model: plain, or of `freeze`, which is faster"""

    def __init__(self, model: nn.Module, targets: dict, weights: dict[str, float], *, alpha: float = 0.8,
                 patch: int = 4):
        self.model, self.alpha, self.patch, self.terms = model, alpha, patch, {}
        layers, self.targets = dict(model.named_modules()), checked_targets(model, targets, weights)
        # A row of means and one of variances, segment after segment, of a layer's channels (kind 0) or its
        # patches (kind 2):   conv1 channels | conv1 patches | bn1 channels | ...
        # segment[i]: the segment of entry i; owner[s]: the layer of segment s
        self.segments = [(name, kind) for name, target in self.targets.items()
                         for kind in range(0, len(target), 2)]
        pairs = [torch.stack(self.targets[name][kind:kind + 2]) for name, kind in self.segments]
        self.sizes, device = [pair.shape[-1] for pair in pairs], next(model.parameters()).device
        pairs = [pair.view(2, -1, size) for pair, size in zip(pairs, self.sizes)]     # [2, groups or 1, n]
        nothing = next(model.parameters()).new_zeros(2, pairs[0].shape[1] if pairs else 1, 0)
        self.target = torch.cat([nothing, *pairs], dim=2)
        self.weight = nothing.new_tensor([weights[name] for name, _ in self.segments])
        counts, names = torch.tensor(self.sizes, dtype=torch.long), list(self.targets)
        self.segment = torch.arange(len(counts)).repeat_interleave(counts).to(device)
        self.owner = torch.tensor([names.index(name) for name, _ in self.segments], dtype=torch.long,
                                  device=device)
        self.is_bn = torch.tensor([len(self.targets[name]) == 2 for name, _ in self.segments], device=device)
        # a folded norm's input comes mapped: (input - offset) * unit is what it was
        self.offset, self.unit = torch.zeros_like(self.target[:, :1]), torch.ones_like(self.target[:, :1])
        rows = zip(self.segments, self.offset.split(self.sizes, 2), self.unit.split(self.sizes, 2))
        for (name, _), offset, unit in rows:
            if getattr(layer := layers[name], "folded", False):
                offset[0], unit[0], unit[1] = layer.offset, 1 / layer.gain, 1 / layer.gain ** 2

    def start(self, groups: int) -> tuple[Tensor, Tensor]:
        """At first: moving averages [2, groups, statistics], layers that have one [layers]."""
        return (self.target.new_zeros(2, groups, self.target.shape[2]),
                torch.zeros(len(self.targets), dtype=torch.bool, device=self.target.device))

    def hooks(self, dropped: Iterable[str] = ()):
        self.terms = {}

        def wrap(x):
            self.terms[id(x)] = {}
            return Inject.apply(x, self.terms[id(x)], self.patch)

        return layer_inputs(self.model, self.targets.keys() - set(dropped), wrap)

    @torch.no_grad()
    def inject(self, inputs: dict[str, Tensor], state: tuple[Tensor, Tensor],
               kept: Tensor | None = None) -> tuple[Tensor, Tensor, tuple]:
        """Measure the inputs, move the averages, and hand each tensor the gradient of its terms.
        kept: bool [layers], False for a layer that is left out though its input was collected, as a CUDA
        graph must; default: every collected one counts."""
        ema, started = state
        if not inputs:                                      # every layer dropped, or none has a weight
            return self.target.new_zeros(()), self.target.new_zeros(()), state
        if any(id(x) not in self.terms for x in inputs.values()):
            raise ValueError("the inputs are not those of hooks(); use `with matching.hooks() as inputs`")
        if kept is None:
            kept = torch.tensor([name in inputs for name in self.targets], device=started.device)
        groups = ema.shape[1]
        for name, x in inputs.items():
            check_input(name, x, self.targets[name], self.patch, groups)
        statistics, patched = {}, {id(x) for name, x in inputs.items() if len(self.targets[name]) == 4}
        for key, x in {id(x): x for x in inputs.values()}.items():   # one that layers share is reduced once
            statistics[key] = conv_stats(x, self.patch, groups) if key in patched else bn_stats(x, groups)
        pairs = [statistics[id(inputs[name])][kind:kind + 2] if name in inputs else past  # dropped: as it was
                 for (name, kind), past in zip(self.segments, ema.split(self.sizes, dim=2))]
        measured = torch.stack([torch.cat(row, dim=1) for row in zip(*pairs)])
        # Eq. 13: the past has weight 0 at first, then alpha; 1 where a layer is dropped
        decay = torch.where(kept, self.alpha * started.to(ema), 1)[self.owner][self.segment]
        ema = torch.lerp((measured - self.offset) * self.unit, ema, decay)
        weight = self.weight * kept[self.owner]
        norms, slope = segment_norms((ema - self.target).flatten(0, 1), self.segment, len(self.sizes), weight)
        slope = slope.view_as(ema) * self.unit
        terms = affine_terms(measured[0], *slope).split(self.sizes, dim=2)
        for (name, kind), term in zip(self.segments, terms):
            if name in inputs:
                shared = self.terms[id(inputs[name])]
                shared[kind] = shared[kind] + term if kind in shared else term
        for shared in self.terms.values():
            shared["injected"] = True
        losses = (norms * weight).sum(0)
        return (losses * self.is_bn).sum(), (losses * ~self.is_bn).sum(), (ema, started | kept)


def segment_norms(difference: Tensor, segment: Tensor, count: int, weight: Tensor) -> tuple[Tensor, Tensor]:
    """difference [groups, n] made of `count` vectors, segment [n] the vector each entry belongs to, weight
    [count].   -> norms [groups, count], weighted unit vectors [groups, n], Eq. 12 and Eq. 15, 0 at norm 0"""
    squares = difference.new_zeros(len(difference), count).index_add_(1, segment, difference.square())
    norms = squares.sqrt()
    return norms, difference * (weight / norms).nan_to_num_(0, 0, 0)[:, segment]
