"""Training by all processes of torchrun, as one alone would: DistributedDataParallel with joint BatchNorm."""
from functools import cache

import torch
import torch.distributed as dist
from torch import Tensor, nn

from utils.processes import shard, world_size


class JointSum(torch.autograd.Function):
    """Sum of a tensor over all processes; its gradient is the sum of theirs too."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        total = x.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        return JointSum.apply(gradient.contiguous())


class JointBatchNorm2d(nn.BatchNorm2d):
    """BatchNorm2d over the batches of all processes together: nn.SyncBatchNorm is for GPUs alone."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        precise = x.to(self.running_mean.dtype)                      # autocast may have narrowed it
        mine = precise.new_tensor(x.numel() // x.shape[1])
        count = JointSum.apply(mine)
        mean = JointSum.apply(precise.mean((0, 2, 3)) * mine / count)
        centred = precise - mean[:, None, None]
        var = JointSum.apply(centred.square().mean((0, 2, 3)) * mine / count)
        with torch.no_grad():
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(var * count / (count - 1), self.momentum)
        scale = (torch.rsqrt(var + self.eps) * self.weight)[:, None, None]
        return (centred * scale + self.bias[:, None, None]).to(x.dtype)


def in_parallel(model: nn.Module, device: torch.device) -> nn.Module:
    """The model, to be trained by all processes together, each on its `share` of a batch."""
    if world_size() == 1:
        return model
    group = nccl() if device.type == "cuda" else None
    if group:
        nn.SyncBatchNorm.convert_sync_batchnorm(model, group)
    else:
        for layer in model.modules():
            if isinstance(layer, nn.BatchNorm2d):
                layer.__class__ = JointBatchNorm2d
    return nn.parallel.DistributedDataParallel(model, process_group=group)


@cache
def nccl():
    """The group of all processes for GPUs; never destroyed, which would wait for one that failed."""
    return dist.new_group(backend="nccl")


def share(rows: Tensor) -> Tensor:
    """This process's part of a batch; a batch with fewer images than processes goes to each as a whole."""
    return shard(rows) if len(rows) >= world_size() else rows


def gathered(mine: Tensor, count: int) -> Tensor:
    """Bools of this process's `share` of a batch of `count` -> of the whole batch."""
    if world_size() == 1:
        return mine
    whole = torch.zeros(count, dtype=torch.uint8, device=mine.device)
    share(whole).copy_(mine)
    dist.all_reduce(whole, dist.ReduceOp.MAX, nccl() if mine.is_cuda else None)
    return whole.bool()


def share_weight(mine: int, whole: int) -> float:
    """Factor for the mean loss over this process's `mine` of a batch's `whole` images, so that the average
    over processes is the mean over the batch."""
    return mine * world_size() / whole if whole >= world_size() else 1.0
