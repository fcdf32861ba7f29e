"""The public functions: validation and the choice of an implementation."""

import difflib
import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from saro_kernels.definition import reference_token_logps, reference_token_statistics
from saro_kernels.tile_ops import choose_tile_op
from saro_kernels.tiled import tiled_token_logps, tiled_token_statistics

# "auto" and "tiled" stand for one of the others: see `choose_impl`.
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
    """log p(target) of each row under an LM head, without ever holding the (N, V) logits.

    ``logits = softcap * tanh(scale * (hidden @ weight.T + bias) / softcap)``, or without a softcap
    ``scale * (hidden @ weight.T + bias)``; the result is ``logits[target] - logsumexp(logits)``. The product runs in
    hidden's dtype, all after it in float32 (float64 for float64). Inside `torch.autocast` a float32 `hidden` is cast as
    a linear layer would cast it.

    It is once differentiable in `hidden`, `weight` and `bias`. With a head that needs no gradient the forward also
    computes d hidden, in one pass, and keeps it (N x D numbers in hidden's dtype); otherwise the backward recomputes
    the logits by tiles and sums d weight and d bias in float32.

    Args:
        hidden: (N, D), float32, bfloat16, float16 or float64; N may be 0.
        weight: (V, D), in hidden's dtype, or float32 (master weights) under a bfloat16 or float16 `hidden`.
        targets: (N,) int64, each in [0, V). Out of range is a ValueError on the CPU; on an accelerator, where looking
            would stall the queue, it is a device-side assertion, or NaN by "tiled-triton".
        bias: (V,), with weight's choice of dtypes.
        softcap: bound of the logits (Gemma 2), positive; None for none.
        scale: factor of the logits, applied after the bias and before the softcap (Cohere, Granite).
        impl: "reference" (the definition, whole logits), "tiled-torch" or "tiled-triton" (row tiles: fused linear
            cross-entropy as in Liger, arXiv 2410.10989, with a result per row; related: online softmax, arXiv
            1805.02867, and cut cross-entropy, arXiv 2411.09009), "tiled" (Triton's tile op where it can run, torch's
            elsewhere) or "auto" (the best for the inputs: "tiled"). One named to the end never falls back.

    Returns:
        (N,) log-probs in nats, float32; float64 if `hidden` is.

    Raises:
        ValueError: unknown `impl`; shapes, dtypes, devices or values that do not fit.
    """
    return _run(
        {"reference": reference_token_logps, "tiled": tiled_token_logps},
        impl,
        hidden,
        weight,
        targets,
        bias,
        softcap,
        scale,
    )


class TokenStatistics(NamedTuple):
    """Of each row's distribution.

    Attributes:
        logps: (N,) log p(target) in nats, float32; float64 if the hidden states are.
        entropy: (N,) -sum p log p in nats, in the same dtype.
        top1: (N,) bool, whether no token is likelier than the target.
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
    """`token_logps` with entropies and top-1 accuracy, for metrics: one GEMM per tile, and no gradient.

    Arguments and errors are those of `token_logps`.
    """
    functions = {"reference": reference_token_statistics, "tiled": tiled_token_statistics}
    return TokenStatistics(*_run(functions, impl, hidden, weight, targets, bias, softcap, scale))


def choose_impl(impl: str, device: torch.device, dtype: torch.dtype) -> str:
    """The implementation that `impl` stands for with hidden states of `dtype` on `device`: "reference", "tiled-torch"
    or "tiled-triton".

    Raises:
        ValueError: there is none of that name, or it cannot run there; it names the nearest that can.
    """
    if impl not in IMPLS:
        nearest = difflib.get_close_matches(impl, IMPLS, n=1, cutoff=0)[0]
        raise ValueError(f"impl {impl!r} is not available; the nearest that is: {nearest!r} (of {', '.join(IMPLS)})")
    if impl == "reference":
        return impl
    _, _, tile_op = impl.partition("-")
    return f"tiled-{choose_tile_op(tile_op or 'auto', device, dtype)}"


def _run(functions: dict[str, Callable], impl: str, hidden, weight, targets, bias, softcap, scale):
    """The function of an implementation, on inputs that have been checked."""
    device_type = hidden.device.type
    if hidden.dtype == torch.float32 and torch.is_autocast_enabled(device_type):
        hidden = hidden.to(torch.get_autocast_dtype(device_type))
    _check_tensors(hidden, weight, targets, bias)
    _check_numbers(softcap, scale)
    family, _, tile_op = choose_impl(impl, hidden.device, hidden.dtype).partition("-")
    function = partial(functions[family], tile_op=tile_op) if tile_op else functions[family]
    # The casts are settled; autocast would add its own, to the reference alone.
    with torch.autocast(device_type, enabled=False):
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
        master = tensor.dtype == torch.float32 and hidden.dtype.itemsize == 2
        if name != "targets" and tensor.dtype != hidden.dtype and not master:
            raise ValueError(
                f"{name} is {tensor.dtype}, hidden {hidden.dtype}; cast one (only float32 parameters under a bfloat16 "
                "or float16 hidden are taken as they are)"
            )
    if targets.device.type == "cpu" and len(targets):
        low, high = (int(bound) for bound in targets.aminmax())
        if low < 0 or high >= len(weight):
            raise ValueError(
                f"targets reach from {low} to {high}, outside [0, {len(weight)}); drop the rows that are not scored"
            )


def _check_numbers(softcap: float | None, scale: float) -> None:
    if not math.isfinite(scale):
        raise ValueError(f"scale must be finite, not {scale}")
    if softcap is not None and not (math.isfinite(softcap) and softcap > 0):
        raise ValueError(f"softcap must be positive and finite, or None; not {softcap}")


def _shape(tensor: Tensor) -> str:
    return str(tuple(tensor.shape))
