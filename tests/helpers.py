"""What several of the tests need."""
import multiprocessing
from collections import Counter
from contextlib import contextmanager

import torch
from torch.utils._python_dispatch import TorchDispatchMode

import utils.closed_form
from utils import PHASES
from utils.train import Graphed

forkserver = multiprocessing.get_context("forkserver")       # its processes need not import the scripts again
forkserver.set_forkserver_preload([*PHASES])


def randn(*shape):
    return torch.randn(shape, dtype=torch.float64)


def checkpoint(path):
    return torch.load(path, weights_only=True)


def assert_near(actual, expected, tolerance):
    """The largest difference is at most `tolerance` times the largest expected value."""
    expected = torch.as_tensor(expected, dtype=actual.dtype)
    assert actual.shape == expected.shape
    assert (actual - expected).abs().max() <= tolerance * expected.abs().max()


def gradient(function, *tensors):
    """function(*tensors) -> its value, and its gradient at each tensor."""
    leaves = [tensor.detach().clone().requires_grad_() for tensor in tensors]
    value = function(*leaves)
    return value.detach(), *torch.autograd.grad(value, leaves)


def counted_reductions(monkeypatch):
    """A list of the tensors that utils.closed_form measures without a graph from now on."""
    reduced = []
    for name in "conv_stats", "bn_stats":
        def counted(x, *rest, measure=getattr(utils.closed_form, name)):
            reduced.append(x)
            return measure(x, *rest)
        monkeypatch.setattr(utils.closed_form, name, counted)
    return reduced


def saved_bytes(model, step):
    """Memory that the graph of step() keeps for its backward pass, beside the weights; each storage counts
    once."""
    kept, weights = {}, {tensor.data_ptr() for tensor in [*model.parameters(), *model.buffers()]}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor  # a reference, so that no address is used again
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        step()
    return sum(tensor.untyped_storage().nbytes() for address,
               tensor in kept.items() if address not in weights)


def counted_operations(function):
    """How many operations function() dispatches, views not counted."""
    counts = Counter()

    class Counting(TorchDispatchMode):
        def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
            counts[operation.is_view] += 1
            return operation(*args, **(kwargs or {}))

    with Counting():
        function()
    return counts[False]


class FakeGraph:
    """A CUDA graph that runs its function again."""

    def __init__(self):
        self.replays = 0

    def replay(self):
        self.replays += 1
        for mine, fresh in zip(self.owner.outputs, self.owner.function(*self.owner.inputs), strict=True):
            mine.copy_(fresh)


def faked_graphs(monkeypatch, *modules):
    """A list of the `Graphed` that these modules make from now on, without a GPU."""
    graphed = []

    def registered(*args):
        graphed.append(Graphed(*args))
        return graphed[-1]

    @contextmanager
    def capture(graph, pool):
        graph.owner = next(one for one in graphed if one.graph is graph)
        yield

    for module in modules:
        monkeypatch.setattr(module, "Graphed", registered)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", FakeGraph)
    monkeypatch.setattr(torch.cuda, "graph", capture)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: "pool")
    return graphed
