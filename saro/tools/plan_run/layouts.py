"""Plans a run: memory, time and disk for each way to spread it over cards, from the predicted cost of a step."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from statistics import fmean
from typing import NamedTuple

from saro.config import ModelConfig, TrainConfig
from saro.data.packs import plan_step
from saro.tools.plan_run.cards import CPU_SHARE, FLOAT32_SLOWER, GPU_SHARE, LAUNCH_SECONDS, USABLE, Card
from saro.train.predict_memory import Ranks, Setting, StepCost, Workload, predict_costs

# AdamW reads the parameter, the gradient and two moments, and writes all but the gradient: 7 float32 numbers.
_ADAMW_MOVES = 7
# Packs are given in multiples of this many tokens.
_PACK_STEP = 256
# As the recipes do, leave this share of the memory if the number of recomputed layers is chosen by it.
_AUTO_USED = 0.9


@dataclass(frozen=True)
class Records:
    """What a run trains on.

    Attributes:
        workload: how packs are filled.
        steps: the tokens of each tree of some steps, a sample of the run's.
        total_steps: steps of the run; None if the number of records is not known.
        number: number of records; None if it is not known.
        read_only: the tokens of each tree that those steps only read, without a backward: with kto, for its reference point.
        most_tokens: tokens of all epochs, if they are known.
    """

    workload: Workload
    steps: Sequence[Sequence[int]]
    total_steps: int | None
    number: int | None
    read_only: Sequence[Sequence[int]] = ()
    most_tokens: float = math.inf

    @property
    def all_tokens(self) -> float | None:
        """Tokens of all steps; None if their number is not known. The last step of an epoch may be smaller than the others."""
        if self.total_steps is None:
            return None
        return min(self.total_steps * self.step_tokens, self.most_tokens)

    @property
    def step_tokens(self) -> float:
        """Tokens that the model is trained on in a step, on average."""
        return fmean(map(sum, self.steps))


@dataclass(frozen=True)
class Layout:
    """A run on some cards.

    Attributes:
        name: what it is called.
        ranks: number of processes, each with a card of its own.
        cost: what a step with a pack of the budget takes on one of them.
        limit: bytes that tensors can have.
        largest_pack: tokens of the largest pack that fits; 0 if none does.
        recomputed: layers that are recomputed.
        step_seconds: time of a step, on average.
        idle: share of the tokens of all ranks that ranks wait for others instead.
        total_steps: steps of the run; None if that is not known.
    """

    name: str
    ranks: int
    cost: StepCost
    limit: int
    largest_pack: int
    recomputed: int
    step_seconds: float
    idle: float
    total_steps: int | None

    @property
    def fits(self) -> bool:
        """True if the peak is within the limit."""
        return self.cost.peak <= self.limit

    @property
    def run_seconds(self) -> float | None:
        """Time of all steps."""
        return None if self.total_steps is None else self.total_steps * self.step_seconds


def plan_layouts(
    setting: Setting,
    records: Records,
    card: Card,
    ranks: Ranks,
    pack_tokens: int,
    *,
    rate: float | None = None,
    network: float,
) -> list[Layout]:
    """Plan the run on one card, and on all cards by DDP and by FSDP2.

    Args:
        setting: with ``gradient_checkpointing`` as the user gave it.
        ranks: their number, and how many a machine has.
        rate: operations per second that a step reaches; default that of the card.
        network: bytes per second and direction between machines, for each card.

    Raises:
        SaroError: the model cannot be trained as the options say.
    """
    limit = int(card.memory * (USABLE if card.is_gpu else 1))
    sizes = (pack_tokens, 2 * pack_tokens)
    layers = setting.layers
    recomputes = setting.options.gradient_checkpointing
    is_auto = recomputes == "auto"
    if is_auto:
        # Under sharding all layers are recomputed.
        shared = _with_recomputed(setting, layers)
        recomputes = _choose_recomputed(setting, records.workload, pack_tokens, limit) if card.is_gpu else 0
    recomputed = min(layers, layers * recomputes if isinstance(recomputes, bool) else recomputes)
    setting = _with_recomputed(setting, recomputed)
    shared = shared if is_auto else setting
    seconds = _pack_seconds(setting, card, rate)
    read_seconds = _pack_seconds(setting, card, rate, is_read_only=True)

    def plan(name: str, ranks: Ranks, setting: Setting, costs: Sequence[StepCost]) -> Layout:
        cost, larger = costs
        slope = (larger.peak - cost.peak) / (larger.tokens - cost.tokens)
        most = int(pack_tokens + (limit - cost.peak) / slope)
        step_seconds, idle = _step_seconds(records, ranks, pack_tokens, cost, seconds, read_seconds, card, network)
        return Layout(
            name=name,
            ranks=ranks.processes,
            cost=cost,
            limit=limit,
            largest_pack=max(0, most // _PACK_STEP * _PACK_STEP),
            recomputed=setting.options.gradient_checkpointing,
            step_seconds=step_seconds,
            idle=idle,
            total_steps=records.total_steps,
        )

    costs = predict_costs(setting, records.workload, sizes)
    layouts = [plan("alone", Ranks("none", 1), setting, costs)]
    if ranks.processes == 1:
        return layouts
    layouts.append(plan("DDP", ranks._replace(shard="none"), setting, costs))
    if setting.optimizer != "adamw":
        return layouts
    has_machines = ranks.processes > ranks.per_machine and ranks.processes % ranks.per_machine == 0
    for shard in ("full", "hybrid") if has_machines else ("full",):
        these = ranks._replace(shard=shard)
        layouts.append(plan(f"FSDP2 {shard}", these, shared, predict_costs(shared, records.workload, sizes, these)))
    return layouts


def _with_recomputed(setting: Setting, number: int) -> Setting:
    options: ModelConfig = setting.options
    offload = options.activation_offloading and number > 0
    return replace(setting, options=replace(options, gradient_checkpointing=number, activation_offloading=offload))


def _choose_recomputed(setting: Setting, workload: Workload, pack_tokens: int, limit: int) -> int:
    """Return how many layers must be recomputed for a pack of the budget to fit: all if even that is not enough."""
    layers = setting.layers
    none, every = (
        predict_costs(_with_recomputed(setting, number), workload, [pack_tokens])[0].peak for number in (0, layers)
    )
    kept = int((_AUTO_USED * limit - every) / max((none - every) / layers, 1))
    return layers - max(0, min(layers, kept))


def _pack_seconds(
    setting: Setting, card: Card, rate: float | None, *, is_read_only: bool = False
) -> Callable[[float], float]:
    """Return a function that gives the seconds of a pack with so many operations.

    ``is_read_only``: the pack has a forward only.
    """
    share = GPU_SHARE if card.is_gpu else CPU_SHARE
    slower = FLOAT32_SLOWER if card.is_gpu and setting.dtype.itemsize == 4 else 1
    reached = rate or share * card.operations / slower
    layers = setting.layers
    recomputed = setting.options.gradient_checkpointing
    # The forward is half of what a layer launches. Recomputation launches it again.
    launched = layers / 2 if is_read_only else layers + recomputed / 2
    launches = LAUNCH_SECONDS * launched if card.is_gpu else 0.0
    return lambda operations: max(operations / reached, launches)


def _step_seconds(
    records: Records,
    ranks: Ranks,
    pack_tokens: int,
    cost: StepCost,
    seconds: Callable[[float], float],
    read_seconds: Callable[[float], float],
    card: Card,
    network: float,
) -> tuple[float, float]:
    """Return the average time of a step, and the share of their tokens that ranks wait.

    What is only read comes first, and its packs are as those with gradients. Under sharding a rank gathers all weights
    twice for each pack while it computes, the longer of the two counts, and ranks wait for each other in each pack. It
    exchanges gradients in each pack if all weights are trained, else in the last one. Under DDP ranks exchange gradients
    during the backward of the last pack, and wait at the end of the step.
    """
    processes, is_sharded = ranks.processes, ranks.shard != "none"
    is_full = not cost.adapters
    exchanges = _exchange_seconds(ranks, cost, card.link, network)
    update = _ADAMW_MOVES * cost.trained / card.bandwidth
    backward = 1 - cost.forward_operations / cost.operations

    def run(
        trees: Sequence[int], seconds: Callable[[float], float], operations: int, gather: float, exchange: float
    ) -> tuple[float, int]:
        """Return the seconds of a step's packs, and the tokens of a rank that never waits."""
        plan = plan_step(trees, pack_tokens, processes, is_sharded)
        loads = [[sum(trees[i] for i in items) for items in packs] for packs in plan]
        per_token = operations / cost.tokens
        if is_sharded:
            slots = [max(slot) for slot in zip_longest(*loads, fillvalue=0)]
            moves = [gather + (exchange if is_full else 0.0)] * (len(slots) - 1) + [gather + exchange]
            return sum(max(seconds(per_token * n), move) for n, move in zip(slots, moves, strict=True)), sum(slots)
        slowest = 0.0
        for packs in loads:
            times = [seconds(per_token * tokens) for tokens in packs]
            slowest = max(slowest, sum(times) + max(0.0, exchange - backward * times[-1]))
        return slowest, max(map(sum, loads))

    times, read, waited = [], 0, 0
    for trees, read_only in zip_longest(records.steps, records.read_only, fillvalue=()):
        trained, longest = run(trees, seconds, cost.operations, exchanges.gather, exchanges.gradients)
        before = 0.0
        if read_only:
            before, most = run(read_only, read_seconds, cost.forward_operations, exchanges.gather / 2, 0.0)
            longest += most
        times.append(before + trained + update)
        tokens = sum(trees) + sum(read_only)
        read += tokens
        waited += processes * longest - tokens
    return fmean(times), waited / (read + waited)


class _Exchanges(NamedTuple):
    """Seconds of exchanges: the two gathers of all weights for a pack, and the sum of gradients over all ranks."""

    gather: float
    gradients: float


def _exchange_seconds(ranks: Ranks, cost: StepCost, link: float, network: float) -> _Exchanges:
    """Return the seconds of exchanges, in rings.

    Args:
        cost: of a rank: under sharding it holds a part of weights and gradients.
        link: bytes per second and direction between the cards of a machine.
        network: the same between machines, for each card.
    """
    per_machine = min(ranks.processes, ranks.per_machine)
    machines = -(-ranks.processes // per_machine)
    # A ring over all ranks leaves a machine by the network of all of its cards.
    across = link if machines == 1 else min(link, per_machine * network)
    if ranks.shard == "none":
        return _Exchanges(0.0, 2 * (1 - 1 / ranks.processes) * cost.trained / across)
    # Under sharding the parts of a ring's other ranks pass each rank once: to gather weights, and to sum gradients.
    ring, speed = (per_machine, link) if ranks.shard == "hybrid" else (ranks.processes, across)
    gather = 2 * (ring - 1) * (cost.weights + cost.adapters) / speed
    gradients = (ring - 1) * cost.trained / speed
    if ranks.shard == "hybrid":
        # Each card sums its part with the same part of the other machines.
        gradients += 2 * (1 - 1 / machines) * cost.trained / network
    return _Exchanges(gather, gradients)


def checkpoint_bytes(cost: StepCost, train: TrainConfig) -> int:
    """Return the disk that checkpoints take at most: those that are kept and one that is written.

    ``cost``: of a rank that holds all weights.
    """
    optimizer = cost.optimizer
    if train.optimizer == "paged_adamw8bit":
        # Its pages make room on the card, and are in the checkpoint: two moments of one byte for each entry of four, and a
        # scale of four for every 256 of them.
        optimizer = round(cost.trained / 4 * 2 * (1 + 4 / 256))
    return (train.keep_checkpoints + 1) * (cost.trained + optimizer)
