"""Check the layout of packs on a small random model of the same class, where nothing but rounding in float32 differs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import torch
from transformers import PretrainedConfig, PreTrainedModel

from saro.checks.forwards import Probe
from saro.data.tree import ScoredSequence, SequenceTree, build_tree
from saro.errors import SaroError
from saro.model.architectures import is_mixture, text_config
from saro.model.policy import Policy
from saro.model.unmodified import unmodified

# The small model embeds this many tokens. The number is prime, so that different tokens seldom become the same.
_VOCABULARY = 251
# Largest intermediate size of its MLPs, which work on single tokens and so know nothing of the layout.
_INNER = 256
# Names of the number of experts.
_EXPERTS = ("num_experts", "num_local_experts")
# Largest difference of a log-prob, nats, and of a gradient, in units of the largest. Rounding in float32 makes
# up to 7e-6 and 5e-5; a wrong position, target or neighbour makes 1e-3 or more.
_LOGP_LIMIT = 5e-5
_GRADIENT_LIMIT = 2e-4
# A leak must change log-probs by this many times the limit, on average.
_CONTROL_FACTOR = 10


@dataclass(frozen=True)
class LayoutCheck:
    """The result of the check, as the largest difference from sequences that are run alone.

    Attributes:
        logps: largest difference of a log-prob, nats.
        gradients: largest difference of a gradient at the input embeddings, divided by the largest gradient.
        control: mean difference of the log-probs without isolation, nats, in the rows that another tree can reach. It
            must be large.
    """

    logps: float
    gradients: float
    control: float


def check_layout(policy: Policy, trees: Sequence[SequenceTree], window: int | None) -> LayoutCheck:
    """Run trees in one pack, and their sequences alone, by a small float32 model with random weights.

    The model's own weights would hide small errors: in bfloat16 rounding changes log-probs by as much as a position that
    is off by one. Here every row is compared, and the largest difference counts.

    Args:
        policy: gives the class of the model and its config.
        trees: at least two, whose sequences score all tokens but the first.
        window: the model's attention window in tokens, if it has one.

    Raises:
        SaroError: the results differ, the check would not notice a leak between trees, or no small model can be made.
    """
    small = Policy(_small_model(policy.causal_lm), head="tiled-torch").eval()
    probe = Probe.of(_with_small_tokens(trees))
    with unmodified(small):
        truth = probe.run_natively(small, torch.float64)
    packed = probe.run_packed(small)
    logps, gradients = packed.differences(truth)
    reached = _reached_by_leak(probe, window).to(logps.device)
    leaky = probe.run_leaky(small).double() - truth.logps
    result = LayoutCheck(
        logps=logps.max().item(),
        gradients=(gradients.max() / truth.gradients.abs().max()).item(),
        control=leaky[reached].abs().mean().item(),
    )
    name = type(policy.causal_lm).__name__
    # Do not write "difference > ...": NaN must fail too.
    if not result.logps <= _LOGP_LIMIT:
        raise SaroError(
            f"packed log-probs differ from the model's own by up to {result.logps:.3g} nats in a small "
            f"float32 {name}: packed training would be wrong for this model; report it"
        )
    if not result.gradients <= _GRADIENT_LIMIT:
        raise SaroError(
            f"packed gradients differ from the model's own by up to {result.gradients:.3g} of the largest one in a "
            f"small float32 {name}: packed training would be wrong for this model; report it"
        )
    if not result.control > _CONTROL_FACTOR * _LOGP_LIMIT:
        raise SaroError(
            "the check of packs has no power here: without isolation the log-probs differ by only "
            f"{result.control:.3g} nats; report it"
        )
    return result


def _small_model(lm: PreTrainedModel) -> PreTrainedModel:
    """Make a float32 model of the same class, with random weights, fewer layers and tokens, and narrow MLPs."""
    try:
        with _own_random_state(lm.device), torch.device(lm.device), torch.no_grad():
            model = type(lm)(_small_config(lm.config)).float()
            for parameter in model.parameters():
                if parameter.ndim >= 2:
                    parameter.normal_(std=parameter.shape[-1] ** -0.5)
                else:
                    parameter += 0.1 * torch.randn_like(parameter)
    except (TypeError, ValueError, RuntimeError, AttributeError, KeyError, IndexError) as error:
        first = str(error).strip().partition("\n")[0]
        raise SaroError(
            f"cannot make a small {type(lm).__name__}, on which the layout of packs is checked ({first}); report it"
        ) from error
    return model


def _small_config(config: PretrainedConfig) -> PretrainedConfig:
    """Return the config of the small model: only sizes change, and its layers have all types that the model has.

    A multimodal model keeps one layer of its other parts, which texts do not reach.
    """
    text = text_config(config)
    if text is config:
        return _small_text_config(config)
    parts = {}
    for name in config.sub_configs:
        own = getattr(config, name)
        parts[name] = _small_text_config(own).to_dict() if own is text else own.to_dict() | _one_layer(own)
    options = {name: value for name, value in config.to_dict().items() if name != "quantization_config"}
    return type(config).from_dict(options | parts)


def _one_layer(config: PretrainedConfig) -> dict[str, int]:
    name = config.attribute_map.get("num_hidden_layers", "num_hidden_layers")
    return {name: 1}


def _small_text_config(config: PretrainedConfig) -> PretrainedConfig:
    depth = config.num_hidden_layers
    types = getattr(config, "layer_types", None) or [None] * depth
    layers = sorted({types.index(kind) for kind in types} | {depth - 1})
    sizes = {"num_hidden_layers": len(layers), "intermediate_size": _INNER}
    # Some families spell these options in another way, such as n_layer.
    sizes = {config.attribute_map.get(name, name): size for name, size in sizes.items()}
    if is_mixture(config):
        # Let all experts compute each token: otherwise rounding could choose between two of them.
        sizes |= dict.fromkeys(_EXPERTS, config.num_experts_per_tok)
    small = {}
    for name, value in config.to_dict().items():
        if isinstance(value, list) and len(value) == depth:
            value = [value[i] for i in layers]
        elif name.endswith("per_layer_config") and value:
            by_index = {int(key): options for key, options in value.items()}
            value = {new: by_index[old] for new, old in enumerate(layers) if old in by_index}
        elif isinstance(value, int) and ("vocab_size" in name or name in sizes):
            value = min(value, sizes.get(name, _VOCABULARY))
        elif name.endswith("_token_id"):
            value = [i % _VOCABULARY for i in value] if isinstance(value, list) else value and value % _VOCABULARY
        elif name == "num_kv_shared_layers":
            value = 0  # it counts the last layers, of which too few are left; the whole model is run with them
        if name != "quantization_config":
            small[name] = value
    return type(config).from_dict(small)


@contextmanager
def _own_random_state(device: torch.device) -> Iterator[None]:
    """Draw the same numbers each time, and leave the state of the random numbers as it was."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(0)
        yield


def _with_small_tokens(trees: Sequence[SequenceTree]) -> list[SequenceTree]:
    """Return trees of the same sequences with token ids of the small model."""
    ids = np.unique(np.concatenate([s.tokens for tree in trees for s in tree.sequences]))

    def small(sequence: ScoredSequence, shift: int) -> ScoredSequence:
        numbers = np.searchsorted(ids, sequence.tokens) + shift
        return replace(sequence, tokens=(numbers % _VOCABULARY).astype(np.int32))

    # Give each tree other tokens: a leak from a copy of the same tokens may change nothing.
    return [build_tree([small(sequence, i) for sequence in tree.sequences]) for i, tree in enumerate(trees)]


def _reached_by_leak(probe: Probe, window: int | None) -> torch.Tensor:
    """Return (R,) bool, True for the compared entries of the second tree whose window reaches into the first."""
    leak_begins = sum(len(sequence.row_kinds) for sequence in probe.trees[0].sequences)
    leak_ends = leak_begins + sum(len(sequence.row_kinds) for sequence in probe.trees[1].sequences)
    reached = (probe.entries >= leak_begins) & (probe.entries < leak_ends)
    return reached & (probe.entries < leak_begins + window) if window else reached
