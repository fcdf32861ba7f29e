"""Matrix products of bfloat16 or float16 factors, summed and written in float32.

A plain `torch.mm` rounds its result to the dtype of the factors. A logit would then keep 8 bits in bfloat16, and a
log-prob would be off by hundredths of a nat.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

# Devices whose GEMMs take the argument `out_dtype`.
OUT_DTYPE_DEVICES = ("cuda", "xpu")
# Bytes of a block of factors that is cast to float32 elsewhere. Larger blocks are no faster; smaller ones make more GEMMs,
# at whose end threads wait for each other.
BLOCK_BYTES = 16 * 2**20


def add_product(out: Tensor, a: Tensor, b: Tensor, *, beta: int) -> None:
    """Set `out` (M, N) to beta * out + a @ b, summed in out's dtype. Run it in `precise_products`.

    Args:
        out: in the dtype of the factors, or float32. Its numbers are not read if `beta` is 0.
        a: (M, K).
        b: (K, N), in the dtype of `a`.
        beta: 0 or 1.
    """
    if out.dtype == a.dtype:
        torch.addmm(out, a, b, beta=beta, out=out)
    elif out.device.type in OUT_DTYPE_DEVICES:
        torch.addmm(out, a, b, out_dtype=out.dtype, beta=beta, out=out)
    elif len(out) < out.shape[1]:
        add_product(out.t(), b.t(), a.t(), beta=beta)
    else:
        # Cast the factors: the longer one (of a head, the one with V rows) by blocks, so that no copy of it exists.
        wide = b.to(out.dtype)
        rows = max(1, BLOCK_BYTES // (out.itemsize * max(1, len(b))))
        for block, part in zip(a.split(rows), out.split(rows), strict=True):
            part.addmm_(block.to(out.dtype), wide, beta=beta)


@contextmanager
def precise_products(device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """Make GEMMs with factors of `dtype` accumulate in float32, and run fast, whatever the program has set.

    The settings are global: meanwhile, a CPU rounds the factors of other threads' float32 GEMMs if `dtype` is bfloat16.
    """
    if device.type == "cuda":
        with _float32_accumulation():
            yield
    elif device.type == "cpu" and dtype == torch.bfloat16:
        with _bfloat16_factors():
            yield
    else:
        yield


@contextmanager
def _float32_accumulation() -> Iterator[None]:
    """Make cuBLAS accumulate bfloat16 and float16 products in float32.

    The sums of d hidden run over the full vocabulary. cuBLAS splits them and by default rounds the parts before adding.
    """
    matmul = torch.backends.cuda.matmul
    names = ("allow_bf16_reduced_precision_reduction", "allow_fp16_reduced_precision_reduction")
    before = {name: (getattr(matmul, name), getattr(matmul, f"{name}_split_k")) for name in names}
    accumulation = matmul.allow_fp16_accumulation
    for name, (_, split) in before.items():
        setattr(matmul, name, (False, split))
    matmul.allow_fp16_accumulation = False
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(matmul, name, value)
        matmul.allow_fp16_accumulation = accumulation


@contextmanager
def _bfloat16_factors() -> Iterator[None]:
    """Let oneDNN multiply float32 factors as bfloat16: `add_product` casts them from there, so that nothing is rounded.

    Sums and results stay float32. On a CPU with bfloat16 instructions it takes half the time of a float32 GEMM or less.
    """
    matmul = torch.backends.mkldnn.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = "bf16"
    try:
        yield
    finally:
        # "none" inherits torch.backends.fp32_precision, and reads like the inherited value.
        matmul.fp32_precision = "none"
        if matmul.fp32_precision != before:
            matmul.fp32_precision = before
