"""Write what training leaves in the run's folder, and restore what a resumed run needs of it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from saro.config import TrainConfig
from saro.distributed.runtime import Runtime
from saro.train.best import BestWeights
from saro.train.checkpoint import (
    TrainingState,
    check_not_past,
    list_checkpoints,
    save_checkpoint,
    save_parts,
    set_aside_later_checkpoints,
)
from saro.train.metrics import MetricsFile, drop_later_results, format_metrics
from saro.train.restore import check_same_weights, restore_newest

# Metrics printed on the terminal; metrics.jsonl has all of them.
SHOWN = ("loss", "rewards/margins", "rewards/accuracies", "grad_norm", "lr", "tokens_per_second")


class TrainOutput:
    """metrics.jsonl, the checkpoints and the best weights of a run. All ranks call all methods, in the same order.

    Args:
        training: the state that checkpoints hold.
        total_steps: number of steps of the whole run.
    """

    def __init__(self, runtime: Runtime, options: TrainConfig, training: TrainingState, total_steps: int) -> None:
        self.best = BestWeights(Path(options.output), options)
        self._runtime = runtime
        self._options = options
        self._training = training
        self._total_steps = total_steps
        self._folder = Path(options.output)
        self._checkpoints = self._folder / "checkpoints"
        self._metrics: MetricsFile | None = None
        if runtime.mesh is not None:
            runtime.check_common_folder(self._folder)

    def restore(self) -> int:
        """Restore the newest intact checkpoint, and return its step, or 0 if there are no checkpoints."""
        total_steps, say = self._total_steps, self._runtime.say
        self._runtime.on_main(lambda: check_not_past(self._checkpoints, total_steps))
        start = restore_newest(self._runtime, self._checkpoints, self._training)
        rate = f"learning rate {self._training.scheduler.get_last_lr()[0]:.3g}"
        schedule = f"; {rate}, {self._options.schedule} over {total_steps} steps" if start < total_steps else ""
        if start:
            say(f"resuming after step {start} of {total_steps}{schedule}")
        return start

    def open(self, start: int, *, resume: bool) -> None:
        """Begin after ``start`` steps. A resumed run makes later steps again: what the folder has of them is removed."""
        if self._runtime.is_main:
            if resume:
                set_aside_later_checkpoints(self._checkpoints, start)
            self._metrics = MetricsFile(self._folder / "metrics.jsonl", start)
        self.best.resume(self._runtime, self._metrics.evaluations if self._metrics else [])
        if self._runtime.is_main and resume and start < self._total_steps and not self.best.is_exhausted:
            drop_later_results(self._folder, start)

    def has_evaluation(self, start: int) -> bool:
        """Return True if the run was evaluated after ``start`` steps, before it was resumed."""
        # Only rank 0 has the file.
        has_evaluation = float(self._metrics is not None and self._metrics.has_evaluation(start))
        return bool(self._runtime.sum_(torch.tensor(has_evaluation, device=self._runtime.device)).item())

    def report(self, step: int, values: Mapping[str, float]) -> None:
        """Write metrics after ``step`` steps to metrics.jsonl and the trackers."""
        if self._metrics is not None:
            self._metrics.write({"step": step, **values})
            self._runtime.log(values, step)

    def report_evaluation(self, step: int, values: Mapping[str, float]) -> None:
        """Write and show held-out metrics after ``step`` steps, and keep the weights if they are the best so far."""
        # Before metrics.jsonl names the evaluation: a kill in between leaves weights that are written again.
        self.best.see(self._runtime, step, values, self._training.trainable)
        self.report(step, values)
        shown = {k: v for k, v in values.items() if k.startswith("eval/loss") or k.removeprefix("eval/") in SHOWN}
        self._runtime.say(f"step {step}/{self._total_steps}  {format_metrics(shown)}")

    def save(self, step: int) -> None:
        """Write a checkpoint after ``step`` steps, if the ranks have the same weights."""
        runtime, training, keep = self._runtime, self._training, self._options.keep_checkpoints
        check_same_weights(runtime, step, training.trainable)
        if runtime.mesh is not None:
            save_parts(runtime, self._checkpoints, step, training, keep)
        elif runtime.is_main:
            save_checkpoint(self._checkpoints, step, training, keep)
        if runtime.is_main:
            self.best.forget(list_checkpoints(self._checkpoints)[0][0])
        runtime.barrier()
