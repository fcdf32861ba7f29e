"""Make the optimizer and the learning-rate schedule."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LRScheduler

from saro.config import TrainConfig, cannot_shard
from saro.distributed.shard import is_part
from saro.errors import SaroError

# bitsandbytes keeps smaller tensors in fp32, and one fp32 scale for each block of the others.
_LEAST_8_BIT, _BLOCK_8_BIT = 4096, 256


def make_optimizer(parameters: Iterable[nn.Parameter], options: TrainConfig) -> torch.optim.Optimizer:
    """Make an AdamW optimizer (Loshchilov & Hutter 2019) for fp32 parameters, with weight decay on matrices only.

    Raises:
        SaroError: it is one of bitsandbytes, and ranks share the parameters.
    """
    parameters = list(parameters)
    if options.optimizer != "adamw" and any(map(is_part, parameters)):
        raise SaroError(cannot_shard(options.optimizer))
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


def step_unless(optimizer: torch.optim.Optimizer, failed: torch.Tensor) -> None:
    """Make an optimizer step, unless ``failed``, a bool scalar on the device, is true: then nothing changes.

    torch's fused optimizers look at it on the device, as for gradient scaling. For others the host reads it first.
    """
    if getattr(optimizer, "_step_supports_amp_scaling", False):
        optimizer.found_inf = failed.float()
        optimizer.step()
        del optimizer.found_inf
    elif not failed:
        optimizer.step()


def optimizer_state_bytes(parameter: nn.Parameter, optimizer: str) -> int:
    """Return the bytes of device memory that an optimizer's state of a parameter takes: two moments of each entry.

    A paged optimizer's state is not counted, because it makes room when memory is short.
    """
    n = parameter.numel()
    if optimizer == "paged_adamw8bit":
        return 0
    if optimizer == "adamw" or n < _LEAST_8_BIT:
        return 2 * n * torch.float32.itemsize
    return 2 * (n + math.ceil(n / _BLOCK_8_BIT) * torch.float32.itemsize)


def make_scheduler(optimizer: torch.optim.Optimizer, options: TrainConfig, total_steps: int) -> LRScheduler:
    """Make a schedule that warms up linearly, over ``warmup_steps`` or a share ``warmup`` of all, then follows ``schedule``.

    No step has a rate of zero: the first of w warm-up steps runs at 1 / (w + 1) of the peak, and a decay would reach
    ``min_lr`` one step after the last one.
    """
    return _Schedule(optimizer, options, total_steps)


class _Schedule(LRScheduler):
    """The learning rate as a function of the number of finished steps.

    Its state is only that number. So a resumed run that has another number of steps in all continues on the schedule of
    the new number.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, options: TrainConfig, total_steps: int) -> None:
        self._shape = options.schedule
        self._floor = options.min_lr / options.lr
        warmup_steps = round(options.warmup * total_steps) if options.warmup_steps is None else options.warmup_steps
        self._warmup_steps = min(warmup_steps, total_steps - 1)
        self._decay_steps = total_steps - self._warmup_steps
        super().__init__(optimizer)

    def get_lr(self) -> list[float]:
        factor = self._factor(self.last_epoch)
        return [factor * base for base in self.base_lrs]

    def _factor(self, step: int) -> float:
        """Return the learning rate after ``step`` finished steps, in units of the peak."""
        if step < self._warmup_steps:
            return (step + 1) / (self._warmup_steps + 1)
        if self._shape == "constant":
            return 1.0
        decayed = min((step - self._warmup_steps) / self._decay_steps, 1.0)
        left = 1.0 - decayed if self._shape == "linear" else (1 + math.cos(math.pi * decayed)) / 2
        return self._floor + (1 - self._floor) * left

    def state_dict(self) -> dict[str, int]:
        return {"last_epoch": self.last_epoch}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        # Older versions stored the state of torch's schedulers, which count the steps under the same name.
        self.last_epoch = state_dict["last_epoch"]
        self._last_lr = self.get_lr()
        for group, lr in zip(self.optimizer.param_groups, self._last_lr, strict=True):
            group["lr"] = lr
