"""Weights, optimizer and schedule after some steps, for tests of checkpoints."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from saro.config import TrainConfig
from saro.train import checkpoint
from saro.train.checkpoint import TrainingState, load_checkpoint, save_checkpoint
from saro.train.optim import make_optimizer, make_scheduler


class State:
    """Weights, optimizer and schedule, as they are after some steps."""

    def __init__(self, optimizer: str = "adamw", seed: int = 0, shape: tuple[int, ...] = (80, 60)) -> None:
        random = torch.Generator().manual_seed(seed)
        # 8-bit optimizers keep states of less than 4096 entries in 32 bits: one matrix is larger.
        self.trainable = {
            "large.weight": nn.Parameter(torch.randn(shape, generator=random)),
            "small.weight": nn.Parameter(torch.randn(3, 4, generator=random)),
            "bias": nn.Parameter(torch.randn(5, generator=random)),
        }
        options = TrainConfig(optimizer=optimizer, lr=1e-2, weight_decay=0.1, warmup=0.3)
        self.optimizer = make_optimizer(self.trainable.values(), options)
        self.scheduler = make_scheduler(self.optimizer, options, 10)
        self._random = torch.Generator().manual_seed(7)

    def train(self, steps: int) -> State:
        for _ in range(steps):
            for parameter in self.trainable.values():
                parameter.grad = torch.randn(parameter.shape, generator=self._random)
            self.optimizer.step()
            self.scheduler.step()
        return self

    def save(self, root: Path, step: int, keep: int = 5) -> Path:
        save_checkpoint(root, step, self._training(), keep)
        return checkpoint.checkpoint_folder(root, step)

    def load(self, folder: Path) -> int:
        return load_checkpoint(folder, self._training())

    def _training(self) -> TrainingState:
        return TrainingState(self.trainable, self.optimizer, self.scheduler)

    def states(self) -> list[dict[str, torch.Tensor]]:
        return [self.optimizer.state[p] for p in self.trainable.values()]
