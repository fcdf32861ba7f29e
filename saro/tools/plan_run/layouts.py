"""Plans a run: memory, time and disk for each way to spread it over cards, from the predicted cost of a step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from statistics import fmean

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
    """

    workload: Workload
    steps: Sequence[Sequence[int]]
    total_steps: int | None
    number: int | None
    read_only: Sequence[Sequence[int]] = ()

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
        link = card.link if ranks.processes <= ranks.per_machine else network
        step_seconds, idle = _step_seconds(records, ranks, pack_tokens, cost, seconds, read_seconds, card, link)
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
    link: float,
) -> tuple[float, float]:
    """Return the average time of a step, and the share of their tokens that ranks wait.

    What is only read comes first, and its packs are as those with gradients. A rank exchanges while it computes: the longer of the two counts. Under sharding it gathers all weights twice for each pack,
    and ranks wait for each other in each pack; under DDP they wait at the end of the step.
    """
    processes, is_sharded = ranks.processes, ranks.shard != "none"
    others = 1 - 1 / processes
    shares = min(processes, ranks.per_machine) if ranks.shard == "hybrid" else processes
    # The gradients of all trained weights: shares of them under sharding.
    gradients = cost.trained * (shares if is_sharded else 1)
    exchange = 2 * others * gradients / link
    whole = shares * (cost.weights + cost.adapters)
    gather = 2 * others * whole / (card.link if ranks.shard == "hybrid" else link) if is_sharded else 0.0
    update = _ADAMW_MOVES * cost.trained / card.bandwidth

    def run(
        trees: Sequence[int], seconds: Callable[[float], float], operations: int, gather: float
    ) -> tuple[float, int]:
        """Return the seconds of a step's packs, and the tokens of a rank that never waits."""
        plan = plan_step(trees, pack_tokens, processes, is_sharded)
        loads = [[sum(trees[i] for i in items) for items in packs] for packs in plan]
        per_token = operations / cost.tokens
        if is_sharded:
            slots = [max(slot) for slot in zip_longest(*loads, fillvalue=0)]
            return sum(max(seconds(per_token * tokens), gather) for tokens in slots), sum(slots)
        slowest = max(sum(seconds(per_token * tokens) for tokens in packs) for packs in loads)
        return slowest, max(map(sum, loads))

    times, read, waited = [], 0, 0
    for trees, read_only in zip_longest(records.steps, records.read_only, fillvalue=()):
        trained, longest = run(trees, seconds, cost.operations, gather)
        before = 0.0
        if read_only:
            before, most = run(read_only, read_seconds, cost.forward_operations, gather / 2)
            longest += most
        times.append(before + max(trained, exchange) + update)
        tokens = sum(trees) + sum(read_only)
        read += tokens
        waited += processes * longest - tokens
    return fmean(times), waited / (read + waited)


def checkpoint_bytes(cost: StepCost, train: TrainConfig) -> int:
    """Return the disk that checkpoints take at most: those that are kept and one that is written.

    ``cost``: of a rank that holds all weights.
    """
    return (train.keep_checkpoints + 1) * (cost.trained + cost.optimizer)
