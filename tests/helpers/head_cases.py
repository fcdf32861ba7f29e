"""Helpers to test LM heads: random inputs, the definition in float64, the error budget, and a memory and GEMM counter."""

from __future__ import annotations

import importlib.util
import weakref

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# An error budget needs a truth in a wider dtype, so float64 is tested for equality instead.
BUDGETED = [torch.float32, torch.bfloat16, torch.float16]
DTYPES = [*BUDGETED, torch.float64]
SHAPES = [(1, 1, 1), (1, 8, 16), (7, 5, 1), (5, 3, 2), (33, 17, 97), (64, 32, 256), (130, 9, 513)]
VARIANTS = [
    {},
    {"bias": True},
    {"softcap": 3.0},
    {"scale": 0.25},
    {"bias": True, "softcap": 2.0, "scale": 1.7},
]
MATRIX_PRODUCTS = {"mm", "addmm", "addmm_"}


def why_no_interpreter() -> str | None:
    """Return why Triton cannot interpret kernels on the CPU; None if it can."""
    if importlib.util.find_spec("triton") is None:
        return "the test extra brings triton for Linux"
    import triton

    if not triton.knobs.runtime.interpret:
        return "TRITON_INTERPRET=0"
    version = tuple(int(part) for part in triton.__version__.split(".")[:2])
    if version < (3, 7) and np.lib.NumpyVersion(np.__version__) >= "2.4.0":
        return f"the interpreter of triton {triton.__version__} needs numpy < 2.4"
    return None


interpreted = pytest.mark.skipif(why_no_interpreter() is not None, reason=str(why_no_interpreter()))


def inputs(n, d, v, dtype=torch.float32, *, bias=False, seed=0, spread=2.0):
    """Return random (hidden, weight, targets, bias, upstream). Logits have standard deviation `spread`.

    Shapes: (n, d), (v, d), (n,), (v,) or None, (n,).
    """
    rng = torch.Generator().manual_seed(seed)
    hidden = torch.randn(n, d, generator=rng).to(dtype)
    weight = (torch.randn(v, d, generator=rng) * spread / d**0.5).to(dtype)
    targets = torch.randint(v, (n,), generator=rng)
    offset = torch.randn(v, generator=rng).to(dtype) if bias else None
    upstream = torch.rand(n, generator=rng, dtype=torch.float64) - 0.3
    return hidden, weight, targets, offset, upstream


def split(variant):
    """Return an entry of VARIANTS as (True if it has a bias, {"softcap": ..., "scale": ...})."""
    return variant.get("bias", False), {"softcap": variant.get("softcap"), "scale": variant.get("scale", 1.0)}


def definition(hidden, weight, targets, bias=None, *, softcap=None, scale=1.0):
    """Return the log-probs of the targets, (N,), from all logits, in the dtype of the inputs."""
    logits = scale * (hidden @ weight.T + (0 if bias is None else bias))
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    # Subtract the maximum: at logits of 1e4, even a float64 logsumexp has lost twelve digits.
    logits = logits - logits.detach().amax(1, keepdim=True)
    return logits[torch.arange(len(targets)), targets] - logits.logsumexp(1)


def values_and_gradients(function, hidden, weight, targets, bias, upstream, needs, **options):
    """Return [logps, then the gradients of sum(upstream * logps) by the inputs named in `needs`]."""
    leaves = {"hidden": hidden, "weight": weight, "bias": bias}
    leaves = {k: None if x is None else x.detach().clone().requires_grad_(k in needs) for k, x in leaves.items()}
    logps = function(leaves["hidden"], leaves["weight"], targets, bias=leaves["bias"], **options)
    loss = (logps * upstream.to(logps.dtype)).sum()
    gradients = torch.autograd.grad(loss, [leaves[k] for k in needs]) if needs else []
    return [logps.detach(), *gradients]


def exact(hidden, weight, targets, bias, upstream, needs, **options):
    """Return `values_and_gradients` of the definition in float64, at the values that the inputs have in their dtype."""
    bias = None if bias is None else bias.double()
    return values_and_gradients(definition, hidden.double(), weight.double(), targets, bias, upstream, needs, **options)


def error(got, want):
    """Return the root mean square deviation and the largest deviation."""
    deviation = (got.double() - want).abs()
    return deviation.square().mean().sqrt().item(), deviation.max().item()


def assert_within_budget(got, plain, want):
    """Assert that each error of `got` is at most twice that of `plain`, plus one ulp of the largest number of `want`."""
    for ours, theirs, truth in zip(got, plain, want, strict=True):
        assert ours.dtype == theirs.dtype
        ulp = torch.finfo(ours.dtype).eps * truth.abs().max().item()
        for our_error, their_error in zip(error(ours, truth), error(theirs, truth), strict=True):
            assert our_error <= 2 * their_error + ulp


class Watch(TorchDispatchMode):
    """Counts matrix products, and the bytes of the new storages that operations return while these are alive.

    Attributes:
        products: matrix products so far.
        live: storage -> bytes, of the storages that are alive.
        peak_bytes: largest sum of `live`.
        largest_bytes: size of the largest storage.
    """

    def __init__(self):
        super().__init__()
        self.products = 0
        self.live = {}
        self.peak_bytes = 0
        self.largest_bytes = 0

    def __enter__(self):
        self.old_storages = set()  # storages made before the watch began
        return super().__enter__()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        self.products += function.overloadpacket.__name__ in MATRIX_PRODUCTS
        self.old_storages.update(x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if self.is_unseen(x))
        result = function(*args, **kwargs)
        for tensor in tree_leaves(result):
            if self.is_unseen(tensor) and tensor.untyped_storage()._cdata not in self.old_storages:
                self.follow(tensor.untyped_storage())
        return result

    def is_unseen(self, x):
        return isinstance(x, torch.Tensor) and x.untyped_storage()._cdata not in self.live

    def follow(self, storage):
        key, size = storage._cdata, storage.nbytes()
        self.live[key] = size
        weakref.finalize(storage, self.live.pop, key, None)
        self.largest_bytes = max(self.largest_bytes, size)
        self.peak_bytes = max(self.peak_bytes, sum(self.live.values()))
