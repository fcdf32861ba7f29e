"""LM heads for tests: random inputs, the definition in float64, the error budget, and a watch on memory and work."""

from __future__ import annotations

import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# An error budget needs a truth in a wider dtype, so float64 has an equality test instead.
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


def inputs(n, d, v, dtype=torch.float32, *, bias=False, seed=0, spread=2.0):
    """(hidden, weight, targets, bias, upstream); logits have standard deviation `spread`."""
    rng = torch.Generator().manual_seed(seed)
    hidden = torch.randn(n, d, generator=rng).to(dtype)
    weight = (torch.randn(v, d, generator=rng) * spread / d**0.5).to(dtype)
    targets = torch.randint(v, (n,), generator=rng)
    offset = torch.randn(v, generator=rng).to(dtype) if bias else None
    upstream = torch.rand(n, generator=rng, dtype=torch.float64) - 0.3
    return hidden, weight, targets, offset, upstream


def split(variant):
    """A VARIANTS entry as (bias wanted, options of the functions below token_logps)."""
    return variant.get("bias", False), {"softcap": variant.get("softcap"), "scale": variant.get("scale", 1.0)}


def definition(hidden, weight, targets, bias=None, *, softcap=None, scale=1.0):
    logits = scale * (hidden @ weight.T + (0 if bias is None else bias))
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    logits = logits - logits.detach().amax(1, keepdim=True)  # at 1e4 even a float64 logsumexp has lost twelve digits
    return logits[torch.arange(len(targets)), targets] - logits.logsumexp(1)


def values_and_gradients(function, hidden, weight, targets, bias, upstream, needs, **options):
    """[logps, d hidden, d weight, d bias] of sum(upstream * logps), without the gradients that `needs` leaves out."""
    leaves = {"hidden": hidden, "weight": weight, "bias": bias}
    leaves = {k: None if x is None else x.detach().clone().requires_grad_(k in needs) for k, x in leaves.items()}
    logps = function(leaves["hidden"], leaves["weight"], targets, bias=leaves["bias"], **options)
    wanted = [leaves[k] for k in needs]
    return [logps.detach(), *torch.autograd.grad((logps * upstream.to(logps.dtype)).sum(), wanted)]


def exact(hidden, weight, targets, bias, upstream, needs, **options):
    """The same from the definition in float64, at the values that the inputs have in their dtype."""
    wide = [None if x is None else x.double() for x in (hidden, weight, bias)]
    return values_and_gradients(definition, wide[0], wide[1], targets, wide[2], upstream, needs, **options)


def error(got, want):
    """Root mean square and largest deviation."""
    deviation = (got.double() - want).abs()
    return deviation.square().mean().sqrt().item(), deviation.max().item()


def assert_within_budget(got, plain, want):
    """At most twice the plain path's error, plus the last bit of the largest number."""
    for ours, theirs, truth in zip(got, plain, want, strict=True):
        assert ours.dtype == theirs.dtype
        last_bit = torch.finfo(ours.dtype).eps * truth.abs().max().item()
        for mine, other in zip(error(ours, truth), error(theirs, truth), strict=True):
            assert mine <= 2 * other + last_bit


class Watch(TorchDispatchMode):
    """Counts matrix products and follows the bytes of the storages that live operations' outputs hold."""

    def __init__(self):
        super().__init__()
        self.products, self.live, self.peak_bytes, self.largest_bytes = 0, {}, 0, 0

    def __enter__(self):
        self.old = set()
        return super().__enter__()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        self.products += function.overloadpacket.__name__ in MATRIX_PRODUCTS
        self.old.update(x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if self.foreign(x))
        result = function(*args, **kwargs)
        for tensor in tree_leaves(result):
            if self.foreign(tensor) and tensor.untyped_storage()._cdata not in self.old:
                self.follow(tensor.untyped_storage())
        return result

    def foreign(self, x):
        return isinstance(x, torch.Tensor) and x.untyped_storage()._cdata not in self.live

    def follow(self, storage):
        key, size = storage._cdata, storage.nbytes()
        self.live[key] = size
        weakref.finalize(storage, self.live.pop, key, None)
        self.largest_bytes = max(self.largest_bytes, size)
        self.peak_bytes = max(self.peak_bytes, sum(self.live.values()))
