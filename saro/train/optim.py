"""Make the optimizer and the learning-rate schedule."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn
from torch.optim.lr_scheduler import ConstantLR, CosineAnnealingLR, LinearLR, LRScheduler, SequentialLR

from saro.config import TrainConfig


def make_optimizer(parameters: Iterable[nn.Parameter], options: TrainConfig) -> torch.optim.Optimizer:
    """Make an AdamW optimizer (Loshchilov & Hutter 2019) for fp32 parameters, with weight decay on matrices only."""
    parameters = list(parameters)
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": options.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if options.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=options.lr, betas=options.betas, fused=True)
    import bitsandbytes.optim as bnb

    kind = {"adamw8bit": bnb.AdamW8bit, "paged_adamw8bit": bnb.PagedAdamW8bit}[options.optimizer]
    return kind(groups, lr=options.lr, betas=options.betas)


def make_scheduler(optimizer: torch.optim.Optimizer, options: TrainConfig, total_steps: int) -> LRScheduler:
    """Make a schedule that warms up linearly over a share ``warmup`` of the steps, then follows ``schedule``.

    No step has a rate of zero: the first of w warm-up steps runs at 1 / (w + 1) of the peak, and a decay would reach
    zero one step after the last one.
    """
    warmup_steps = min(round(options.warmup * total_steps), total_steps - 1)
    decay_steps = total_steps - warmup_steps
    if options.schedule == "cosine":
        decay = CosineAnnealingLR(optimizer, T_max=decay_steps)
    elif options.schedule == "linear":
        decay = LinearLR(optimizer, start_factor=1.0, end_factor=0.0, total_iters=decay_steps)
    else:
        decay = ConstantLR(optimizer, factor=1.0)
    if not warmup_steps:
        return decay
    warmup = LinearLR(optimizer, start_factor=1 / (warmup_steps + 1), total_iters=warmup_steps)
    return SequentialLR(optimizer, [warmup, decay], milestones=[warmup_steps])
