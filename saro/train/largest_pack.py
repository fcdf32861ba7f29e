"""Find the largest pack of a run, recompute as many layers as it needs, and try it before the first step.

So a run that is short of memory ends in the first minute and not at night.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from saro.data.packs import Pack, lay_out, plan_step
from saro.data.steps import Step, Steps
from saro.distributed.runtime import Runtime
from saro.distributed.shard import local
from saro.errors import SaroError
from saro.model.policy import Policy
from saro.model.recompute import count_recomputed, offloads_inputs, recomputable_layers, recompute_layers
from saro.train.engine import add_gradients
from saro.train.fit_recomputation import find_most_kept
from saro.train.objective import Meter, Objective
from saro.train.optim import optimizer_state_bytes
from saro_kernels.tile_height import free_bytes

# Lay out the steps of this many records. It takes about half a second, however many records the run has.
_LAID_OUT_RECORDS = 1024
# The error names at most this many records, so that it stays one readable line.
_NAMED = 5
# Share of a GPU's memory that the peak of the largest pack may take if the number of recomputed layers is chosen by it. The
# allocator needs a few per cent more than tensors hold (5 % at most on an H100), and other packs are laid out differently.
_USED = 0.9


@dataclass(frozen=True)
class LargestPack:
    """A pack of a run.

    Attributes:
        number: number of its step, from 0.
        step: the records and trees of the pack, as a step whose only pack it is.
        is_alone: its rank runs no other pack in the step.
    """

    number: int
    step: Step
    is_alone: bool

    @property
    def pack(self) -> Pack:
        """The pack."""
        return self.step.packs[0]


def recompute_as_needed(
    runtime: Runtime, policy: Policy, objective: Objective, largest: LargestPack, optimizer: str
) -> None:
    """Recompute as few layers as the largest pack needs, the same number on all ranks, if ``gradient_checkpointing`` is auto.

    On a CPU none is recomputed, and if ranks share the weights, all are. The pack is run with a few numbers of layers, as
    ``try_pack`` runs it. See ``find_most_kept``. Memory and peaks are those of the rank where they are worst, so that all
    ranks try the same numbers.

    Args:
        policy: the policy, not wrapped for several ranks, and without gradients. Its layers are changed, but no result.
        optimizer: ``--train.optimizer``.
    """
    if not policy.recomputes_as_needed:
        return
    lm = policy.causal_lm
    layers = len(recomputable_layers(lm))
    if runtime.mesh is not None:
        # Ranks that share the weights wait for each other in every layer: out of memory on one would stop the others there.
        runtime.say(
            "--model.gradient_checkpointing auto recomputes all layers here: memory cannot be tried while ranks share the "
            "weights; give a number of layers to recompute fewer"
        )
        return
    usable = _usable_bytes(runtime.device)
    if usable is None:
        recompute_layers(lm, 0)
        runtime.say(
            "--model.gradient_checkpointing auto recomputes no layer here: it needs CUDA to measure memory; if memory is "
            "short, give true or a number of layers"
        )
        return

    def peak(kept: int) -> int | None:
        recompute_layers(lm, layers - kept)
        _forget_peak(runtime.device)
        failure = _run_out_of_memory(policy, objective, largest, runtime, optimizer)
        peaks = runtime.gather([_peak_bytes(runtime.device) if failure is None else None])
        return None if None in peaks else max(peaks)

    limit = _USED * min(runtime.gather([usable]))
    fitting = find_most_kept(layers, peak, limit)
    # If not even a pack without kept layers is within the limit, it may still fit: ``try_pack`` says so.
    most = max(fitting, default=0)
    recompute_layers(lm, layers - most)
    _forget_peak(runtime.device)
    if not fitting:
        runtime.say(f"all {layers} layers are recomputed, and even so the peak is above {limit / 2**30:.1f} GiB")
        return
    line = ""
    if len(fitting) > 1:
        (before, lower), (after, highest) = list(fitting.items())[-2:]
        per_token = (highest - lower) / (after - before) / largest.pack.tokens
        line = f"; keeping the activations of one more takes {per_token / 2**10:.1f} KiB per token"
    runtime.say(f"{layers - most} of {layers} layers are recomputed, for a peak within {limit / 2**30:.1f} GiB{line}")


def try_pack(
    runtime: Runtime, policy: Policy, objective: Objective, largest: LargestPack, steps: Steps, optimizer: str
) -> None:
    """Run a pack forward and backward on every rank, with room for gradients and the optimizer's state.

    It takes as long as that pack takes in training, also on a CPU: there the system may end a process that runs out of
    memory without an error that could be caught, but then it does so in the first minute.

    Nothing is changed: weights, random state and mode are as before, and there are no gradients. The policy is the bare
    model, so ranks do not exchange gradients.

    A failure is one that training would meet, because the pack is one of the run's own. See ``find_largest_pack`` for
    how close the pack is to the largest one. Evaluations and answers are not tried.

    Args:
        policy: the policy, not wrapped for several ranks, and without gradients.
        objective: what training minimises; its values do not matter.
        steps: the steps that the pack is from.
        optimizer: ``--train.optimizer``.

    Raises:
        SaroError: the pack does not fit into the memory of this rank or of another one.
    """
    # Do not count the peak of earlier work, such as loading.
    _forget_peak(runtime.device)
    failure = _run_out_of_memory(policy, objective, largest, runtime, optimizer)
    # All ranks must know, or some would wait for the others in the first exchange of gradients. Those that share the
    # weights wait already, for those of this rank: its error ends them.
    is_waited_for = runtime.mesh is not None and failure is not None
    failed = is_waited_for or runtime.sum_(torch.tensor(float(failure is not None), device=runtime.device)).item()
    pack, ids = largest.pack, [steps.data.ids[record] for record in largest.step.records]
    size = f"{pack.tokens:,} tokens, {pack.rows:,} of them scored, {len(ids)} records"
    if failed:
        others = f" and {len(ids) - _NAMED} others" if len(ids) > _NAMED else ""
        raise SaroError(
            f"out of memory ({failure or 'on another rank'}): the largest pack of the run does not fit ({size}, in step "
            f"{largest.number + 1}: {', '.join(ids[:_NAMED])}{others}); lower --data.pack_tokens, now {steps.pack_tokens} "
            f"and at least {steps.data.lengths.max()} for the longest record{_advise(policy, runtime.device)}"
        )
    runtime.say(f"the largest pack fits ({size}): peak memory {runtime.memory():.2f} GiB")


def _advise(policy: Policy, device: torch.device) -> str:
    """Return the end of an error: the options besides smaller packs that save memory; empty if none is left."""
    lm = policy.causal_lm
    if not lm.supports_gradient_checkpointing or not recomputable_layers(lm):
        return ""
    if count_recomputed(lm) < len(recomputable_layers(lm)):
        return ", or set --model.gradient_checkpointing true"
    # Offloading is on already. On a CPU it is the host's memory that ran out.
    if offloads_inputs(lm) or _usable_bytes(device) is None:
        return ""
    return ", or set --model.activation_offloading true"


def _usable_bytes(device: torch.device) -> int | None:
    """Return how many bytes this process can have on a GPU, including those that it has; None on a CPU."""
    free = free_bytes(device)
    return None if free is None else free + torch.cuda.memory_allocated(device)


def _forget_peak(device: torch.device) -> None:
    """Count a GPU's peak memory from now on, and free what the allocator keeps of earlier work."""
    if device.type == "cuda":
        # Tensors of the attempt that ran out of memory may hang in reference cycles.
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def _peak_bytes(device: torch.device) -> int:
    """Return the peak memory on a GPU."""
    return torch.cuda.max_memory_allocated(device)


def find_largest_pack(steps: Steps, total_steps: int, processes: int) -> LargestPack:
    """Return the largest pack of a run, by tokens plus scored rows.

    The lengths of the records give an upper bound for each step. The packs of the steps with most tokens, and of those
    with the longest records, are laid out. So the result is exact for a run of at most ``_LAID_OUT_RECORDS`` draws, and
    for a run whose steps are one pack each, give or take what pairs on one prompt share. In other runs a step that was not
    laid out may have a somewhat larger pack, because its records happen to fill it better.

    Args:
        processes: number of ranks that share a step.
    """
    candidates = (
        largest for number in _likely_steps(steps, total_steps) for largest in _packs_of_step(steps, number, processes)
    )
    return max(candidates, key=lambda largest: largest.pack.tokens + largest.pack.rows)


def _likely_steps(steps: Steps, total_steps: int) -> list[int]:
    """Return the numbers of the steps that may have the largest pack, of ``_LAID_OUT_RECORDS`` records in all."""
    lengths = steps.data.lengths
    totals, longest = np.empty(total_steps, np.int64), np.empty(total_steps, np.int64)
    for number in range(total_steps):
        in_step = lengths[steps.schedule.records(number)]
        totals[number], longest[number] = in_step.sum(), in_step.max()
    by_total, by_longest = np.argsort(-totals, kind="stable"), np.argsort(-longest, kind="stable")
    likely = list(dict.fromkeys(np.stack([by_total, by_longest], axis=1).flatten().tolist()))
    # Sort them: the schedule draws an epoch again whenever another one was asked for in between.
    return sorted(likely[: max(1, _LAID_OUT_RECORDS // steps.schedule.records_per_step)])


def _packs_of_step(steps: Steps, number: int, processes: int) -> Iterator[LargestPack]:
    """Yield the packs of all ranks in a step."""
    trees = steps.data.trees(steps.schedule.records(number).tolist(), steps.pack_tokens)
    sizes = [tree.tokens for tree in trees]
    for rank_packs in plan_step(sizes, steps.pack_tokens, processes, steps.share.is_even):
        for items in rank_packs:
            members = tuple(trees[item] for item in items)
            pack = lay_out(members)
            # A pair has two sequences and is one record.
            step = Step(tuple(dict.fromkeys(pack.records)), members, (pack,))
            yield LargestPack(number, step, is_alone=len(rank_packs) == 1)


def _run_out_of_memory(
    policy: Policy, objective: Objective, largest: LargestPack, runtime: Runtime, optimizer: str
) -> str | None:
    """Run the pack forward and backward. Returns the first line of the error if memory runs out, else None."""
    device, parameters = runtime.device, list(policy.trainable().values())
    was_training = policy.training
    state: list[torch.Tensor] = []
    failure = None
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            # The optimizer allocates its state in the first step. From then on it is there.
            state += [
                torch.empty(optimizer_state_bytes(local(p), optimizer), dtype=torch.uint8, device=device)
                for p in parameters
            ]
            if runtime.processes > 1 or not largest.is_alone:
                # Other packs of the step have left gradients, or ranks exchange them in buckets.
                for parameter in parameters:
                    parameter.grad = torch.zeros_like(parameter)
            add_gradients(policy, objective, largest.step, Meter(), None, device, averaging=1)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
    except (RuntimeError, MemoryError) as error:
        if not _is_out_of_memory(error):
            raise
        failure = str(error).partition("\n")[0] or "host"
    finally:
        policy.train(was_training)
        for parameter in parameters:
            parameter.grad = None
    return failure


def _is_out_of_memory(error: Exception) -> bool:
    # The CPU's allocator, the CUDA driver and cuBLAS make torch raise a plain RuntimeError.
    texts = ("DefaultCPUAllocator", "out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
    is_named = any(text in str(error) for text in texts)
    return is_named or isinstance(error, torch.OutOfMemoryError | MemoryError)
