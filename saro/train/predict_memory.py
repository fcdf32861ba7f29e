"""Predicts the memory and the operations of a training step from the model's config, for one rank of any number."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import dataclass, fields, replace
from typing import NamedTuple
from unittest import mock

import torch
from transformers import PretrainedConfig

from saro.config import ModelConfig
from saro.data.packs import Pack
from saro.data.random_packs import random_pack, random_pairs
from saro.distributed.pretended import pretended_ranks
from saro.distributed.shard import is_sharded, local
from saro.model import policy as policy_module
from saro.model import recompute
from saro.model.architectures import MIXTURES, WRAPPERS, decoder_layers, remove_dropout, text_config
from saro.model.attention_backend import EITHER, choose_backend
from saro.model.fake_policy import (
    MemoryMeter,
    as_on_gpu,
    fake_tensors,
    liger_stand_ins,
    make_policy,
    scale_bytes,
)
from saro.model.policy import Policy
from saro.train.optim import optimizer_state_bytes
from saro.train.step_floor import floor_of_step
from saro_kernels import token_logps

# Layers of each kind, kept and recomputed, that are run: more than the two whose inputs are still on the device when they are
# kept on the host, and more than the two that are gathered at once. ``_MORE`` more tell what a layer adds.
_FEW, _MORE = 4, 2
# On a CPU, the C library keeps freed tensors, and the gaps between those that live are this share of what a step takes: 0.22 to 0.36
# in the six cases of benchmarks/plan_check.py. One cause: to align a block, glibc 2.36 asks for some bytes more than it has, so that
# a tensor does not fit where one of its size was. A simulated heap has gaps of 8 to 15 % with these bytes, and of 1 % without.
_GAPS = 0.3
# Phases of a step. The backward is divided after the last layer: what it takes at most is there then, or a layer or two later, when
# the gradients of the layers before are on their way to other ranks.
_PHASES = ("before the layers", "forward", "head", "backward of the last layer", "backward of the others")


@dataclass(frozen=True)
class StepCost:
    """The cost of a step on one rank: bytes of memory, and floating-point operations for one pack.

    Attributes:
        weights: weights, frozen or trained, without adapters.
        adapters: adapters.
        trained: those of both that are trained.
        gradients: gradients of a step that are there while a later pack of the step runs.
        optimizer: the optimizer's state.
        gathered: under sharding, the weights outside the layers, such as embedding and head, which are whole during the step.
        layers: what the decoder keeps when the head begins.
        head: what the head's forward takes at its peak beside that.
        phases: the most that each phase of the step takes at once: before the first layer, the layers' forward, the head, the
            backward of the last layer, and the rest of it. In each the peak is a line over the number of layers; their maximum
            is not.
        tokens: tokens of the pack.
        operations: operations of the pack, with those that recomputation does again.
        forward_operations: operations of the pack's forward.
        gaps: on a CPU, freed memory between the tensors, which the C library keeps.
    """

    weights: int
    adapters: int
    trained: int
    gradients: int
    optimizer: int
    gathered: int
    layers: int
    head: int
    phases: tuple[int, ...]
    tokens: int
    operations: int
    forward_operations: int
    gaps: int = 0

    @property
    def working(self) -> int:
        """The most that forward and backward take at once, bytes."""
        return max(self.phases)

    @property
    def held(self) -> int:
        """Bytes that are there all the time."""
        return self.weights + self.adapters + self.gradients + self.optimizer

    @property
    def peak(self) -> int:
        """Bytes at the peak of the step."""
        return self.held + self.working + self.gaps


class Workload(NamedTuple):
    """The kind and the lengths of the records that fill packs.

    Attributes:
        stage: "rw", "srpo", or "kto" for labelled responses, whose packs are like those of RW.
        record_tokens: tokens that a record reads; a pair reads its shared part once.
        scored_share: share of an example's tokens that are scored.
        all_rows: pairs have a gradient on all of their rows, as with an NLL term or lengths that divide.
    """

    stage: str
    record_tokens: int
    scored_share: float = 0.75
    all_rows: bool = False

    def pack(self, tokens: int, vocabulary: int) -> tuple[Pack, int]:
        """Fill a pack of ``tokens`` tokens or a little fewer. Returns it and its rows with a gradient.

        Records are as long as fills it best. Real packs are nearly full, because their records are not all of one length.
        """
        size = tokens // max(1, round(tokens / self.record_tokens))
        if self.stage == "srpo":
            pack = random_pairs(tokens, vocabulary, size)
            return pack, pack.rows if self.all_rows else pack.margin_rows
        pack = random_pack(tokens, vocabulary, size, self.scored_share)
        return pack, pack.rows


class Ranks(NamedTuple):
    """The ranks of a run. ``shard``: as ``--train.shard``; ``per_machine``: how many ranks a machine has."""

    shard: str = "none"
    processes: int = 1
    per_machine: int = 8


@dataclass(frozen=True)
class Setting:
    """Everything besides the pack that decides the cost of a step.

    Attributes:
        config: the model's config.
        options: how the model is trained; ``gradient_checkpointing`` is True, False or a number of layers.
        dtype: dtype that it computes in.
        is_gpu: the step runs on a GPU with this project's and liger-kernel's kernels; else on a CPU.
        optimizer: ``--train.optimizer``.
        holds_gradients: gradients of earlier packs are there, as in every step of several packs or ranks.
    """

    config: PretrainedConfig
    options: ModelConfig
    dtype: torch.dtype
    is_gpu: bool
    optimizer: str = "adamw"
    holds_gradients: bool = True

    @property
    def layers(self) -> int:
        """Number of the decoder's layers."""
        return text_config(self.config).num_hidden_layers


def predict_costs(
    setting: Setting, workload: Workload, tokens: Sequence[int], ranks: Ranks | None = None
) -> list[StepCost]:
    """Predict what steps take on rank 0, for some sizes of the pack.

    All layers are alike, so that all figures lie on a plane over the numbers of kept and of recomputed layers. Few layers are
    run, and the plane is extended.

    Raises:
        SaroError: the model cannot be trained as the options say.
        ValueError: its attention cannot run as they say.
    """
    total = setting.layers
    asked = setting.options.gradient_checkpointing
    recomputed = min(total, total * asked if isinstance(asked, bool) else asked)
    kept = total - recomputed
    at_kept, at_recomputed = min(kept, _FEW), min(recomputed, _FEW)

    def run(kept: int, recomputed: int) -> list[StepCost]:
        return _run_layers(setting, workload, tokens, ranks or Ranks(), kept, recomputed)

    costs = start = run(at_kept, at_recomputed)
    if kept > at_kept:
        more = run(at_kept + _MORE, at_recomputed)
        costs = [_extend(*ends, kept - at_kept) for ends in zip(costs, start, more, strict=True)]
    if recomputed > at_recomputed:
        more = run(at_kept, at_recomputed + _MORE)
        costs = [_extend(*ends, recomputed - at_recomputed) for ends in zip(costs, start, more, strict=True)]
    return costs if setting.is_gpu else [replace(cost, gaps=round(_GAPS * cost.working)) for cost in costs]


def _extend(cost: StepCost, start: StepCost, more: StepCost, layers: int) -> StepCost:
    """Add to a cost what ``layers`` layers take, of which ``_MORE`` take ``more`` less ``start``."""

    def extended(value: int, at_start: int, at_more: int) -> int:
        return value + (at_more - at_start) * layers // _MORE

    values = {}
    for name in (field.name for field in fields(StepCost)):
        ends = [getattr(one, name) for one in (cost, start, more)]
        is_one = isinstance(ends[0], int)
        values[name] = extended(*ends) if is_one else tuple(extended(*phase) for phase in zip(*ends, strict=True))
    return StepCost(**values)


def _run_layers(
    setting: Setting, workload: Workload, tokens: Sequence[int], ranks: Ranks, kept: int, recomputed: int
) -> list[StepCost]:
    """Run a step of a model with these numbers of layers on fake tensors for each size of the pack; see ``predict_costs``."""
    config = deepcopy(setting.config)
    if not setting.options.dropout:
        remove_dropout(config)
    text = text_config(config)
    text.num_hidden_layers = kept + recomputed
    if getattr(text, "layer_types", None) is not None:
        # Each type needs its own mask, which all layers of the type share.
        types = list(dict.fromkeys(text.layer_types))
        text.layer_types = (types * text.num_hidden_layers)[: text.num_hidden_layers]
    device = torch.device("cuda" if setting.is_gpu else "cpu")
    backend = choose_backend(setting.options.attention, device, setting.dtype, config)
    head = setting.options.head
    is_whole = ranks.shard == "none" or ranks.processes == 1
    group = nullcontext() if is_whole else pretended_ranks(*ranks)
    # The head's tiles are the same whichever kernel fills them.
    with group as mesh, fake_tensors(), as_on_gpu() if setting.is_gpu else nullcontext():
        policy = make_policy(
            config,
            setting.options,
            recomputed=recomputed,
            dtype=setting.dtype,
            attention="varlen" if backend == EITHER else backend,
            head="reference" if head == "reference" else "tiled-torch",
        )
        if mesh is not None:
            policy.shard(mesh)
        has_liger = (
            setting.is_gpu and setting.options.liger is not False and config.model_type not in WRAPPERS | MIXTURES
        )
        with liger_stand_ins(policy.causal_lm) if has_liger else nullcontext():
            return [
                measure_step(policy, *workload.pack(size, text.vocab_size), setting.optimizer, setting.holds_gradients)
                for size in tokens
            ]


def measure_step(
    policy: Policy, pack: Pack, gradient_rows: int, optimizer: str = "adamw", holds_gradients: bool = True
) -> StepCost:
    """Run forward and backward on a pack and count what they take. The tensors may be fake.

    Args:
        holds_gradients: gradients of earlier packs are there; else they count as what the backward makes.
    """
    trainable = policy.trainable()
    parameters = dict(policy.model.named_parameters())
    meter = MemoryMeter()
    meter.ignore([*parameters.values(), *policy.buffers()])
    for parameter in trainable.values():
        parameter.grad = torch.zeros_like(parameter) if holds_gradients else None
    held = [local(p.grad) for p in trainable.values() if p.grad is not None]
    meter.ignore(held)
    peaks = [0] * len(_PHASES)
    kept: list[int] = []

    def end_phase(name: str) -> None:
        phase = _PHASES.index(name)
        peaks[phase] = max(peaks[phase], meter.take_peak())

    def counted_logps(**arguments: object) -> torch.Tensor:
        if not kept:
            end_phase("forward")
            kept.append(meter.now)
        logps = token_logps(**arguments)
        end_phase("head")
        return logps

    layers = decoder_layers(policy.causal_lm)
    begin = layers[0].register_forward_pre_hook(lambda *_: None if kept else end_phase("before the layers"))
    marked = layers[-1].register_forward_pre_hook(
        lambda _, inputs: _when_done(inputs[0], lambda: end_phase("backward of the last layer")) if not kept else None
    )
    with (
        meter,
        mock.patch.object(policy_module, "token_logps", counted_logps),
        mock.patch.object(recompute, "empty_on_host", meter.make_ignored),
    ):
        (-policy(pack, gradient_rows=gradient_rows).mean()).backward()
    end_phase("backward of the others")
    begin.remove()
    marked.remove()
    for parameter in trainable.values():
        parameter.grad = None
    is_full = policy.model is policy.causal_lm
    trained = sum(_bytes(p) for p in trainable.values())
    gradients = sum(gradient.nbytes for gradient in held)
    if holds_gradients and is_sharded(policy) and not is_full:
        # ``exchanging_gradients``: each rank adds up whole gradients of few weights until the last pack of a step.
        gradients = sum(p.nbytes for p in trainable.values())
    operations, forward_operations = _count_operations(policy, pack, is_full)
    gathered = 0
    if is_sharded(policy):
        in_layers = {id(p) for layer in layers for p in layer.parameters()}
        gathered = sum(p.numel() * p.element_size() for p in parameters.values() if id(p) not in in_layers)
    return StepCost(
        weights=sum(_bytes(p) for p in parameters.values()) - (0 if is_full else trained) + scale_bytes(policy),
        adapters=0 if is_full else trained,
        trained=trained,
        gradients=gradients,
        optimizer=sum(optimizer_state_bytes(local(p), optimizer) for p in trainable.values()),
        gathered=gathered,
        layers=kept[0] - gathered,
        head=peaks[_PHASES.index("head")] - kept[0],
        phases=tuple(peaks),
        tokens=pack.tokens,
        operations=operations,
        forward_operations=forward_operations,
    )


def _when_done(hidden: torch.Tensor, note: Callable[[], None]) -> None:
    """Call ``note`` when the backward has gone through all that reads these hidden states."""
    if hidden.requires_grad:
        hidden.register_hook(lambda _: note())


def _bytes(parameter: torch.Tensor) -> int:
    return local(parameter).nbytes


def _count_operations(policy: Policy, pack: Pack, is_full: bool) -> tuple[int, int]:
    """Count the operations of a pack: with forward, backward and the layers that are recomputed; and those of the forward."""
    work = {part: one.operations for part, one in floor_of_step(policy, pack).items() if part != "optimizer"}
    lm = policy.causal_lm
    # The forward is a third of what a trained layer computes, and half of a frozen one.
    products = 3 if is_full else 2
    forward = work["linear layers"] / products + work["attention"] / 3
    again = recompute.count_recomputed(lm) / len(decoder_layers(lm)) * forward
    return round(sum(work.values()) + again), round(forward + work["head"] / products)
