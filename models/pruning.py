"""Structured pruning: channels of convolutions removed, with all that belongs to them. Needs torch alone.

    kept = random_channels(model, 0.66, generator)           # {convolution: channels}; or largest_scales
    shrink(model, kept)
    left = {layer: len(index) for layer, index in kept.items()}      # to store with the state dict
    model = build_model(name, num_classes, image_size, left)         # models/__init__.py: shrink() again
"""
import math
import operator
from bisect import bisect_left
from collections import Counter

import torch
import torch.fx
import torch.nn.functional as F
from torch import nn

CHANNELWISE = (  # modules without parameters
    nn.Identity, nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.GELU, nn.SiLU, nn.Hardswish, nn.Sigmoid, nn.Tanh,
    nn.Dropout, nn.Dropout2d, nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveMaxPool2d, nn.AdaptiveAvgPool2d)
CHANNELWISE_CALLS = (  # functions, and methods by name
    F.relu, F.relu6, F.leaky_relu, F.gelu, F.silu, F.dropout, F.max_pool2d, F.avg_pool2d,
    F.adaptive_max_pool2d, F.adaptive_avg_pool2d, torch.relu, torch.relu_, torch.sigmoid, torch.tanh, "relu",
    "relu_", "sigmoid", "tanh")
ADDITIONS = operator.add, operator.iadd, torch.add, "add", "add_"


class _Tracer(torch.fx.Tracer):
    def is_leaf_module(self, module, name):
        return isinstance(module, nn.AvgPool2d) or super().is_leaf_module(module, name)    # ConvNet's pooling


def _flattens(node, layers):
    """Whether a torch.fx node is flatten(1) of its input [N, C, H, W], or the mean over its pixels."""
    if node.op == "call_module":
        layer = layers[node.target]
        return isinstance(layer, nn.Flatten) and (layer.start_dim, layer.end_dim) == (1, -1)
    if node.target in (torch.mean, "mean"):
        return not node.kwargs and [*node.args[1:]] in ([(2, 3)], [[2, 3]])
    bounds = {"end_dim": -1} | dict(zip(("start_dim", "end_dim"), node.args[1:])) | node.kwargs
    return node.target in (torch.flatten, "flatten") and bounds == {"start_dim": 1, "end_dim": -1}


def coupled(model: nn.Module) -> dict[str, tuple]:
    """The channels that can be removed: those of a convolution, or, where outputs are added, as in the stream
    of a residual stage, the same of all convolutions that are added. On their way to the next convolutions,
    or to the linear layer behind a flatten or a mean over the pixels, every layer acts on each channel by
    itself. A concatenation, a grouped convolution or a layer called twice on the way rules them out.
    -> {first convolution: (all convolutions, norms, consumers)}, tuples of names in the order of the network.
    An error of torch.fx where the flow of the model depends on values."""
    layers, parent = dict(model.named_modules()), {}
    nodes = _Tracer().trace(model).nodes
    calls = Counter(node.target for node in nodes)
    found = {kind: [] for kind in ("convs", "norms", "consumers", "fixed")}    # (node of the channels, name)
    flat = set()                                                     # nodes [N, C*H*W]

    def root(node):
        while parent[node] is not node:
            node = parent[node]
        return node

    for node in nodes:
        inputs, parent[node] = node.all_input_nodes, node
        layer = layers[node.target] if node.op == "call_module" else None
        once, is_flat = calls[node.target] == 1, any(one in flat for one in inputs)
        if once and (isinstance(layer, nn.Linear) if is_flat
                     else isinstance(layer, nn.Conv2d) and layer.groups == 1):
            found["consumers"].append((inputs[0], node.target))
            found["fixed" if is_flat else "convs"].append((node, node.target))
            continue
        norm = once and not is_flat and (isinstance(layer, nn.BatchNorm2d) or isinstance(layer, nn.GroupNorm)
                                         and layer.num_groups == layer.num_channels)
        add = not is_flat and not node.kwargs and node.target in ADDITIONS and len(inputs) == 2
        flattens = not is_flat and _flattens(node, layers)
        for other in inputs:
            parent[root(other)] = root(node)
        if norm:
            found["norms"].append((node, node.target))
        if flattens or is_flat:
            flat.add(node)
        if not (norm or add or flattens or isinstance(layer, CHANNELWISE)
                or layer is None and node.target in CHANNELWISE_CALLS):
            found["fixed"].append((node, node.target))               # which also ties its inputs
    groups = {}
    for kind, members in found.items():
        for node, name in members:
            groups.setdefault(root(node), {kind: () for kind in found})[kind] += (name,)
    return {group["convs"][0]: (group["convs"], group["norms"], group["consumers"])
            for group in groups.values() if group["convs"] and group["consumers"] and not group["fixed"]
            and len({layers[name].out_channels for name in group["convs"]}) == 1}


def _select(layer, index, dim, names):
    """layer.<name> = its entries `index` along dim, for every name; parameters keep their requires_grad."""
    for name in names:
        if (tensor := getattr(layer, name, None)) is not None:
            part = tensor.detach().index_select(dim, index.to(tensor.device))
            trained = isinstance(tensor, nn.Parameter)
            setattr(layer, name, nn.Parameter(part, tensor.requires_grad) if trained else part)


def shrink(model: nn.Module, kept: dict[str, torch.Tensor]) -> nn.Module:
    """Remove all output channels but `kept`, {name of a convolution: indices} as `coupled` names them, in
    place, and what computes with them: of norms, also running statistics, and inputs of the next layers. The
    parameters are new ones: an optimiser is made afterwards.   -> model
    ValueError if a convolution is to lose all channels or is not prunable."""
    layers, plan = dict(model.named_modules()), coupled(model)
    for name, index in kept.items():
        if name not in plan or not len(index):
            raise ValueError(f"{name} is not prunable" if len(index) else f"{name} would lose all channels")
        (convs, norms, consumers), channels, width = plan[name], layers[name].out_channels, len(index)
        for consumer in map(layers.get, consumers):
            size = "in_features" if isinstance(consumer, nn.Linear) else "in_channels"
            run = torch.arange(getattr(consumer, size) // channels)      # of a channel's H*W features, or one
            _select(consumer, (index.cpu()[:, None] * len(run) + run).flatten(), 1, ["weight"])
            setattr(consumer, size, len(run) * width)
        for norm in map(layers.get, norms):
            _select(norm, index, 0, ["weight", "bias", "running_mean", "running_var"])
            if isinstance(norm, nn.GroupNorm):
                norm.num_groups = norm.num_channels = width
            else:
                norm.num_features = width
        for conv in map(layers.get, convs):
            _select(conv, index, 0, ["weight", "bias"])
            conv.out_channels = width
    return model


def random_channels(model: nn.Module, share: float, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """Channels drawn at random, the same part of all that are `coupled` and at least one, such that about
    `share` of the model's parameters are left: the smallest part, to a millionth, with no fewer. Teddy
    (arXiv:2410.07579) keeps 7.72 of ResNet-18's 11.69 million and 1.2 of its 1.8 billion multiply-adds at 224
    pixels, which this does too.
    -> {conv name: sorted indices}, as `shrink` takes them; {} if nothing can be removed"""
    layers, plan = dict(model.named_modules()), coupled(model)
    owners = [(name.rpartition(".")[0], tensor) for name, tensor in model.named_parameters()]
    scale = 2 ** 20

    def channels(part):
        return {name: max(1, round(part / scale * layers[name].out_channels)) for name in plan}

    def parameters(part):
        rows, columns = {}, {}                              # {layer: what is left of them}
        for name, number in channels(part).items():
            convs, norms, consumers = plan[name]
            left = number / layers[name].out_channels
            rows |= dict.fromkeys((*convs, *norms), left)
            columns |= dict.fromkeys(consumers, left)
        return round(sum(tensor.numel() * rows.get(layer, 1)
                         * (columns.get(layer, 1) if tensor.dim() > 1 else 1) for layer, tensor in owners))

    part = bisect_left(range(scale), share * parameters(scale), key=parameters)
    return {name: torch.randperm(layers[name].out_channels, generator=generator)[:number].sort().values
            for name, number in channels(part).items()}


def channel_scales(model: nn.Module) -> dict[str, nn.Parameter]:
    """The BatchNorm scales that decide over channels in network slimming: of the convolutions of `coupled`
    that are added to no other and have one norm, a BatchNorm.   -> {convolution: parameter [C]}"""
    layers = dict(model.named_modules())
    return {name: layers[norms[0]].weight for name, (convs, norms, _) in coupled(model).items()
            if len(convs) == len(norms) == 1 and isinstance(layers[norms[0]], nn.BatchNorm2d)}


def largest_scales(model: nn.Module, sparsity: float, least: float = 0.1) -> dict[str, torch.Tensor]:
    """Network slimming (Liu et al., arXiv:1708.06519): all channels of `channel_scales` but the part
    `sparsity` of them (0 .. below 1) with the smallest |scale| in the whole network. Each convolution keeps
    at least the part `least`: one threshold alone would cut a network in two where a layer's are all small.
    -> {conv name: sorted indices}, as `shrink` takes them"""
    scales = {name: scale.detach().abs() for name, scale in channel_scales(model).items()}
    for scale in scales.values():
        scale[scale.topk(max(1, math.ceil(least * len(scale)))).indices] = math.inf
    every = torch.cat([*scales.values()]).sort().values
    threshold = every[int(sparsity * len(every))]
    return {name: (scale >= threshold).nonzero().flatten() for name, scale in scales.items()}
