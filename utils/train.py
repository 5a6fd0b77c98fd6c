"""One training loop for backbones, weak teachers, score networks, MoCo, probes and students; accuracy."""
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import lr_scheduler

from utils import fail
from utils.augment import normalize
from utils.processes import shard, world_size
from utils.run import Progress, send


def fit(trained: tuple, draw_batches: Callable, train_epoch: Callable, *, epochs: int, name: str,
        resume: dict | None = None, save: Callable | None = None,
        remedy: str = "use a smaller --lr or --weight-decay") -> Iterator[int]:
    """Train; yields the number of each epoch done, from 1, and the caller may then test, save or print.

    trained       (model, optimizer, schedule of the learning rate by epoch, ...): all that changes
    draw_batches  function(epoch) -> torch.Generator, batches [LongTensor [B], ...]; called once an epoch
    train_epoch   function(epoch, batches, rng): takes a step for each batch and yields its loss, a scalar
    resume        what state() gave in an earlier process, or None
    save          function(state), called after every step; state() gives all that a resumed training needs
    remedy        printed where a loss or a weight is not finite, which ends the phase
    """
    model, _, schedule, *_ = trained
    first = done = 0                                     # epoch to go on in, its steps done
    if resume:
        first, done = resume["epoch"], resume["done"]
        for part, state_dict in zip(trained, resume["trained"]):
            part.load_state_dict(state_dict)
    nonfinite, progress = NonFinite(["loss"], next(model.parameters()).device), None

    def state():
        check_finite(nonfinite, model, name, remedy)
        return {"epoch": epoch, "done": done, "rng": rng.get_state(),
                "trained": [part.state_dict() for part in trained]}

    for epoch in range(epochs):
        rng, batches = draw_batches(epoch)
        sizes = [len(batch) for batch in batches]
        progress = progress or Progress(name, epochs * sum(sizes), "images")
        if epoch < first:                                # drawn all the same: students' one generator goes on
            progress.skip(sum(sizes))
            continue
        if resume and epoch == first:
            rng.set_state(resume["rng"])
            progress.skip(sum(sizes[:done]))
        model.train()
        try:
            for loss in train_epoch(epoch, batches[done:], rng):
                done += 1
                nonfinite.update(epoch * len(batches) + done, loss)
                if save:
                    save(state)
                progress.step(lambda: f"epoch {epoch + 1}  loss {loss.item():.3f}", sizes[done - 1])
        except ValueError as error:
            if "more than 1 value per channel" not in str(error):
                raise
            fail(f"{name}: BatchNorm cannot normalise a batch of one image; use a larger --batch-size, more "
                 "images, or a network without BatchNorm such as convnet_w64")
        schedule.step()
        done = 0
        check_finite(nonfinite, model, name, remedy)
        yield epoch + 1


def shuffled(rows: Tensor, batch_size: int, rng_of: Callable, drop_last: bool = False) -> Callable:
    """-> draw_batches of `fit`: rows [N] in an order drawn from the generator rng_of(epoch). A last batch of
    one image, which BatchNorm cannot normalise, joins the batch before; drop_last: only whole batches."""
    def draw_batches(epoch):
        rng = rng_of(epoch)
        batches = list(rows[torch.randperm(len(rows), generator=rng)].split(batch_size))
        if drop_last and len(batches[-1]) < batch_size:
            batches.pop()
        if len(batches) > 1 and batch_size > 1 and len(batches[-1]) == 1:
            batches[-2:] = [torch.cat(batches[-2:])]
        return rng, batches
    return draw_batches


def full_batch(count: int, whole_up_to: int, batch_size: int) -> int:
    """Size of a batch: all of `count` images where they are at most whole_up_to."""
    return count if count <= whole_up_to else batch_size


def make_step(optimizer: torch.optim.Optimizer, loss_of: Callable, cuda_graphs: bool = False) -> Callable:
    """-> step(*inputs): calls loss_of(*inputs) -> (loss, *others), updates the weights and returns (loss,
    *others), the loss detached.   cuda_graphs: both passes are replayed, a graph for each size of a batch"""
    parameters = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]

    def loss_and_gradients(*inputs):
        loss, *others = loss_of(*inputs)
        optimizer.zero_grad()
        loss.backward()  # DistributedDataParallel averages gradients here, not in autograd.grad
        return loss.detach(), *others, *(parameter.grad for parameter in parameters)

    graphs = defaultdict(partial(Graphed, loss_and_gradients))

    def step(*inputs):
        results = (graphs[len(inputs[0])] if cuda_graphs else loss_and_gradients)(*inputs)
        outputs, gradients = results[:-len(parameters)], results[-len(parameters):]
        for parameter, gradient in zip(parameters, gradients):
            parameter.grad = gradient  # a replayed graph fills it and does not set .grad
        optimizer.step()
        return outputs
    return step


class Record(dict):
    """Tensors and plain values that change in training beside the networks, for `trained` of `fit`."""

    def __init__(self, device, **values):
        super().__init__(values)
        self.device = device

    def state_dict(self) -> dict:
        return dict(self)

    def load_state_dict(self, saved: dict) -> None:
        self.update(send(saved, self.device))


class Training(NamedTuple):
    """A training by SGD: of a backbone, a pruned teacher, a score network, MoCo or a probe."""
    name: str                               # shown in progress and errors, such as "probe"
    epochs: int
    batch_size: int
    lr: float
    weight_decay: float
    momentum: float = 0.9
    schedule: str = "cosine"                # of the learning rate, with the next three: see `learning_rates`
    warmup_epochs: int = 0
    step_epochs: int = 30
    step_factor: float = 0.1
    crop: str = "resized"
    seed: int = 0
    cuda_graphs: bool = False
    remedy: str = "use a smaller --lr or --weight-decay"    # see `fit`

    def optimizer(self, model: nn.Module) -> tuple[torch.optim.Optimizer, lr_scheduler.LRScheduler]:
        """-> optimizer, the schedule of its learning rate"""
        sgd = torch.optim.SGD(model.parameters(), lr=self.lr, momentum=self.momentum,
                              weight_decay=self.weight_decay, fused=next(model.parameters()).is_cuda)
        return sgd, learning_rates(sgd, self.schedule, self.epochs, self.warmup_epochs, self.step_epochs,
                                   self.step_factor)


def learning_rates(optimizer: torch.optim.Optimizer, schedule: str, epochs: float, warmup_epochs: int = 0,
                   step_epochs: int = 30, step_factor: float = 0.1) -> lr_scheduler.LRScheduler:
    """The schedule per epoch: constant, cosine to 0, or step (times step_factor after every step_epochs),
    after warmup_epochs in which the rate rises from a hundredth."""
    if schedule == "cosine":
        rates = lr_scheduler.CosineAnnealingLR(optimizer, epochs - warmup_epochs)
    elif schedule == "step":
        rates = lr_scheduler.StepLR(optimizer, step_epochs, step_factor)
    else:
        rates = lr_scheduler.ConstantLR(optimizer, 1)
    if not warmup_epochs:
        return rates
    warmup = lr_scheduler.LinearLR(optimizer, 0.01, total_iters=warmup_epochs)
    return lr_scheduler.SequentialLR(optimizer, [warmup, rates], [warmup_epochs])


@torch.inference_mode()
def split_accuracy(model: nn.Module, split, mean_std: Tensor,
                   jointly: bool = False) -> tuple[float, list[float | None]]:
    """Test a model on a split (utils/data.py).   mean_std [2, 3] on the model's device; jointly: each process
    of torchrun tests a share of the images   -> top-1 in %, of each class too; None for one without images"""
    model.eval()
    counts = torch.zeros(2, len(split.classes), dtype=torch.long, device=mean_std.device)
    for images, labels in split.batches(shard(torch.arange(len(split)).split(500)) if jointly else 500):
        logits = model(normalize(send(images, mean_std.device), *mean_std))
        labels = labels.to(logits.device)
        counts[0].index_add_(0, labels, (logits.argmax(1) == labels).long())
        counts[1].index_add_(0, labels, torch.ones_like(labels, dtype=torch.long))
    counts = counts.cpu()                                            # only here does the host wait for a GPU
    if jointly and world_size() > 1:
        dist.all_reduce(counts)
    correct, total = counts.sum(1).tolist()
    return 100 * correct / total, [round(100 * hits / count, 2) if count else None
                                 for hits, count in counts.T.tolist()]


def floating(model: nn.Module) -> list[Tensor]:
    """The model's floating-point weights and buffers, themselves, not copies."""
    return [value for value in model.state_dict().values() if value.is_floating_point()]


@contextmanager
@torch.no_grad()
def swapped(weights: list[Tensor], others: list[Tensor]) -> Iterator[None]:
    """Inside the block the tensors `weights` have the values of others."""
    own = [value.clone() for value in weights]
    for one, other in zip(weights, others):
        one.copy_(other)
    yield
    for one, value in zip(weights, own):
        one.copy_(value)


class DepthwiseInFloat32(nn.Conv2d):
    """A depthwise convolution that trains outside autocast: a CPU takes up to twelve times as long in
    bfloat16."""

    def forward(self, x):
        if not self.training:
            return super().forward(x)
        with torch.autocast("cpu", enabled=False):
            return super().forward(x.float()).to(x.dtype)


def with_precision(model: nn.Module, device: torch.device, precision: str) -> nn.Module:
    """The model; at bf16 its layers run under autocast, and its outputs are float32 again. Depthwise layers
    of a model in train mode stay in float32 on a CPU."""
    if precision == "bf16":
        for layer in model.modules() if device.type == "cpu" and model.training else ():
            if isinstance(layer, nn.Conv2d) and 1 < layer.groups == layer.in_channels:
                layer.__class__ = DepthwiseInFloat32
        forward = torch.autocast(device.type, torch.bfloat16)(model.forward)
        model.forward = lambda images: forward(images).float()
    return model


def channels_last(model: nn.Module) -> nn.Module:
    """The model in the layout that convolutions are fastest in, unless it has GroupNorms, which lose more."""
    if not any(isinstance(layer, nn.GroupNorm) for layer in model.modules()):
        model.to(memory_format=torch.channels_last)
    return model


class Graphed:
    """function(*tensors) -> tensors as a CUDA graph. The first two calls run as they are, the third is
    captured, and it and all others are replayed. The function must not read a value back to the host, and
    shapes must stay the same. The next replay writes over what one returned. Graphs with one `pool`
    (torch.cuda.graph_pool_handle) share their memory, and return copies."""

    def __init__(self, function, pool=None):
        self.function, self.pool, self.graph, self.calls = function, pool, None, 0

    def __call__(self, *inputs):
        self.calls += 1
        if self.calls < 3:                                           # libraries set themselves up
            return self.function(*inputs)
        if self.graph is None:
            self.inputs, self.graph = [tensor.clone() for tensor in inputs], torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph, pool=self.pool):
                self.outputs = self.function(*self.inputs)
        for mine, tensor in zip(self.inputs, inputs):
            mine.copy_(tensor)
        self.graph.replay()
        return [tensor.clone() for tensor in self.outputs] if self.pool else self.outputs


class NonFinite:
    """For each of some values the first step in which it was not finite; only `first` waits for a GPU."""

    def __init__(self, names, device):
        self.names, self.steps = list(names), torch.full((len(names),), sys.maxsize, device=device)

    def update(self, step: int, *values: Tensor) -> None:
        self.steps = torch.where(torch.stack(values).isfinite(), self.steps, self.steps.clamp(max=step))

    def first(self) -> tuple[int, str] | None:
        """-> (step, names), or None"""
        steps = self.steps.tolist()
        if min(steps) == sys.maxsize:
            return None
        return min(steps), " and ".join(name for name, step in zip(self.names, steps) if step == min(steps))


def check_finite(nonfinite: NonFinite, model: nn.Module, name: str, remedy: str) -> None:
    """Stop when a loss was not finite (`NonFinite`), or a weight is not."""
    if found := nonfinite.first():
        fail(f"{name}: the loss is not finite in step {found[0]}; {remedy}")
    for key, value in model.state_dict().items():
        if not value.isfinite().all():
            fail(f"{name}: {key} is not finite after the last step; {remedy}")
