"""Statistics of layer inputs, and matching them as the paper does.   G-VBSM, arXiv:2311.17950, Sec. 3.1, 3.3.

Eq. 9: `statistics_of`. Eq. 6 and Eq. 10: `Matching`, by autograd; utils/closed_form.py has the same without a
graph. Needs torch alone. x [groups*B, C, H, W] holds `groups` independent batches, one after another, each
with statistics of its own; moments are float32 at least.
"""
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def channel_stats(x: Tensor, groups: int = 1) -> tuple[Tensor, Tensor]:
    """x [groups*B, C, H, W] -> mean, biased variance over (B, H, W), each [groups, C]."""
    var, mean = torch.var_mean(at_least_float32(x).unflatten(0, (groups, -1)), dim=(1, 3, 4), correction=0)
    return mean, var


def patch_stats(x: Tensor, patch: int, groups: int = 1) -> tuple[Tensor, Tensor]:
    """x [groups*B, C, H, W] -> mean, biased variance over (B, C, h, w) of each patch of the map, patch*patch
    positions, each [groups, ceil(H/patch)*ceil(W/patch)], row-major."""
    x = at_least_float32(whole_patches(x, patch)).unflatten(3, (-1, patch)).unflatten(2, (-1, patch))
    var, mean = torch.var_mean(x.unflatten(0, (groups, -1)), dim=(1, 2, 4, 6), correction=0)
    return mean.flatten(1), var.flatten(1)


def whole_patches(x: Tensor, patch: int) -> Tensor:
    """x [N, C, H, W], resized bilinearly to the next multiple of patch unless it divides H and W: the
    release's reading of the paper's ceil."""
    size = [-(-side // patch) * patch for side in x.shape[-2:]]
    if size == list(x.shape[-2:]):
        return x
    return F.interpolate(at_least_float32(x), size=size, mode="bilinear", align_corners=False)


def at_least_float32(x):
    return x.to(torch.promote_types(x.dtype, torch.float32))        # widens what autocast narrowed, no more


def mixed_moments(mean: Tensor, var: Tensor, share: Tensor) -> tuple[Tensor, Tensor]:
    """Moments of mixtures of classes, from the classes' own: the law of total variance.
    mean, var [classes, n], share [groups, classes], whose rows sum to 1 -> mean, var, each [groups, n]"""
    mixed = share @ mean
    return mixed, share @ (var + mean.square()) - mixed.square()


def matched_layers(model: nn.Module) -> dict[str, nn.Module]:
    """{name: module} of every Conv2d and BatchNorm2d of the model, in its order."""
    return {name: layer for name, layer in model.named_modules()
            if isinstance(layer, (nn.Conv2d, nn.BatchNorm2d))}


def layer_weights(model: nn.Module, bn_weight: float, conv_weight: float,
                  first_multiplier: float) -> dict[str, float]:
    """{layer name: weight of its statistics}; the first of weight > 0 counts first_multiplier times: the
    convolution whose input is the image, or at conv_weight 0 the first BatchNorm, as in SRe2L.
    DEVIATION(paper), App. A: it names one weight for all; the release counts the first ten times."""
    weights = {name: bn_weight if isinstance(layer, nn.BatchNorm2d) else conv_weight
               for name, layer in matched_layers(model).items()}
    if first := [name for name, weight in weights.items() if weight][:1]:
        weights[first[0]] *= first_multiplier
    return weights


@contextmanager
def layer_inputs(model: nn.Module, names=None, wrap: Callable | None = None) -> Iterator[dict[str, Tensor]]:
    """Within the context a forward pass of the model fills the yielded dict with {layer name: input tensor}
    of the `matched_layers`, or those of `names`; `wrap(tensor)` may replace what a layer is given, once for
    each distinct tensor. Of a layer called twice in one pass the last input is kept."""
    inputs, wrapped = {}, {}

    def keep(name, layer, args):
        inputs[name] = x = args[0]
        if wrap:
            if id(x) not in wrapped:
                wrapped[id(x)] = wrap(x)
            return (wrapped[id(x)], *args[1:])

    with ExitStack() as hooks:                                       # no hook outlives the context
        for name, layer in matched_layers(model).items():
            if names is None or name in names:
                hooks.enter_context(layer.register_forward_pre_hook(partial(keep, name)))
        yield inputs


def require_eval(model: nn.Module) -> None:
    """ValueError for a model in train mode, whose BatchNorms would move and depend on the batch."""
    if training := [name for name, layer in model.named_modules() if layer.training]:
        raise ValueError(f"the model is in train mode (layer {training[0] or type(model).__name__!r}); call "
                         "model.eval() first")


@torch.no_grad()
def statistics_of(model: nn.Module, batches: Iterable[Tensor], patch: int = 4) -> dict[str, list[Tensor]]:
    """Eq. 9: mean and variance of each channel and of each patch at the input of every Conv2d, averaged over
    batches by their size, for Eq. 10 to match. collect_stats.py does the same and can stop and resume.
    model: in eval mode; batches: normalised images [B, 3, S, S] on its device; patch: pixels a side of a map
    -> {layer name: [channel_mean, channel_var, patch_mean, patch_var]}, float32.   ValueError in train mode
    or without images"""
    require_eval(model)
    convolutions = [name for name, layer in matched_layers(model).items() if isinstance(layer, nn.Conv2d)]
    sums, count = dict.fromkeys(convolutions, 4 * (0,)), 0
    for images in batches:
        with layer_inputs(model, convolutions) as inputs:
            model(images)
        for name in convolutions:
            vectors = *channel_stats(inputs[name]), *patch_stats(inputs[name], patch)
            sums[name] = [total + len(images) * vector[0].double()
                          for total, vector in zip(sums[name], vectors)]
        count += len(images)
    if not count:
        raise ValueError("no images to take statistics of")
    return {name: [(total / count).float() for total in vectors] for name, vectors in sums.items()}


def checked_targets(model: nn.Module, targets: dict, weights: dict[str, float]) -> dict[str, tuple]:
    """The targets of every layer that has a weight; where none are given, a BatchNorm2d's running statistics.
    -> {layer: 2 vectors (BatchNorm2d) or 4 (Conv2d)}.   ValueError names what is missing or misshapen."""
    require_eval(model)
    layers, found = matched_layers(model), {}
    if lacking := layers.keys() - weights.keys():
        raise ValueError(f"weights lack layer {min(lacking)!r}; give every layer of matched_layers(model) "
                         "one, 0 to leave it out")
    for name, layer in layers.items():
        if not weights[name]:
            continue
        is_bn = isinstance(layer, nn.BatchNorm2d)
        if name not in targets and not is_bn:
            raise ValueError(f"layer {name!r} (Conv2d) has no targets; collect them with "
                             "statistics_of(model, batches, patch), or give it weight 0")
        found[name] = tuple(targets[name]) if name in targets else (layer.running_mean, layer.running_var)
        count, channels = (2, layer.num_features) if is_bn else (4, layer.in_channels)
        shapes = [tuple(target.shape) for target in found[name]]
        if len(shapes) != count or {shape[-1] for shape in shapes[:2]} != {channels}:
            raise ValueError(f"layer {name!r}: targets of shapes {shapes}; expected {count} vectors, the "
                             f"first two of {channels} channels")
    return found


def check_input(name: str, x: Tensor, target: tuple[Tensor, ...], patch: int, groups: int) -> None:
    """ValueError where a layer's input x [groups*B, C, H, W] does not fit its targets."""
    height, width = x.shape[2:]
    cells = -(-height // patch) * -(-width // patch)
    if len(target) == 4 and target[2].shape[-1] != cells:
        raise ValueError(f"layer {name!r}: an input of shape {tuple(x.shape)} has {cells} patches of {patch} "
                         f"pixels a side, its targets have {target[2].shape[-1]}; use their patch and size")
    if len(x) % groups:
        raise ValueError(f"layer {name!r}: {len(x)} inputs are not {groups} batches of one size")


class Matching:
    """L'_BN, Eq. 6, and L'_Conv, Eq. 10, by autograd.

    model: in eval mode; targets: {Conv2d's name: (channel_mean, channel_var, patch_mean, patch_var)}, Eq. 9,
    each [n], or [groups, n] where groups differ; of a BatchNorm2d its running statistics, unless (mean, var)
    are given. weights: {layer name: weight in the loss, 0 to leave it out}; alpha: weight of the past in the
    moving averages, 0 = Eq. 1; patch: pixels a side. ValueError names a layer that does not fit.

        state = matching.start(groups)                             # once for each image batch
        with matching.hooks(dropped) as inputs:                    # dropped: names of layers left out
            logits = matching.model(images)
        bn, conv, state = matching.inject(inputs, state)           # two scalars, new moving averages
        (classification_loss + bn + conv).backward()
    """

    def __init__(self, model: nn.Module, targets: dict, weights: dict[str, float], *, alpha: float = 0.8,
                 patch: int = 4):
        if any(getattr(layer, "folded", False) for layer in model.modules()):
            raise ValueError("the model is of freeze(), for ClosedFormMatching; give one that is not")
        self.model, self.weights, self.alpha, self.patch = model, weights, alpha, patch
        self.targets = checked_targets(model, targets, weights)

    def start(self, groups: int) -> dict:
        """The state before the first iteration: no moving averages."""
        return {"groups": groups}

    def hooks(self, dropped: Iterable[str] = ()):
        """A context that collects the layers' inputs of a forward pass."""
        return layer_inputs(self.model, self.targets.keys() - set(dropped))

    def inject(self, inputs: dict[str, Tensor], state: dict,
               kept: Tensor | None = None) -> tuple[Tensor, Tensor, dict]:
        """Measures the inputs of a forward pass, moves the averages. kept: unused, dropped layers have no
        hook.   -> L'_BN, L'_Conv, new state"""
        groups, state = state["groups"], dict(state)
        bn = conv = next(self.model.parameters()).new_zeros(())
        for name, x in inputs.items():
            is_conv = len(self.targets[name]) == 4                   # a BatchNorm2d has two
            check_input(name, x, self.targets[name], self.patch, groups)
            current = channel_stats(x, groups) + (patch_stats(x, self.patch, groups) if is_conv else ())
            loss = 0
            for kind, (value, target) in enumerate(zip(current, self.targets[name])):
                past, now = state.get((name, kind)), value.detach()         # as utils.losses.sds_match
                ema = state[name, kind] = now if past is None else self.alpha * past + (1 - self.alpha) * now
                distance = torch.linalg.vector_norm(value - target - (now - ema), dim=-1)
                loss = loss + self.weights[name] * distance.sum()
            bn, conv = (bn, conv + loss) if is_conv else (bn + loss, conv)
        return bn, conv, state
