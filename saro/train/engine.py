"""fit(): the training loop. It knows steps, packs and sums, but no loss."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import nn

from saro.config import TrainConfig
from saro.data.packs import Pack
from saro.data.steps import Step, Steps
from saro.distributed.runtime import Runtime
from saro.distributed.shard import exchanging_gradients, local, whole
from saro.errors import SaroError
from saro.model.policy import Policy
from saro.program import progress_bar
from saro.train.best import BestWeights
from saro.train.checkpoint import (
    TrainingState,
    check_not_past,
    list_checkpoints,
    save_checkpoint,
    save_parts,
    set_aside_later_checkpoints,
)
from saro.train.metrics import MetricsFile, Progress, drop_later_results, format_metrics
from saro.train.objective import Meter, Objective, Sums, average
from saro.train.optim import make_optimizer, make_scheduler, step_unless
from saro.train.restore import check_same_start, check_same_weights, restore_newest
from saro.train.stop_signals import noting_stop_signals

# Metrics printed on the terminal; metrics.jsonl has all of them.
_SHOWN = ("loss", "rewards/margins", "rewards/accuracies", "grad_norm", "lr", "tokens_per_second")


class PackLog(Protocol):
    """Collects values pack by pack, such as ``PairLog`` does."""

    def observe(self, pack: Pack, sums: Sums) -> None:
        """See a pack with its sums. Tensors may be kept but must not be read: that would stall the device."""

    def watch(self, step: int, means: Mapping[str, float]) -> None:
        """Use or discard what was kept; called on all ranks after each log line.

        Args:
            step: number of finished steps.
            means: averages of the metrics since the last log line. A log that they tell enough need not read the device.
        """


@dataclass(frozen=True)
class Outcome:
    """How fit() ended.

    Attributes:
        step: number of finished steps; less than ``total_steps`` if ``patience`` or a signal ended the run.
        total_steps: number of steps of the whole run.
        stopped_by: the signal that stopped it before all steps were done, else None.
        tokens_per_second: rate at which the model read tokens, over all ranks, without start-up, evaluation and saving.
        peak_memory_gib: peak memory of this rank, GiB.
        best_step: with ``keep_best``, the number of steps after which the weights that the model now has were best.
    """

    step: int
    total_steps: int
    stopped_by: signal.Signals | None
    tokens_per_second: float
    peak_memory_gib: float
    best_step: int | None = None


def fit(
    runtime: Runtime,
    policy: Policy,
    objective: Objective,
    steps: Steps,
    total_steps: int,
    options: TrainConfig,
    *,
    ids: Sequence[str],
    evaluate: Callable[[int], dict[str, float]] | None = None,
    log: PackLog | None = None,
    resume: bool = False,
) -> Outcome:
    """Train ``policy`` for ``total_steps`` steps, or for those that are left after the newest checkpoint.

    Each step draws its records by number, runs this rank's packs, divides each loss sum by its count over the whole
    step, and makes one optimizer step. SIGTERM and Ctrl-C finish the step, write a checkpoint and return. An evaluation
    that was due then is made when the run is resumed. With ``keep_best`` the policy ends with the weights of the best
    evaluation, and with ``patience`` training may end early.

    Args:
        ids: id of each record, to name the records of a step in an error.
        evaluate: returns held-out metrics, given the number of finished steps; called every ``eval_every`` steps.
        log: sees every pack.
        resume: continue from the newest intact checkpoint in the output folder, if there are checkpoints.

    Raises:
        SaroError: the loss or the gradient is not finite; the step has not changed the weights. Or the first step has
            changed none of them. Or all checkpoints are damaged, the run has made more steps than ``total_steps``, or a
            rank has another model, schedule or start than rank 0, or other weights at a checkpoint.
    """
    output = Path(options.output)
    checkpoints = output / "checkpoints"
    trainable = policy.trainable()
    parameters = list(trainable.values())
    optimizer = make_optimizer(parameters, options)
    scheduler = make_scheduler(optimizer, options, total_steps)
    training = TrainingState(trainable, optimizer, scheduler)
    if runtime.mesh is not None:
        runtime.check_common_folder(output)
    if resume:
        runtime.on_main(lambda: check_not_past(checkpoints, total_steps))
    start = restore_newest(runtime, checkpoints, training) if resume else 0
    if start:
        schedule = f"learning rate {scheduler.get_last_lr()[0]:.3g}, {options.schedule} over {total_steps} steps"
        runtime.say(f"resuming after step {start} of {total_steps}" + (f"; {schedule}" if start < total_steps else ""))
    check_same_start(runtime, policy, steps.schedule, total_steps, start)
    if runtime.is_main and resume:
        set_aside_later_checkpoints(checkpoints, start)
    file = MetricsFile(output / "metrics.jsonl", start) if runtime.is_main else None
    best = None
    if options.keep_best is not None:
        best = BestWeights(output, options)
        best.resume(runtime, [] if file is None else file.evaluations)
    module, device = runtime.wrap(policy), runtime.device
    meter = Meter()
    clock = _Clock()
    probe = _Probe(parameters)
    step, stop = start, None
    upcoming: Step | None = None

    def is_done() -> bool:
        return step >= total_steps or (best is not None and best.is_exhausted)

    if runtime.is_main and resume and not is_done():
        drop_later_results(output, start)

    def report(values: dict[str, float]) -> None:
        if file is not None:
            file.write({"step": step, **values})
            runtime.log(values, step)

    def is_evaluation_due() -> bool:
        if not evaluate or not options.eval_every:
            return False
        if step == total_steps:
            return best is not None
        return step % options.eval_every == 0

    def report_evaluation() -> None:
        values = evaluate(step)
        if best is not None:
            # Before metrics.jsonl names the evaluation: a kill in between leaves weights that are written again.
            best.see(runtime, step, values, trainable)
        report(values)
        shown = {k: v for k, v in values.items() if k.startswith("eval/loss") or k.removeprefix("eval/") in _SHOWN}
        runtime.say(f"step {step}/{total_steps}  {format_metrics(shown)}")

    def save() -> None:
        check_same_weights(runtime, step, trainable)
        if runtime.mesh is not None:
            save_parts(runtime, checkpoints, step, training, options.keep_checkpoints)
        elif runtime.is_main:
            save_checkpoint(checkpoints, step, training, options.keep_checkpoints)
        if best is not None and runtime.is_main:
            best.forget(list_checkpoints(checkpoints)[0][0])
        runtime.barrier()

    with noting_stop_signals() as received, Progress(total_steps, start, runtime.is_main) as progress:
        if start and is_evaluation_due():
            # The run was stopped before this evaluation. Only rank 0 has the file.
            has_evaluation = file is not None and file.has_evaluation(start)
            if not runtime.sum_(torch.tensor(float(has_evaluation), device=device)).item():
                report_evaluation()
        while not is_done() and stop is None:
            batch = steps[step] if upcoming is None else upcoming
            # Seed each step, so that a resumed run draws the same dropout although no random state is stored.
            torch.manual_seed(_step_seed(options.seed, step, runtime.rank))
            with clock:
                objective.start_step(runtime, policy, batch.records)
                loss = add_gradients(module, objective, batch, meter, log, device, runtime.averaging)
                norm = _clip(parameters, options.max_grad_norm)
                # Loss and signals are summed over ranks, so that a signal to any rank stops all of them.
                sums = runtime.sum_(torch.stack([loss, torch.full_like(loss, len(received))]))
                is_due = (step + 1) % options.log_every == 0
                # The first step is always looked at: an optimizer made of other tensors than the model's trains nothing.
                before = probe.copy() if is_due or step == start else None
                lr = scheduler.get_last_lr()[0]
                step_unless(optimizer, ~(sums[0].isfinite() & norm.isfinite()))
                optimizer.zero_grad(set_to_none=True)
                numbers = [sums, norm.reshape(1).to(sums)]
                if before is not None:
                    changes = probe.count_changes(before).to(sums)  # (2,) changed, compared
                    # Ranks that share the weights have different elements.
                    numbers.append(changes if runtime.mesh is None else runtime.sum_(changes))
                if is_due:
                    metrics = meter.take(runtime)
                    numbers.append(metrics.table.flatten())
                # Lay out the next step's packs and send them while the device works, and only then wait for it.
                has_next = _runs_ahead(device) and step + 1 < total_steps
                upcoming = steps[step + 1].to(device) if has_next else None
                # The only time in a step that the host waits for the device.
                loss_value, signals, norm_value, *logged = torch.cat(numbers).tolist()
                if not (math.isfinite(loss_value) and math.isfinite(norm_value)):
                    records = ", ".join(ids[record] for record in batch.records)
                    raise SaroError(
                        f"step {step + 1}: loss {loss_value}, gradient norm {norm_value}; "
                        f"the weights were not changed. Records of the step: {records}. "
                        "Lower --train.lr, or look at them"
                    )
                if before is not None:
                    num_changed, num_compared, *logged = logged
                    if step == start and not num_changed:
                        raise SaroError(
                            f"step {step + 1}: the optimizer changed no weight; raise --train.lr, or report it"
                        )
                scheduler.step()
            step += 1
            clock.tokens += batch.tokens
            progress.step()
            if is_due:
                means = objective.combine(average(metrics.names, logged))
                values = {
                    "loss": means["loss"],
                    "grad_norm": norm_value,
                    "lr": lr,
                    "epoch": step / steps.schedule.steps_per_epoch,
                    "tokens_per_second": clock.rate(),
                    "peak_memory_gib": runtime.memory(),
                    **_reserved_memory(device),
                    "changed_parameters": num_changed / num_compared,
                    **{name: mean for name, mean in means.items() if name != "loss"},
                }
                report(values)
                progress.line(step, {k: values[k] for k in _SHOWN if k in values})
                if log is not None:
                    log.watch(step, means)
            if signals and step < total_steps:
                stop = signal.Signals(received[0]) if received else signal.SIGTERM
            # The checkpoint comes before a due evaluation, which may take longer than a cluster waits after SIGTERM.
            if stop is not None or (options.save_every and step % options.save_every == 0) or step == total_steps:
                save()
            if stop is None and is_evaluation_due():
                report_evaluation()
                if is_done() and step < total_steps:
                    runtime.say(
                        f"stopped early: {options.patience} evaluations were not better than that of step {best.step}"
                    )
                    save()
    if stop is None and best is not None and best.step is not None:
        best.load(runtime, trainable)
    return Outcome(
        step=step,
        total_steps=total_steps,
        stopped_by=stop,
        tokens_per_second=clock.rate(),
        peak_memory_gib=runtime.memory(),
        best_step=None if best is None else best.step,
    )


def _runs_ahead(device: torch.device) -> bool:
    """Return True if the host queues work on the device and goes on. A CPU is done when a call returns."""
    return device.type != "cpu"


def _reserved_memory(device: torch.device) -> dict[str, float]:
    """Return the peak of the memory that the allocator has taken from a GPU, as a metric in GiB; empty on other devices.

    It is what other programs see, and exceeds ``peak_memory_gib``, that of all tensors, by what is fragmented.
    """
    if device.type != "cuda":
        return {}
    return {"peak_reserved_gib": torch.cuda.max_memory_reserved(device) / 2**30}


def _step_seed(seed: int, step: int, rank: int) -> int:
    """Mix the numbers into a seed: neighbouring steps and ranks get unrelated ones."""
    return int(np.random.SeedSequence([seed, step, rank]).generate_state(1)[0])


def add_gradients(
    module: nn.Module,
    objective: Objective,
    batch: Step,
    meter: Meter,
    log: PackLog | None,
    device: torch.device,
    averaging: int,
) -> torch.Tensor:
    """Add up the gradients of one step. Returns this rank's share of the loss: a float64 scalar without gradient.

    ``averaging``: number of ranks over which the module averages gradients, see ``Runtime.averaging``.
    """
    module.train()
    counts = objective.counts(batch.trees)
    total = torch.zeros((), dtype=torch.float64, device=device)
    for index, pack in enumerate(batch.packs):
        pack = pack.to(device)
        # Ranks exchange gradients once per step, in the backward of the last pack.
        is_last = index == len(batch.packs) - 1
        with exchanging_gradients(module, is_last):
            sums = objective(module(pack, gradient_rows=objective.gradient_rows(pack)), pack)
            loss = torch.stack([value / counts[name] for name, value in sums.losses.items()]).sum()
            # DDP averages gradients over ranks; we want the sum.
            (loss * averaging).backward()
        total += loss.detach()
        meter.add(sums.metrics)
        if log is not None:
            log.observe(pack, sums)
        # Their graph holds what the layers keep beside saved tensors, such as casts of all adapters, until it is freed.
        del sums, loss
    return total


@torch.no_grad()
def evaluate(
    runtime: Runtime,
    policy: Policy,
    objective: Objective,
    packs: Iterable[Pack],
    prefix: str = "eval/",
    log: PackLog | None = None,
) -> dict[str, float]:
    """Average losses and metrics over the packs of all ranks, in eval mode and without gradient.

    The metrics include the entropy and the accuracy of the scored tokens. ``log`` sees every pack.
    """
    meter = Meter()
    with policy.evaluating():
        for pack in progress_bar(packs, "evaluating", "packs", shown=runtime.is_main):
            pack = pack.to(runtime.device)
            statistics = policy.statistics(pack)
            sums = objective(statistics.logps, pack)
            meter.add(sums.metrics.join(objective.describe(statistics, pack)))
            if log is not None:
                log.observe(pack, sums)
    return {prefix + name: value for name, value in objective.combine(meter.read(runtime)).items()}


def _clip(parameters: list[nn.Parameter], max_norm: float) -> torch.Tensor:
    """Clip the gradient to ``max_norm``, or not at all if that is 0. Returns the norm before clipping."""
    return whole(nn.utils.clip_grad_norm_(parameters, max_norm or float("inf")))


# Compare this many elements of each parameter: enough to notice updates lost to bf16, too few to cost memory.
_PROBED = 1024


class _Probe:
    """Copies the first elements of each parameter with one operator, not one for each of hundreds of parameters."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        # view() raises an error where flatten() would copy.
        self._first = [local(p.detach()).view(-1)[:_PROBED] for p in parameters]

    def copy(self) -> torch.Tensor:
        """Return a copy of the elements as they are now."""
        return torch.cat(self._first)

    def count_changes(self, before: torch.Tensor) -> torch.Tensor:
        """Return how many of the elements differ from an earlier copy, and how many there are: (2,)."""
        changed = (self.copy() != before).sum()
        return torch.stack([changed, torch.full_like(changed, len(before))])


class _Clock:
    """Measures tokens per second within its ``with`` blocks. The caller adds to ``tokens``."""

    def __init__(self) -> None:
        self.tokens = 0
        self._seconds = 0.0

    def __enter__(self) -> None:
        self._start = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self._seconds += time.perf_counter() - self._start

    def rate(self) -> float:
        return self.tokens / self._seconds if self._seconds else 0.0
