"""The public functions of the LM head: they check their arguments and choose an implementation."""

import difflib
import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from saro_kernels.autocast import cast_input
from saro_kernels.definition import reference_token_logps, reference_token_statistics
from saro_kernels.tile_ops import choose_tile_op
from saro_kernels.tiled import tiled_token_logps, tiled_token_statistics

# `choose_impl` turns "auto" and "tiled" into one of the others.
IMPLS = ("auto", "reference", "tiled", "tiled-torch", "tiled-triton")

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def token_logps(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    scale: float = 1.0,
    impl: str = "auto",
) -> Tensor:
    """Return log p(target) of each row under an LM head, without ever holding the (N, V) logits.

    The result is ``logits[target] - logsumexp(logits)`` with ``logits = softcap * tanh(scale * (hidden @ weight.T + bias)
    / softcap)``, or ``scale * (hidden @ weight.T + bias)`` without a softcap. `hidden` and `weight` enter the product
    in hidden's dtype. The logits and all that follows are float32 (float64 if hidden is float64). Under
    `torch.autocast`, a float32 `hidden` is cast as for a linear layer.

    It is once differentiable in `hidden`, `weight` and `bias`. If the head needs no gradient, the forward also computes
    d hidden in the same pass and keeps it (N x D numbers in hidden's dtype). Otherwise the backward recomputes the
    logits tile by tile and sums d weight and d bias in float32. Tiles round the gradient of the logits to hidden's
    dtype before these products.

    Args:
        hidden: (N, D), float32, bfloat16, float16 or float64; N may be 0.
        weight: (V, D), in hidden's dtype, or float32 (master weights) under a bfloat16 or float16 `hidden`.
        targets: (N,) int64, each in [0, V). On the CPU, a target out of range is a ValueError. An accelerator is not
            checked, since that would synchronise; there it is a device-side assertion, or NaN with "tiled-triton".
        bias: (V,), in the same dtypes as `weight`.
        softcap: bound of the logits (Gemma 2), positive; None for no bound.
        scale: factor of the logits, applied after the bias and before the softcap (Cohere, Granite).
        impl: "reference" is the definition and holds all logits. "tiled-torch" and "tiled-triton" use row tiles: fused
            linear cross-entropy as in Liger, arXiv 2410.10989, with a result per row (related: online softmax, arXiv
            1805.02867, and cut cross-entropy, arXiv 2411.09009). "tiled" uses Triton's tile op if it can run, else
            torch's. "auto" is the best for the inputs, at present "tiled". A full name such as "tiled-triton" never
            falls back to another.

    Returns:
        (N,) log-probs in nats, float32; float64 if `hidden` is.

    Raises:
        ValueError: `impl` is unknown or cannot run here; or a shape, dtype, device or value is wrong.
    """
    functions = {"reference": reference_token_logps, "tiled": tiled_token_logps}
    return _run(functions, impl, hidden=hidden, weight=weight, targets=targets, bias=bias, softcap=softcap, scale=scale)


class TokenStatistics(NamedTuple):
    """Statistics of each row's distribution over the vocabulary.

    Attributes:
        logps: (N,) log p(target) in nats, float32; float64 if the hidden states are.
        entropy: (N,) -sum p log p in nats, in the same dtype.
        top1: (N,) bool, True where no token is likelier than the target.
    """

    logps: Tensor
    entropy: Tensor
    top1: Tensor


@torch.no_grad()
def token_statistics(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    scale: float = 1.0,
    impl: str = "auto",
) -> TokenStatistics:
    """Return log-probs, entropies and top-1 flags for metrics: one GEMM per tile, and no gradient.

    Arguments and errors are those of `token_logps`.
    """
    functions = {"reference": reference_token_statistics, "tiled": tiled_token_statistics}
    logps, entropies, top1 = _run(
        functions, impl, hidden=hidden, weight=weight, targets=targets, bias=bias, softcap=softcap, scale=scale
    )
    return TokenStatistics(logps, entropies, top1)


def choose_impl(impl: str, device: torch.device, dtype: torch.dtype) -> str:
    """Return the implementation that `impl` means for hidden states of `dtype` on `device`.

    It is "reference", "tiled-torch" or "tiled-triton".

    Raises:
        ValueError: `impl` is unknown, or it cannot run on `device`. The message says which one to use.
    """
    if impl not in IMPLS:
        closest = difflib.get_close_matches(impl, IMPLS, n=1, cutoff=0)[0]
        raise ValueError(f"impl {impl!r} is unknown; did you mean {closest!r}? (one of {', '.join(IMPLS)})")
    if impl == "reference":
        return impl
    _, _, tile_op = impl.partition("-")
    return f"tiled-{choose_tile_op(tile_op or 'auto', device, dtype)}"


def _run(
    functions: dict[str, Callable],
    impl: str,
    *,
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    softcap: float | None,
    scale: float,
):
    """Check the inputs, choose the function for `impl` among `functions`, and return its result."""
    hidden = cast_input(hidden)
    _check_tensors(hidden, weight, targets, bias)
    _check_numbers(softcap, scale)
    family, _, tile_op = choose_impl(impl, hidden.device, hidden.dtype).partition("-")
    function = partial(functions[family], tile_op=tile_op) if tile_op else functions[family]
    # The inputs have their dtypes by now. Autocast would cast once more, and only in the reference.
    with torch.autocast(hidden.device.type, enabled=False):
        return function(hidden, weight, targets, bias=bias, softcap=softcap, scale=scale)


def _check_tensors(hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None) -> None:
    if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1] or len(weight) == 0:
        raise ValueError(f"need hidden (N, D) and weight (V, D), V > 0; got {_shape(hidden)} and {_shape(weight)}")
    if targets.shape != hidden.shape[:1]:
        raise ValueError(f"need one target per row of hidden, shape ({len(hidden)},); got {_shape(targets)}")
    if targets.dtype != torch.int64:
        raise ValueError(f"targets must be int64, not {targets.dtype}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"need one bias per row of weight, shape ({len(weight)},); got {_shape(bias)}")
    if hidden.dtype not in DTYPES:
        raise ValueError(f"hidden must be float32, bfloat16, float16 or float64, not {hidden.dtype}")
    for name, tensor in {"weight": weight, "bias": bias, "targets": targets}.items():
        if tensor is None:
            continue
        if tensor.device != hidden.device:
            raise ValueError(f"{name} is on {tensor.device}, hidden on {hidden.device}; move them to one device")
        is_master_weight = tensor.dtype == torch.float32 and hidden.dtype.itemsize == 2
        if name != "targets" and tensor.dtype != hidden.dtype and not is_master_weight:
            raise ValueError(
                f"{name} is {tensor.dtype}, hidden {hidden.dtype}; cast one to the other's dtype (only float32 "
                "parameters with a bfloat16 or float16 hidden need no cast)"
            )
    if targets.device.type == "cpu" and len(targets):
        low, high = (int(bound) for bound in targets.aminmax())
        if low < 0 or high >= len(weight):
            raise ValueError(
                f"targets range from {low} to {high}, outside [0, {len(weight)}); drop the rows that are not scored"
            )


def _check_numbers(softcap: float | None, scale: float) -> None:
    if not math.isfinite(scale):
        raise ValueError(f"scale must be finite, not {scale}")
    if softcap is not None and not (math.isfinite(softcap) and softcap > 0):
        raise ValueError(f"softcap must be positive and finite, or None; not {softcap}")


def _shape(tensor: Tensor) -> str:
    return str(tuple(tensor.shape))
