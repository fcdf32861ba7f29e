"""Judges one case of ``model_sweep.py``: what packed training computes, against transformers on one sequence at a time.

The other side is independent of saro's own checks: a model that transformers loads anew, with eager attention, run
on each sequence alone. Adapters are added to its weights. Both sides compute in float64.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from float64 import in_float64
from peft.tuners.lora import LoraLayer
from sweep_cases import VOCABULARY, Case, default_config, tiny_config
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

from saro.checks.check_packs import check_packs
from saro.config import ModelConfig
from saro.data.dataset import ExampleSet, PairSet
from saro.data.packs import Pack, lay_out
from saro.data.tree import ScoredSequence, SequenceTree, build_tree
from saro.errors import SaroError
from saro.model.architectures import auto_class, check_supported, is_mixture
from saro.model.load import load_policy
from saro.model.policy import Policy
from saro.model.source import find_model

EXACT, REFUSED, NOT_LOADABLE, WRONG = "exact", "refused", "not loadable", "WRONG"
METHODS = ("full", "lora")
# Greatest difference of an exact model, relative to the greatest value. Both sides round in float64, by which results
# differ by 1e-15 to 1e-13. A wrong mask, position or factor moves them by more than 1e-3.
TOLERANCE = 1e-10
# Least change of the log-probs by a leak between sequences. Below it, the comparison would not notice a wrong mask.
_LEAST_LEAK = 1e-3
_CPU = torch.device("cpu")
# Standard deviations of the weights: with transformers' own of 0.02 the logits of a tiny model are all alike.
_WEIGHT_STD, _LORA_B_STD = 0.2, 0.1
_FIRST_WORD = 4  # the ids before it are special tokens


@dataclass(frozen=True)
class Verdict:
    """The result of a case.

    Attributes:
        status: EXACT, REFUSED (by saro, with a reason), NOT_LOADABLE (by transformers) or WRONG.
        reason: why, in one line. For an exact model, the method that is refused.
        errors: {method: greatest relative difference of log-probs and gradients}.
        leak: greatest relative change of the log-probs if sequences see each other: the size of a real fault.
    """

    status: str
    reason: str = ""
    errors: Mapping[str, float] = field(default_factory=dict)
    leak: float = 0.0


class SideResult(NamedTuple):
    """Results of one side.

    Attributes:
        logps: (E,) nats, the entries of all sequences in their order.
        embeddings: (T, D), gradients at the embeddings of the tokens, in the layout of the pack.
        parameters: gradients of all trained parameters, in one vector.
    """

    logps: Tensor
    embeddings: Tensor
    parameters: Tensor


# {name of a layer: its matrices A and B and its scaling}
_Adapters = dict[str, tuple[Tensor, Tensor, float]]


def judge(case: Case, folder: Path, enter: Callable[[str], None]) -> Verdict:
    """Judge a case.

    Args:
        folder: empty folder, in which the model is saved.
        enter: is called with the name of each stage before it begins.
    """
    enter("transformers")
    try:
        if not case.option:
            check_supported(default_config(case.model_type))
        config = tiny_config(case)
        check_supported(config)
        _save_random_model(config, folder, seed=zlib.crc32(repr(case).encode()))
        _run_natively(_load_unmodified(folder, config), {})
    except SaroError as error:
        return Verdict(REFUSED, str(error))
    except Exception as error:
        return Verdict(NOT_LOADABLE, _one_line(error))
    enter("saro")
    errors: dict[str, float] = {}
    refusals: list[str] = []
    leak = 0.0
    for method in METHODS:
        try:
            errors[method], leak = _compare(folder, method)
        except SaroError as error:
            refusals.append(str(error).replace(str(folder), "the model"))
        except Exception as error:
            return Verdict(WRONG, f"{method} fails: {_one_line(error)}")
    if not errors:
        return Verdict(REFUSED, refusals[0])
    # Not "greatest error > ...", because NaN must fail too.
    is_exact = all(error <= TOLERANCE for error in errors.values())
    if is_exact and not leak >= _LEAST_LEAK:
        return Verdict(WRONG, f"cannot be judged: without isolation its log-probs change by only {leak:.1g}")
    return Verdict(EXACT if is_exact else WRONG, "; ".join(refusals), errors, leak)


def _one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]


def _compare(folder: Path, method: str) -> tuple[float, float]:
    """Return the greatest relative difference of a packed run, and that of the log-probs of a run without isolation.

    Raises:
        SaroError: the model, or the method, is refused; by the check of packs too, unless packs differ here as well.
    """
    options = ModelConfig(name=str(folder), method=method)
    policy = load_policy(find_model(options), options, _CPU, seed=0).train()
    _randomize_adapters(policy)
    refusal = _refusal_of_packs(policy)
    pack = lay_out(_TREES)
    _make_double(policy.causal_lm)
    try:
        packed, leaky = _run_packed(policy, pack), _run_leaky(policy, pack)
    except (TypeError, ValueError):
        if refusal is None:
            raise
        raise refusal from None
    native = _run_natively(_load_unmodified(folder, policy.causal_lm.config), _adapters(policy))
    error = max(_relative(ours, theirs) for ours, theirs in zip(packed, native, strict=True))
    if refusal is not None and error <= TOLERANCE:
        raise refusal
    return error, _relative(leaky, native.logps)


def _relative(ours: Tensor, theirs: Tensor) -> float:
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


def _refusal_of_packs(policy: Policy) -> SaroError | None:
    """Return the error with which the check at the start of a run refuses the model, if it does."""
    try:
        check_packs(policy, _PAIRS)
    except SaroError as error:
        return error
    return None


# Models.


def _save_random_model(config: PretrainedConfig, folder: Path, seed: int) -> None:
    """Save a model in which no parameter is neutral, with a tokenizer that ``find_model`` accepts."""
    torch.manual_seed(seed)
    model = auto_class(config).from_config(config)
    saved = model.state_dict()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.normal_(std=_WEIGHT_STD)
            else:
                parameter.add_(torch.randn_like(parameter), alpha=_WEIGHT_STD)
        for name, buffer in model.named_buffers():
            if name in saved and buffer.is_floating_point():
                buffer.mul_(1 + _WEIGHT_STD * torch.rand_like(buffer))
    model.save_pretrained(folder)
    words = {f"w{i}": i for i in range(VOCABULARY)}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words, unk_token="w3")), pad_token="w0", bos_token="w1", eos_token="w2"
    )
    tokenizer.save_pretrained(folder)


def _randomize_adapters(policy: Policy) -> None:
    """Give lora_B large values. A new adapter's are zero, and no error of the adapter would show."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in policy.trainable().items():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * _LORA_B_STD)


def _adapters(policy: Policy) -> _Adapters:
    """Return the adapters of a policy by the names that their layers have without PEFT; empty for full fine-tuning."""
    return {
        name.removeprefix("base_model.model."): (
            layer.lora_A["default"].weight,
            layer.lora_B["default"].weight,
            layer.scaling["default"],
        )
        for name, layer in policy.model.named_modules()
        if isinstance(layer, LoraLayer)
    }


# Records.


def _make_trees() -> list[SequenceTree]:
    """Make trees as RW and SRPO have them: single sequences, pairs, and several pairs on one prompt."""
    rng = np.random.default_rng(0)

    def words(number: int) -> list[int]:
        return rng.integers(_FIRST_WORD, VOCABULARY, number).tolist()

    def tree(prompt: list[int], *responses: list[int]) -> SequenceTree:
        return build_tree(
            [
                ScoredSequence(np.array(prompt + response, np.int32), len(prompt), np.zeros(len(response), np.uint8), 0)
                for response in responses
            ]
        )

    shared = words(12)
    return [
        tree(words(3), words(37)),
        tree(words(6), shared + words(9), shared + words(14)),
        tree(words(9), words(7), words(10), shared + words(3), [*shared, _FIRST_WORD]),
        tree(words(2), words(1)),
        tree(words(4), words(11), words(1)),
    ]


def _make_pairs() -> PairSet:
    """Make pairs for the check at the start of a run, whose sides share their first six tokens."""
    rng = np.random.default_rng(0)
    shared = [rng.integers(_FIRST_WORD, VOCABULARY, 6) for _ in range(3)]

    def side(*lengths: int) -> ExampleSet:
        own = [rng.integers(_FIRST_WORD, VOCABULARY, n) for n in lengths]
        number = len(lengths)
        return ExampleSet(
            tokens=np.concatenate([part for pair in zip(shared, own, strict=True) for part in pair]).astype(np.int32),
            offsets=np.cumsum([0, *(6 + n for n in lengths)]),
            prompt_tokens=np.full(number, 1, np.int32),
            think_tokens=np.zeros(number, np.int32),
            kinds=np.zeros(number, np.uint8),
            ids=tuple(f"r{i}" for i in range(number)),
        )

    return PairSet(side(15, 6, 28), side(18, 9, 31), np.arange(3, dtype=np.int32))


_TREES, _PAIRS = _make_trees(), _make_pairs()
_SEQUENCES = [sequence for tree in _TREES for sequence in tree.sequences]
_SCORED = [len(sequence.row_kinds) for sequence in _SEQUENCES]


def _read_positions(pack: Pack, trees: Sequence[SequenceTree]) -> Tensor:
    """Return the positions in the pack of all sequences' tokens but the last of each, which predicts nothing."""
    positions: list[int] = []
    first_segment = 0
    for tree in trees:
        for sequence, path in zip(tree.sequences, tree.paths, strict=True):
            read = [i for node in path for i in range(*pack.segments[first_segment + node][:2])]
            positions += read[: len(sequence.tokens) - 1]
        first_segment += len(tree.nodes)
    return torch.tensor(positions)


# Runs. The loss is a sum of log-probs with random weights: with equal ones, errors could cancel.
_WEIGHTS = torch.randn(sum(_SCORED), generator=torch.Generator().manual_seed(0), dtype=torch.float64)  # (E,)


@in_float64()
def _run_packed(policy: Policy, pack: Pack) -> SideResult:
    with _captured_embeddings(policy.causal_lm) as captured:
        logps = policy(pack)[pack.entry_row]  # (E,)
    (logps * _WEIGHTS).sum().backward()
    trained = [matrix for a, b, _ in _adapters(policy).values() for matrix in (a, b)]
    gradients = [_gradient(p) for p in trained or _sorted_parameters(policy.model)]
    return SideResult(logps.detach(), captured[0].grad[0], _join(gradients))


@in_float64()
@torch.no_grad()
def _run_leaky(policy: Policy, pack: Pack) -> Tensor:
    return policy(pack, isolated=False)[pack.entry_row]


def _load_unmodified(folder: Path, config: PretrainedConfig) -> PreTrainedModel:
    """Load the model by transformers alone, in float32 as saro does: buffers that are not saved are rounded alike."""
    model = auto_class(config).from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    return _make_double(model.eval())


def _make_double(model: PreTrainedModel) -> PreTrainedModel:
    """Convert a model to float64 in place, and return it. transformers' fastest kernel for experts does not know float64."""
    if is_mixture(model.config):
        model.set_experts_implementation("eager")
    return model.double()


@in_float64()
def _run_natively(model: PreTrainedModel, adapters: _Adapters) -> SideResult:
    """Run an unmodified model, with adapters added to its weights, on one sequence at a time."""
    with torch.no_grad():
        for name, (a, b, scaling) in adapters.items():
            model.get_submodule(name).weight.add_(scaling * b @ a)
    logps, embeddings = [], []
    for sequence, weights in zip(_SEQUENCES, _WEIGHTS.split(_SCORED), strict=True):
        tokens = torch.from_numpy(sequence.tokens.astype(np.int64))
        with _captured_embeddings(model) as captured:
            logits = model(input_ids=tokens[None, :-1], use_cache=False).logits[0, sequence.scored_from - 1 :]
        own = logits.log_softmax(-1).gather(1, tokens[sequence.scored_from :, None])[:, 0]
        (own * weights).sum().backward()
        logps.append(own.detach())
        embeddings.append(captured[0].grad[0])
    pack = lay_out(_TREES)
    on_pack = torch.zeros(pack.tokens, embeddings[0].shape[-1], dtype=torch.float64)
    on_pack.index_add_(0, _read_positions(pack, _TREES), torch.cat(embeddings))
    gradients = [_gradient(p) for p in _sorted_parameters(model)]
    if adapters:
        # By the chain rule, from the gradient of the weight W + s B A.
        gradients = []
        for name, (a, b, scaling) in adapters.items():
            gradient = _gradient(model.get_submodule(name).weight)
            gradients += [scaling * b.T @ gradient, scaling * gradient @ a.T]
    return SideResult(torch.cat(logps), on_pack, _join(gradients).detach())


def _sorted_parameters(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for _, parameter in sorted(model.named_parameters())]


def _gradient(parameter: nn.Parameter) -> Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad


def _join(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in tensors])


@contextmanager
def _captured_embeddings(model: PreTrainedModel) -> Iterator[list[Tensor]]:
    """Append the output (1, T, D) of the input embeddings to the yielded list; it keeps its gradient."""
    captured: list[Tensor] = []

    def keep(_: nn.Module, __: object, output: Tensor) -> Tensor:
        output.requires_grad_(True) if output.is_leaf else output.retain_grad()
        captured.append(output)
        return output.clone()  # a model may scale it in place

    handle = model.get_input_embeddings().register_forward_hook(keep)
    try:
        yield captured
    finally:
        handle.remove()
