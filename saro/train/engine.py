"""fit(): the training loop. It knows steps, packs and sums, and no algorithm."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from saro.config import TrainConfig
from saro.data.packs import Pack
from saro.distributed.runtime import Runtime
from saro.errors import SaroError
from saro.model.policy import Policy
from saro.train.checkpoint import list_checkpoints, load_checkpoint, save_checkpoint
from saro.train.metrics import Meter, MetricsFile, Progress, format_metrics
from saro.train.objective import Objective, Sums
from saro.train.optim import make_optimizer, make_scheduler
from saro.train.steps import Step, Steps

Observer = Callable[[Pack, Sums], None]

# Of a log line, what the screen shows.
_SHOWN = ("loss", "rewards/margins", "rewards/accuracies", "grad_norm", "lr", "tokens_per_second")


@dataclass(frozen=True)
class Outcome:
    """How fit() ended.

    Attributes:
        step: finished steps.
        stopped_by: the signal that ended it before all steps were done, else None.
        tokens_per_second: read by the model, over all processes, start-up, evaluation and saving apart.
        peak_memory_gib: most memory of this process.
    """

    step: int
    stopped_by: signal.Signals | None
    tokens_per_second: float
    peak_memory_gib: float


def fit(
    runtime: Runtime,
    policy: Policy,
    objective: Objective,
    steps: Steps,
    total_steps: int,
    options: TrainConfig,
    *,
    record_ids: Callable[[Iterable[int]], list[str]],
    evaluate: Callable[[int], dict[str, float]] | None = None,
    observe: Observer | None = None,
    on_log: Callable[[int], object] | None = None,
    resume: bool = False,
) -> Outcome:
    """Train ``policy`` for ``total_steps`` steps, or for what a checkpoint leaves of them.

    Each step draws its records by number, runs this process's packs, divides each loss sum by its count over the whole
    step, and makes one optimizer step. SIGTERM and Ctrl-C finish the step, write a checkpoint and return.

    Args:
        record_ids: names records in an error.
        evaluate: returns held-out metrics after so many steps; called every ``options.eval_every`` of them.
        observe: sees every pack with its sums; it may keep tensors and must not read them.
        on_log: called on all processes after each log line, with the number of finished steps.
        resume: go on from the newest checkpoint in the output folder, if there is one.

    Raises:
        SaroError: the loss or the gradient is not finite; the step was not made.
    """
    output = Path(options.output)
    trainable = policy.trainable()
    parameters = list(trainable.values())
    optimizer = make_optimizer(parameters, options)
    scheduler = make_scheduler(optimizer, options, total_steps)
    checkpoints = list_checkpoints(output / "checkpoints") if resume else []
    start = load_checkpoint(checkpoints[-1][1], trainable, optimizer, scheduler) if checkpoints else 0
    if checkpoints:
        runtime.say(f"resuming after step {start} of {total_steps}")
    file = MetricsFile(output / "metrics.jsonl", start) if runtime.is_main else None
    module = runtime.wrap(policy)
    meter = Meter()
    clock = _Clock()
    progress = Progress(total_steps, start, runtime.is_main)
    step, stop = start, None

    def report(values: dict[str, float]) -> None:
        if file is not None:
            file.write({"step": step, **values})
            runtime.log(values, step)

    with _stop_signals() as received:
        while step < total_steps and stop is None:
            batch = steps[step]
            # Seeded for each step, so that a resumed run draws the same dropout without storing any state.
            torch.manual_seed(int(np.random.SeedSequence([options.seed, step, runtime.rank]).generate_state(1)[0]))
            with clock:
                loss = _backward(runtime, module, objective, batch, meter, observe)
                norm = _clip(parameters, options.max_grad_norm)
                # The one host read of the step, agreed across processes; a signal to any of them stops all.
                agreed = runtime.sum_(torch.stack([loss, torch.full_like(loss, len(received))]))
                loss_value, signals, norm_value = torch.cat([agreed, norm.reshape(1).to(agreed)]).tolist()
                if not (math.isfinite(loss_value) and math.isfinite(norm_value)):
                    progress.close()
                    raise SaroError(
                        f"step {step + 1}: loss {loss_value}, gradient norm {norm_value}; the weights were not changed. "
                        f"Records of the step: {', '.join(record_ids(batch.records))}. Lower --train.lr, or look at them"
                    )
                before = _probe(parameters) if (step + 1) % options.log_every == 0 else None
                lr = scheduler.get_last_lr()[0]
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad(set_to_none=True)
                # Read here, so that the clock has waited for the optimizer when its rate is shown.
                changed = _changed(parameters, before) if before is not None else None
            step += 1
            clock.tokens += batch.tokens
            progress.step()
            if changed is not None:
                means = objective.combine(meter.read(runtime))
                values = {
                    "loss": means.pop("loss"),
                    "grad_norm": norm_value,
                    "lr": lr,
                    "epoch": step / steps.schedule.steps_per_epoch,
                    "tokens_per_second": clock.rate(),
                    "peak_memory_gib": runtime.memory(),
                    "changed_parameters": changed,
                    **means,
                }
                report(values)
                progress.line(step, {k: values[k] for k in _SHOWN if k in values})
                if on_log is not None:
                    on_log(step)
            if evaluate is not None and options.eval_every and step % options.eval_every == 0 and step < total_steps:
                values = evaluate(step)
                report(values)
                shown = {
                    k: v for k, v in values.items() if k.startswith("eval/loss") or k.removeprefix("eval/") in _SHOWN
                }
                runtime.say(f"step {step}/{total_steps}  {format_metrics(shown)}")
            if signals and step < total_steps:
                stop = signal.Signals(received[0]) if received else signal.SIGTERM
            if stop is not None or (options.save_every and step % options.save_every == 0) or step == total_steps:
                if runtime.is_main:
                    save_checkpoint(
                        output / "checkpoints", step, trainable, optimizer, scheduler, keep=options.keep_checkpoints
                    )
                runtime.barrier()
    progress.close()
    return Outcome(step, stop, clock.rate(), runtime.memory())


def _backward(
    runtime: Runtime,
    module: nn.Module,
    objective: Objective,
    batch: Step,
    meter: Meter,
    observe: Observer | None,
) -> torch.Tensor:
    """Gradients of one step; returns this process's share of its loss, a scalar without gradient."""
    module.train()
    counts = objective.counts(batch.trees)
    total = torch.zeros((), dtype=torch.float64, device=runtime.device)
    for index, pack in enumerate(batch.packs):
        pack = pack.to(runtime.device)
        with runtime.synchronize(module, last=index == len(batch.packs) - 1):
            sums = objective(module(pack), pack)
            loss = torch.stack([value / counts[name] for name, value in sums.losses.items()]).sum()
            # DDP takes the mean of the gradients over the processes; their sum is wanted.
            (loss * runtime.processes).backward()
        total += loss.detach()
        meter.add(sums.metrics)
        if observe is not None:
            observe(pack, sums)
    return total


@torch.no_grad()
def evaluate(
    runtime: Runtime,
    policy: Policy,
    objective: Objective,
    packs: Iterable[Pack],
    prefix: str = "eval/",
    observe: Observer | None = None,
) -> dict[str, float]:
    """Losses and metrics over this process's packs and those of the others, as means; dropout off, no gradient.

    Among them the entropy and the accuracy of the scored tokens. ``observe`` sees every pack with its sums.
    """
    was_training = policy.training
    meter = Meter()
    policy.eval()
    try:
        # None shows the bar on a terminal alone.
        no_bar = None if runtime.is_main else True
        for pack in tqdm(packs, desc="evaluating", unit=" packs", delay=2, leave=False, disable=no_bar):
            pack = pack.to(runtime.device)
            statistics = policy.statistics(pack)
            sums = objective(statistics.logps, pack)
            meter.add(sums.metrics | objective.describe(statistics, pack))
            if observe is not None:
                observe(pack, sums)
    finally:
        policy.train(was_training)
    return {prefix + name: value for name, value in objective.combine(meter.read(runtime)).items()}


def _clip(parameters: list[nn.Parameter], max_norm: float) -> torch.Tensor:
    """Total gradient norm before clipping; 0 turns clipping off."""
    return nn.utils.clip_grad_norm_(parameters, max_norm or float("inf"))


# Of each parameter so many entries are watched: enough to see bf16 swallow updates, too few to cost memory.
_PROBE = 1024


def _probe(parameters: list[nn.Parameter]) -> list[torch.Tensor]:
    return [p.detach().flatten()[:_PROBE].clone() for p in parameters]


def _changed(parameters: list[nn.Parameter], before: list[torch.Tensor]) -> float:
    changed = [(p.detach().flatten()[:_PROBE] != b).sum() for p, b in zip(parameters, before, strict=True)]
    return torch.stack(changed).sum().item() / sum(len(b) for b in before)


class _Clock:
    """Seconds inside its blocks, and tokens."""

    def __init__(self) -> None:
        self.tokens = 0
        self._seconds = 0.0

    def __enter__(self) -> None:
        self._start = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self._seconds += time.perf_counter() - self._start

    def rate(self) -> float:
        return self.tokens / self._seconds if self._seconds else 0.0


# torchrun sends its children a SIGINT of its own, right after the terminal's has reached them.
_SAME_CTRL_C_SECONDS = 2.0


@contextmanager
def _stop_signals() -> Iterator[list[int]]:
    """Inside, SIGTERM and the first Ctrl-C are noted in the list, not obeyed at once; a later Ctrl-C interrupts."""
    received: list[int] = []
    first = 0.0

    def note(number: int, _: FrameType | None) -> None:
        nonlocal first
        if not received:
            first = time.monotonic()
        elif number == signal.SIGINT and time.monotonic() - first > _SAME_CTRL_C_SECONDS:
            raise KeyboardInterrupt
        received.append(number)

    old = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield received
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
