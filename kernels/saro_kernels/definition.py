"""The definitions: readable, differentiable, and as large as the logits are."""

from torch import Tensor, nn, promote_types, special
from torch import float32 as fp32


def _log_softmax(hidden: Tensor, weight: Tensor, bias: Tensor | None, softcap: float | None, scale: float) -> Tensor:
    """(N, V) log-probs in nats, in float32 or wider."""
    bias = None if bias is None else bias.to(hidden.dtype)
    product = nn.functional.linear(hidden, weight.to(hidden.dtype), bias)
    logits = product.to(promote_types(product.dtype, fp32)) * scale
    if softcap is not None:
        logits = softcap * (logits / softcap).tanh()
    return logits.log_softmax(1)


def reference_token_logps(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, bias: Tensor | None, softcap: float | None, scale: float
) -> Tensor:
    """log p(target) in nats, shape (N,), through the whole (N, V) matrix of logits. See `token_logps`."""
    logps = _log_softmax(hidden, weight, bias, softcap, scale)
    return logps.gather(1, targets[:, None]).squeeze(1)


def reference_token_statistics(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, bias: Tensor | None, softcap: float | None, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probs, entropies and whether the target is the likeliest, each (N,). See `token_statistics`."""
    logps = _log_softmax(hidden, weight, bias, softcap, scale)
    of_targets = logps.gather(1, targets[:, None]).squeeze(1)
    return of_targets, special.entr(logps.exp()).sum(1), of_targets == logps.amax(1)
