"""How recover.py fills a GPU: several image batches in one pass, and a pass as one CUDA graph."""
import math
from collections.abc import Callable
from itertools import groupby

import torch

from utils.checkpoint import Checkpoint
from utils.processes import barrier, rank, world_size
from utils.train import Graphed

SATURATING_PIXELS = 1 << 22      # in a pass that leaves no GPU idle: 81 batches of 50 at 32x32; an estimate


def make_passes(checkpoint: Checkpoint, asked: int | str, kinds: list[tuple], gradient: Callable,
                match: Callable, image_size: int, device: torch.device) -> list[list[int]]:
    """Which batches share a pass, as lists of their numbers: neighbours of one size and slot, as a pass has
    one draw of backbones. Saved with the unfinished work: every process and every restart has the same.
    asked: how many, or auto: as many as fill a GPU; kinds: (number of images, slot) of each batch;
    gradient: `recover.matching_gradient`; match: function(labels [1, B]) -> matchers"""
    if rank() == 0 and (checkpoint.read("passes") or {}).get("asked") != asked:
        passes = []
        for kind, alike in groupby(range(len(kinds)), key=lambda i: kinds[i]):
            alike, size = list(alike), asked
            if asked == "auto":
                matchers = match(torch.zeros(1, kind[0], dtype=torch.long, device=device))
                size = min(fitting_groups(gradient, matchers, kind[0], image_size, device),
                           math.ceil(len(alike) / world_size()))
            passes += [alike[first:first + size] for first in range(0, len(alike), size)]
        checkpoint.save({"asked": asked, "groups": passes}, "passes")
    barrier()
    return checkpoint.read("passes")["groups"]


def fitting_groups(gradient: Callable, matchers: list, batch_size: int, image_size: int,
                   device: torch.device) -> int:
    """How many batches fill a GPU and fit into its memory, measured on one; 1 on a CPU."""
    if device.type != "cuda":
        return 1
    pixels, needed = torch.zeros(1, batch_size, 3, image_size, image_size, device=device), 0
    labels = torch.zeros(1, batch_size, dtype=torch.long, device=device)
    for matcher in matchers:
        kept = torch.ones(len(matcher.targets), dtype=torch.bool, device=device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        gradient(matcher, labels, 1.0, pixels, {}, kept, matcher.start(1))
        needed = max(needed, torch.cuda.max_memory_allocated(device) - before)
    torch.cuda.empty_cache()
    return max(1, min(int(0.8 * torch.cuda.mem_get_info(device)[0] / needed),
                      SATURATING_PIXELS // pixels[0, :, 0].numel()))


def graphed(gradient: Callable) -> Callable:
    """`recover.matching_gradient` as a CUDA graph for each matcher, for one call of recover_batch: labels and
    ce_weight are frozen into it. Layers are dropped by the mask `kept` alone."""
    pool, graphs = torch.cuda.graph_pool_handle(), {}

    def replayed(matcher, labels, ce_weight, pixels, view, kept, state, dropped=()):
        if id(matcher) not in graphs:
            def flat(pixels, kept, ema, started, *rows):
                pixel_grad, losses, new = gradient(matcher, labels, ce_weight, pixels, dict(zip(view, rows)),
                                                   kept, (ema, started))
                return pixel_grad, *losses, *new

            graphs[id(matcher)] = Graphed(flat, pool)
        pixel_grad, *losses, ema, started = graphs[id(matcher)](pixels.detach(), kept, *state, *view.values())
        return pixel_grad, tuple(losses), (ema, started)

    return replayed
