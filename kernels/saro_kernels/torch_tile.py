"""The tile op in plain torch: softmax statistics of a tile of logits, then their gradient in place."""

import torch
from torch import Tensor

# Columns that `_round_in_place` copies through other memory; a power of two.
ROUNDED_FIRST = 1024


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of products, maxima, sums and log-probs: float64 for float64 hidden states, else float32."""
    return torch.promote_types(dtype, torch.float32)


class TorchTile:
    """The tile op in plain torch, for any device.

    Attributes:
        product: (rows, V), in the statistics dtype. The caller writes h W^T + b into it.
        gradient: (rows, V), in the dtype of the hidden states: `run` writes the gradient of the products into it, in
            the memory of `product`.
    """

    def __init__(self, rows: int, like: Tensor, vocab: int, *, softcap: float | None, scale: float, gradient: bool):
        self.softcap, self.scale = softcap, scale
        self.product = like.new_empty(rows, vocab, dtype=statistics_dtype(like.dtype))
        self.gradient = overlay(self.product, like.dtype) if gradient else None
        # The softcap's slope needs a buffer of its own: the exponentials overwrite the tanh that it comes from.
        self.slope = torch.empty_like(self.product) if gradient and softcap is not None else None

    def run(self, targets: Tensor, upstream: Tensor | None = None) -> Tensor:
        """Return the log-probs (n,), in nats, of the first n = len(targets) rows of `product`.

        With a gradient, those rows of `gradient` become d(sum(upstream * logps)) / d product. `upstream` is (n,); None
        stands for ones. `product` is overwritten.
        """
        work, targets = self._shifted_logits(len(targets)), targets[:, None]
        shifted_target = work.gather(1, targets)
        total = work.exp_().sum(1, keepdim=True)
        logps = shifted_target - total.log()

        if self.gradient is not None:
            factor = self.scale if upstream is None else upstream[:, None] * self.scale
            work.mul_(total.reciprocal_().mul_(factor).neg_())
            # Write 1 - p at the target, one element per row. Adding 1 to -p would need an atomic add.
            work.scatter_(1, targets, torch.expm1(logps).mul_(factor).neg_())
            if self.slope is not None:
                work.mul_(self.slope[: len(work)])
            if self.gradient.dtype != work.dtype:
                _round_in_place(work, self.gradient[: len(work)])
        return logps.squeeze(1)

    def statistics(self, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return log-probs, entropies and top-1 flags of the first n = len(targets) rows of `product`, which it overwrites.

        Log-probs (n,) and entropies (n,) are in nats; the flags (n,) are True where no token is likelier than the target.
        """
        work = self._shifted_logits(len(targets))
        shifted_target = work.gather(1, targets[:, None])
        total = work.exp_().sum(1, keepdim=True)
        logps = shifted_target - total.log()
        entropies = torch.special.entr(work.div_(total), out=work).sum(1)
        return logps.squeeze(1), entropies, shifted_target.squeeze(1) == 0

    def _shifted_logits(self, rows: int) -> Tensor:
        """Turn the first rows of `product` into logits minus their row's maximum, and return them. Fills `slope`."""
        work = self.product[:rows]
        if self.softcap is not None:
            work.mul_(self.scale / self.softcap).tanh_()
            if self.slope is not None:
                torch.mul(work, work, out=self.slope[:rows]).neg_().add_(1)
            work.mul_(self.softcap)
        elif self.scale != 1:
            work.mul_(self.scale)
        # Subtract the maximum first: for large logits, logit - logsumexp would cancel the digits of the result.
        return work.sub_(work.amax(1, keepdim=True))


def overlay(buffer: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a tensor of buffer's shape and `dtype` in its memory: each row begins where that of `buffer` begins.

    A GEMM reads it without a copy, since its columns are adjacent.
    """
    return buffer if buffer.dtype == dtype else buffer.view(dtype)[:, : buffer.shape[1]]


def _round_in_place(product: Tensor, gradient: Tensor) -> None:
    """Copy the numbers of `product` to `gradient`, its `overlay` in a dtype of half the size."""
    vocab = product.shape[1]
    start, stop = 0, min(vocab, ROUNDED_FIRST)
    gradient[:, :stop] = product[:, :stop].to(gradient.dtype)
    # Columns [c, 2 c) of `gradient` lie over columns [c/2, c) of `product`, which have been copied already.
    while stop < vocab:
        start, stop = stop, min(2 * stop, vocab)
        gradient[:, start:stop] = product[:, start:stop]
