"""What several of the tests need."""
import torch

import utils.stats


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
    """A list of the tensors that utils.stats measures without a graph from now on."""
    reduced = []
    for name in "conv_stats", "bn_stats":
        def counted(x, *rest, measure=getattr(utils.stats, name)):
            reduced.append(x)
            return measure(x, *rest)
        monkeypatch.setattr(utils.stats, name, counted)
    return reduced
