"""Definitions of the head functions: readable and differentiable, but they hold all (N, V) logits."""

import torch
from torch import Tensor


def _log_softmax(hidden: Tensor, weight: Tensor, bias: Tensor | None, softcap: float | None, scale: float) -> Tensor:
    """Return log-probs (N, V) in nats. Everything runs in float32 or wider."""
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    # Round a float32 weight to the dtype of the hidden states, as the GEMMs of the tiles and autocast do.
    weight = weight.to(hidden.dtype).to(dtype)
    bias = None if bias is None else bias.to(dtype)
    logits = torch.nn.functional.linear(hidden.to(dtype), weight, bias) * scale
    if softcap is not None:
        logits = softcap * (logits / softcap).tanh()
    return logits.log_softmax(1)


def reference_token_logps(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, bias: Tensor | None, softcap: float | None, scale: float
) -> Tensor:
    """Return log p(target), (N,) in nats, from the full (N, V) logits. See `token_logps`."""
    logps = _log_softmax(hidden, weight, bias, softcap, scale)
    return logps.gather(1, targets[:, None]).squeeze(1)


def reference_token_statistics(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, bias: Tensor | None, softcap: float | None, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return log-probs, entropies and top-1 flags, each (N,). See `token_statistics`."""
    logps = _log_softmax(hidden, weight, bias, softcap, scale)
    target_logps = logps.gather(1, targets[:, None]).squeeze(1)
    entropies = torch.special.entr(logps.exp()).sum(1)
    return target_logps, entropies, target_logps == logps.amax(1)
