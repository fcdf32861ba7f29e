"""Keep the weights of a run's best evaluation, and say when evaluations have stopped getting better."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import nn

from saro.config import TrainConfig
from saro.distributed.runtime import Runtime
from saro.distributed.shard import local, part_like, whole
from saro.errors import SaroError, nearest
from saro.files import atomic_write

# A metric with one of these parts in its name is better if it is higher. A loss is better if it is lower. For other metrics
# nobody can say.
_MORE_IS_BETTER = {"accuracies", "mean_token_accuracy", "margins"}
_MORE_OF_CHOSEN_IS_BETTER = {"rewards", "logps", "delta_logps"}


def is_better(metric: str, value: float, than: float) -> bool:
    """Return True if a value of a metric is better than another. NaN is never better, and any number is better than NaN."""
    if math.isnan(than):
        return not math.isnan(value)
    return value < than if _is_loss(metric) else value > than


def find_best(metric: str, evaluations: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """Return the evaluation, a line of metrics.jsonl, with the best value of a metric; the first one of equals."""
    best = evaluations[0]
    for line in evaluations[1:]:
        if is_better(metric, line[metric], best[metric]):
            best = line
    return best


def _is_loss(metric: str) -> bool:
    return "loss" in metric.split("/")


def _is_known(metric: str) -> bool:
    """Return True if one can say which of two values of a metric is better."""
    parts = set(metric.split("/"))
    more_is_better = parts & _MORE_IS_BETTER or ("chosen" in parts and parts & _MORE_OF_CHOSEN_IS_BETTER)
    return _is_loss(metric) or bool(more_is_better)


def check_metric(options: TrainConfig, metrics: Mapping[str, float]) -> None:
    """Check ``keep_best`` against the held-out metrics of a run, before it trains.

    Raises:
        SaroError: the run has no such metric, or nobody can say whether more of it is better.
    """
    name = options.keep_best
    if name is None:
        return
    known = [metric for metric in metrics if _is_known(metric)]
    if name not in known:
        reason = "is no metric of this run" if name not in metrics else "does not tell which of two models is better"
        raise SaroError(f"train.keep_best: {name} {reason}{nearest(name, known)}")


class BestWeights:
    """The weights of a run's best evaluation, in ``OUTPUT/best/step_N.safetensors``.

    Which evaluation was the best follows from metrics.jsonl, so that a resumed run continues as if it had not stopped. For
    the same reason the weights of an earlier best one stay as long as a checkpoint from before the new one does.

    Args:
        folder: the run's folder.
        options: ``keep_best`` names the metric; if it is None, no evaluation is the best. ``patience``, see ``is_exhausted``.
    """

    def __init__(self, folder: Path, options: TrainConfig) -> None:
        self._folder = folder / "best"
        self._metric = options.keep_best
        self._patience = options.patience
        self._steps: list[int] = []  # steps of the evaluations that were the best so far
        self._value = float("nan")
        self._since = 0  # evaluations since the best one

    @property
    def step(self) -> int | None:
        """Number of steps after which the best evaluation was made; None if there was none."""
        return self._steps[-1] if self._steps else None

    @property
    def is_exhausted(self) -> bool:
        """True if as many evaluations as ``patience`` says, one after the other, were not better than the best one."""
        return self._patience is not None and self._since >= self._patience

    def resume(self, runtime: Runtime, evaluations: Sequence[Mapping[str, float]]) -> None:
        """Continue after these evaluations, lines of metrics.jsonl on rank 0, and delete weights of later ones."""
        if self._metric is None:
            return
        for line in runtime.broadcast(list(evaluations)):
            self._judge(int(line["step"]), line)
        if runtime.is_main:
            self._delete(lambda step: step not in self._steps)

    def see(
        self, runtime: Runtime, step: int, metrics: Mapping[str, float], trainable: Mapping[str, nn.Parameter]
    ) -> None:
        """Judge an evaluation after ``step`` steps, and write the weights if it is the best so far."""
        if self._metric is None:
            return
        # Ranks must agree, so rank 0's value counts.
        if not self._judge(step, runtime.broadcast({self._metric: metrics[self._metric]})):
            return
        weights = {}
        for name, parameter in trainable.items():
            # All ranks that share weights take part, and only rank 0 keeps the result.
            tensor = whole(parameter.detach())
            if runtime.is_main:
                weights[name] = tensor.cpu().contiguous()
        if runtime.is_main:
            self._folder.mkdir(exist_ok=True)
            with atomic_write(self._file(step), "wb") as file:
                file.write(save(weights))

    def forget(self, oldest: int) -> None:
        """Delete weights that no resumed run can need, if the oldest checkpoint is that of ``oldest`` steps."""
        # When a run resumes from a checkpoint, the evaluation of the same step may be missing.
        earlier = [step for step in self._steps if step < oldest]
        self._delete(lambda step: step in earlier[:-1])

    def load(self, runtime: Runtime, trainable: Mapping[str, nn.Parameter]) -> None:
        """Give the model the weights of the best evaluation, if there was one.

        Raises:
            SaroError: their file is gone or damaged.
        """
        if not self._steps:
            return
        loaded: dict[str, torch.Tensor] = {}

        def read() -> None:
            path = self._file(self._steps[-1])
            try:
                loaded.update(load_file(path))
            except (OSError, SafetensorError) as error:
                raise SaroError(
                    f"{path}: cannot be read ({error}); restore it, or start over with --overwrite"
                ) from error

        runtime.on_main(read)
        with torch.no_grad():
            for name, parameter in trainable.items():
                # Send one whole tensor at a time: all of them may not fit on ranks that share the weights.
                tensor = loaded[name] if runtime.is_main else torch.empty(parameter.shape, dtype=parameter.dtype)
                tensor = runtime.broadcast_tensor_(tensor)
                local(parameter).copy_(local(part_like(parameter, tensor)))

    def _judge(self, step: int, metrics: Mapping[str, float]) -> bool:
        value = metrics[self._metric]
        self._since += 1
        if not self._steps or is_better(self._metric, value, self._value):
            self._steps.append(step)
            self._value, self._since = value, 0
            return True
        return False

    def _file(self, step: int) -> Path:
        return self._folder / f"step_{step:06d}.safetensors"

    def _delete(self, is_old: Callable[[int], bool]) -> None:
        for file in self._folder.glob("step_*.safetensors"):
            number = file.stem.removeprefix("step_")
            # Only digits may follow step_, so that a user's copy such as step_000100.good.safetensors stays.
            if number.isdecimal() and is_old(int(number)):
                file.unlink()
