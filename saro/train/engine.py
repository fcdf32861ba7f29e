"""Run the training loop, ``fit``. It knows steps, packs and sums, but no loss."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
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
from saro.train.checkpoint import TrainingState
from saro.train.metrics import Progress
from saro.train.objective import Meter, Objective, Sums, average
from saro.train.optim import make_optimizer, make_scheduler, step_unless
from saro.train.restore import check_same_start
from saro.train.stop_signals import noting_stop_signals
from saro.train.train_output import SHOWN, TrainOutput


class PackLog(Protocol):
    """Collects values pack by pack, such as ``PairLog`` does."""

    def observe(self, pack: Pack, sums: Sums) -> None:
        """See a pack with its sums. Tensors may be kept but must not be read: that would stall the device."""

    def watch(self, step: int, means: Mapping[str, float]) -> None:
        """Use or discard what was kept; called on all ranks after each log line.

        Args:
            step: number of finished steps.
            means: averages of the metrics since the last log line. If they are all that a log needs, it need not read the
                device.
        """


@dataclass(frozen=True)
class Outcome:
    """The end of a training loop.

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
        SaroError: the loss or the gradient is not finite; the step has not changed the weights. Or the first step with a
            gradient has changed none of them. Or all checkpoints are damaged, the run has made more steps than
            ``total_steps``, or a rank has another model, schedule or start than rank 0, or other weights at a checkpoint.
    """
    trainable = policy.trainable()
    optimizer = make_optimizer(trainable.values(), options)
    scheduler = make_scheduler(optimizer, options, total_steps)
    training = TrainingState(trainable, optimizer, scheduler)
    output = TrainOutput(runtime, options, training, total_steps)
    step = output.restore() if resume else 0
    check_same_start(runtime, policy, steps.schedule, total_steps, step)
    # Ranks are joined before files of the run are removed: it may fail.
    module = runtime.wrap(policy)
    output.open(step, resume=resume)
    tokens_per_second, stop = 0.0, None
    with noting_stop_signals() as received, Progress(total_steps, step, runtime.is_main) as progress:
        # The run may have been stopped before this evaluation.
        if evaluate and step and _is_evaluation_due(step, total_steps, options) and not output.has_evaluation(step):
            output.report_evaluation(step, evaluate(step))
        left = range(step, step if output.best.is_exhausted else total_steps)
        results = _make_steps(
            runtime,
            policy,
            module,
            objective,
            steps,
            left,
            training=training,
            options=options,
            ids=ids,
            log=log,
            received=received,
        )
        for result in results:
            step, tokens_per_second = result.step, result.tokens_per_second
            progress.step()
            if result.means:
                means = objective.combine(result.means)
                values = {
                    "loss": means["loss"],
                    "grad_norm": result.grad_norm,
                    "lr": result.lr,
                    "epoch": step / steps.schedule.steps_per_epoch,
                    "tokens_per_second": tokens_per_second,
                    "peak_memory_gib": runtime.memory(),
                    **_reserved_memory(runtime.device),
                    **({} if result.changed is None else {"changed_parameters": result.changed}),
                    **means,
                }
                output.report(step, values)
                progress.line(step, {k: values[k] for k in SHOWN if k in values})
                if log is not None:
                    log.watch(step, means)
            if result.num_signals and step < total_steps:
                stop = signal.Signals(received[0]) if received else signal.SIGTERM
            # The checkpoint comes before a due evaluation, which may take longer than a cluster waits after SIGTERM.
            if stop is not None or (options.save_every and step % options.save_every == 0) or step == total_steps:
                output.save(step)
            if stop is not None:
                break
            if evaluate and _is_evaluation_due(step, total_steps, options):
                output.report_evaluation(step, evaluate(step))
            if output.best.is_exhausted and step < total_steps:
                best = f"that of step {output.best.step}"
                runtime.say(f"stopped early: {options.patience} evaluations were not better than {best}")
                output.save(step)
                break
    if stop is None:
        output.best.load(runtime, trainable)
    return Outcome(
        step=step,
        total_steps=total_steps,
        stopped_by=stop,
        tokens_per_second=tokens_per_second,
        peak_memory_gib=runtime.memory(),
        best_step=output.best.step,
    )


def _is_evaluation_due(step: int, total_steps: int, options: TrainConfig) -> bool:
    """Return True if an evaluation follows ``step`` steps. The last step has one only if ``keep_best`` compares it."""
    if not options.eval_every:
        return False
    if step == total_steps:
        return options.keep_best is not None
    return step % options.eval_every == 0


def _is_line_due(step: int, options: TrainConfig) -> bool:
    """Return True if a log line follows ``step`` steps: also where the run may be resumed, which begins a new average."""
    return any(every and step % every == 0 for every in (options.log_every, options.save_every, options.eval_every))


@dataclass(frozen=True)
class StepResult:
    """The numbers of one step, on the host.

    Attributes:
        step: number of finished steps, with this one.
        lr: the learning rate.
        grad_norm: norm of the gradient before clipping.
        num_signals: number of signals to stop that all ranks have received.
        tokens_per_second: see ``Outcome``.
        changed: share of the probed weights that the step has changed; None if it was not probed.
        means: averages of the metrics since the last log line; empty if no line is due.
    """

    step: int
    lr: float
    grad_norm: float
    num_signals: float
    tokens_per_second: float
    changed: float | None
    means: dict[str, float]


def _make_steps(
    runtime: Runtime,
    policy: Policy,
    module: nn.Module,
    objective: Objective,
    steps: Steps,
    left: range,
    *,
    training: TrainingState,
    options: TrainConfig,
    ids: Sequence[str],
    log: PackLog | None,
    received: Sequence[int],
) -> Iterator[StepResult]:
    """Make a step of training each time that a result is asked for.

    Args:
        module: the policy as ranks share it, see ``Runtime.wrap``.
        left: numbers of the steps to make.
        received: the signals to stop that this rank has received so far.
    """
    device, parameters = runtime.device, list(training.trainable.values())
    meter, probe = Meter(), _Probe(parameters)
    tokens, seconds = 0, 0.0
    upcoming: Step | None = None
    has_trained = False
    for step in left:
        batch = steps[step] if upcoming is None else upcoming
        # Seed each step, so that a resumed run draws the same dropout although no random state is stored.
        torch.manual_seed(_step_seed(options.seed, step, runtime.rank))
        begun = time.perf_counter()

        # 1. Queue the gradients on the device, and clip them.
        objective.start_step(runtime, policy, batch.records)
        loss = add_gradients(module, objective, batch, meter, log, device, runtime.averaging)
        norm = _clip(parameters, options.max_grad_norm)
        # Loss and signals are summed over ranks, so that a signal to any rank stops all of them.
        sums = runtime.sum_(torch.stack([loss, torch.full_like(loss, len(received))]))  # (2,) loss, signals

        # 2. Queue the optimizer step. The device leaves it out if the loss or the gradient is not finite.
        is_logged = step + 1 == left.stop or _is_line_due(step + 1, options)
        # Probed until a step had a gradient: an optimizer made of other tensors than the model's trains nothing.
        before = probe.copy() if is_logged or not has_trained else None
        lr = training.scheduler.get_last_lr()[0]
        step_unless(training.optimizer, ~(sums[0].isfinite() & norm.isfinite()))
        training.optimizer.zero_grad(set_to_none=True)
        changes = None if before is None else probe.count_changes(before, runtime)
        metrics = meter.take(runtime) if is_logged else None

        # 3. Lay out the next step's packs and send them while the device works, and only then wait for it.
        has_next = _runs_ahead(device) and step + 1 in left
        upcoming = steps[step + 1].to(device) if has_next else None
        sent = None if metrics is None else metrics.table
        (loss_value, num_signals), (norm_value,), changed, table = _read(sums, norm, changes, sent)

        if num_signals and metrics is None:
            # The run ends here, and the next one begins with an empty meter.
            metrics = meter.take(runtime)
            (table,) = _read(metrics.table)

        # 4. Check the numbers.
        if not (math.isfinite(loss_value) and math.isfinite(norm_value)):
            records = ", ".join(ids[record] for record in batch.records)
            raise SaroError(
                f"step {step + 1}: loss {loss_value}, gradient norm {norm_value}; the weights were not changed. "
                f"Records of the step: {records}. Lower --train.lr, or look at them"
            )
        # The gradient may be zero, as that of hinge is where all margins are wide enough.
        if norm_value and not has_trained and not changed[0]:
            raise SaroError(f"step {step + 1}: the optimizer changed no weight; raise --train.lr, or report it")
        has_trained = has_trained or norm_value > 0
        training.scheduler.step()
        seconds += time.perf_counter() - begun
        tokens += batch.tokens
        yield StepResult(
            step=step + 1,
            lr=lr,
            grad_norm=norm_value,
            num_signals=num_signals,
            tokens_per_second=tokens / seconds,
            changed=changed[0] / changed[1] if changed else None,
            means={} if metrics is None else average(metrics.names, table),
        )


def _read(*tensors: torch.Tensor | None) -> list[list[float]]:
    """Copy tensors to the host in one copy; None becomes an empty list. Only here does the host of a step wait."""
    present = [tensor.double().flatten() for tensor in tensors if tensor is not None]
    numbers = iter(torch.cat(present).tolist())
    return [[] if tensor is None else list(islice(numbers, tensor.numel())) for tensor in tensors]


def _runs_ahead(device: torch.device) -> bool:
    """Return True if calls only queue work on the device. On a CPU the work is done when a call returns."""
    return device.type != "cpu"


def _reserved_memory(device: torch.device) -> dict[str, float]:
    """Return the peak of the memory that the allocator has taken from a GPU, as a metric in GiB; empty on other devices.

    Other programs see this number. It exceeds ``peak_memory_gib``, the peak of all tensors, by what is fragmented.
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
        # Free their graph now: it holds what layers keep beside saved tensors, such as casts of all adapters.
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

    def count_changes(self, before: torch.Tensor, runtime: Runtime) -> torch.Tensor:
        """Return how many of the elements differ from an earlier copy, and how many there are: (2,) float64."""
        changed = (self.copy() != before).sum()
        counts = torch.stack([changed, torch.full_like(changed, len(before))]).double()
        # Ranks that share the weights have different elements.
        return counts if runtime.mesh is None else runtime.sum_(counts)
