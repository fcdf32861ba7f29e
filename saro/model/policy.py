"""The policy: a causal LM as a function from a pack to the log-probs of its scored rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any
from weakref import WeakSet

import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

from saro.data.packs import Pack
from saro.distributed.shard import DeviceMesh, gathered, is_sharded, local, shard_module
from saro.errors import SaroError
from saro.model.architectures import decoder_layers, is_mixture, logit_options, token_limits
from saro.model.attention import AttentionPlan, use_packed_attention
from saro.model.fused_lora import cast_adapters, lora_layers
from saro.model.liger import uses_liger
from saro.model.recompute import count_recomputed, recomputable_layers
from saro_kernels import TokenStatistics, token_logps, token_statistics
from saro_kernels.float32_products import add_product, precise_products


class Policy(nn.Module):
    """The trained model. Only scored rows reach the LM head; nothing of size tokens x vocabulary is allocated.

    Args:
        model: a transformers causal LM, or a PEFT model around one.
        attention: "sdpa", "varlen", or ``EITHER`` of them for each pack.
        head: implementation of ``token_logps``, by name.
        autocast: dtype of the products if the parameters are fp32 master weights; else None.
        recomputes_as_needed: all layers are recomputed only until training says how many must be.

    Raises:
        ValueError: the adapter puts virtual tokens before each sequence (prompt learning), where packs have no room.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        attention: str = "sdpa",
        head: str = "auto",
        autocast: torch.dtype | None = None,
        recomputes_as_needed: bool = False,
    ) -> None:
        super().__init__()
        adapters = model.peft_config.values() if isinstance(model, PeftModel) else ()
        if any(adapter.is_prompt_learning for adapter in adapters):
            raise ValueError("prompt-learning adapters put tokens before each sequence, which packs cannot; use LoRA")
        self.model = model
        self.attention = attention
        self.head = head
        self.autocast = autocast
        self.recomputes_as_needed = recomputes_as_needed
        self.logits = logit_options(self.causal_lm.config)
        self.limits = token_limits(self.causal_lm.config)
        # Weak references, because ``merge`` replaces the layers one by one to free their memory.
        self._lora_layers = WeakSet(lora_layers(model))
        use_packed_attention(self.causal_lm)

    @property
    def causal_lm(self) -> PreTrainedModel:
        """The transformers model, without PEFT's wrapper."""
        return self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model

    @property
    def compute_dtype(self) -> torch.dtype:
        """The dtype in which the model's products are computed."""
        return self.causal_lm.dtype if self.autocast is None else self.autocast

    def forward(self, pack: Pack, isolated: bool = True, gradient_rows: int | None = None) -> torch.Tensor:
        """Return the log-probs of the pack's rows: (R,), nats, float32.

        Args:
            isolated: False lets sequences see each other. Only the start-up check does that, as its control.
            gradient_rows: only this many rows, the first ones, get a gradient; default all. The others cost the LM head
                one product instead of two or more.

        Raises:
            SaroError: a sequence is longer than the model's rotary embedding allows in a pack.
        """
        hidden = self._hidden_states(pack, isolated)
        stop = pack.rows if gradient_rows is None else gradient_rows
        logps = token_logps(**self._head_inputs(hidden, pack, slice(stop)))
        if stop == pack.rows:
            return logps
        with torch.no_grad():
            others = token_logps(**self._head_inputs(hidden, pack, slice(stop, None)))
        return torch.cat([logps, others])

    @torch.no_grad()
    def statistics(self, pack: Pack) -> TokenStatistics:
        """Return the log-probs of ``forward`` with each row's entropy and top-1 accuracy; see ``TokenStatistics``."""
        hidden = self._hidden_states(pack, isolated=True)
        return token_statistics(**self._head_inputs(hidden, pack, slice(None)))

    @torch.no_grad()
    def next_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return the logits of the decoder's hidden states (R, D): (R, V), summed and written in float32.

        Rounded to bfloat16, the logits of the likeliest tokens are often equal.
        """
        head = self.causal_lm.get_output_embeddings()
        rows = hidden if self.autocast is None else hidden.to(self.autocast)
        weight = head.weight.to(rows.dtype)
        logits = torch.empty(len(rows), len(weight), device=rows.device)
        with precise_products(rows.device, rows.dtype):
            add_product(logits, rows, weight.t(), beta=0)
        if head.bias is not None:
            logits += head.bias
        scale, softcap = self.logits
        logits *= scale
        return logits if softcap is None else softcap * torch.tanh(logits / softcap)

    def _hidden_states(self, pack: Pack, isolated: bool) -> torch.Tensor:
        """Run the decoder and return the last hidden states of the pack's tokens, (T, D)."""
        plan = AttentionPlan.of(pack, self.attention, isolated)
        longest = self.limits.longest
        if isolated and longest is not None and plan.longest > longest:
            raise SaroError(
                f"a sequence has {plan.longest:,} tokens, and beyond {longest:,} {self.limits.beyond}; leave it out"
            )
        # Sharded adapters are gathered layer by layer: each layer casts its own.
        layers = () if is_sharded(self) else self._lora_layers
        with self.precision(), cast_adapters(layers, self.compute_dtype):
            output = self.causal_lm.get_decoder()(
                input_ids=pack.input_ids[None],
                position_ids=pack.position_ids[None],
                use_cache=False,
                plan=plan,
            )
        return output.last_hidden_state[0]

    def _head_inputs(self, hidden: torch.Tensor, pack: Pack, part: slice) -> dict[str, Any]:
        """Return the arguments of ``token_logps`` for a part of the pack's rows: their hidden states, targets and head."""
        # index_select, because on a CPU the backward of advanced indexing with repeated indices is slow and not reproducible.
        rows = hidden.index_select(0, pack.row_hidden[part])  # (n, D)
        if self.autocast is not None:
            rows = rows.to(self.autocast)
        head = self.causal_lm.get_output_embeddings()
        return {
            "hidden": rows,
            "weight": head.weight,
            "targets": pack.row_target[part],
            "bias": head.bias,
            "scale": self.logits.scale,
            "softcap": self.logits.softcap,
            "impl": self.head,
        }

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Put the model into eval mode, and restore its mode at the end."""
        was_training = self.training
        self.eval()
        try:
            yield
        finally:
            self.train(was_training)

    def precision(self) -> torch.autocast:
        """Return the context in which the model's products are computed in ``compute_dtype``."""
        device = self.causal_lm.device.type
        # Without the cache of casts: each weight is used once, and the cache would hold the casts of all layers to the end of the
        # forward, even of layers that are recomputed and of weights that were gathered from other ranks for a moment.
        return torch.autocast(device, self.autocast, enabled=self.autocast is not None, cache_enabled=False)

    def trainable(self) -> dict[str, nn.Parameter]:
        """Return the trainable parameters by name, tied ones once."""
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    def trainable_parts(self) -> dict[str, torch.Tensor]:
        """Return this rank's part of each trainable parameter by name: all of it, if the ranks do not share weights."""
        return {name: local(p.detach()) for name, p in self.trainable().items()}

    def shard(self, mesh: DeviceMesh, fill: Callable[[nn.Module], None] | None = None) -> None:
        """Share the weights among ranks. From then on all of them must make the same number of forwards.

        ``fill``: reads the weights of a part of a model that has none yet, see ``Skeleton``.
        """
        shard_module(self, decoder_layers(self.causal_lm), mesh, ("statistics", "next_logits"), fill)

    def gathered(self, part: nn.Module) -> AbstractContextManager[None]:
        """Return a context in which a part of the model can run, and be read, outside ``forward``; see ``shard.gathered``."""
        return gathered(self, part)

    def summary(self) -> str:
        """Return a line with the numbers of trainable and of all parameters, and the attention, head and layers that run."""
        total = trainable = 0
        # A 4-bit weight is packed: it holds more numbers than it has elements.
        packed = {
            id(m.weight): m.quant_state.shape
            for m in self.model.modules()
            if getattr(m, "quant_state", None) is not None
        }
        for parameter in self.model.parameters():
            size = packed.get(id(parameter), parameter.shape).numel()
            total += size
            trainable += size if parameter.requires_grad else 0
        layers = ", layers of liger-kernel" if uses_liger(self.model) else ""
        if is_mixture(self.causal_lm.config):
            layers += ", experts and router frozen and without their auxiliary loss"
        recomputed = count_recomputed(self.causal_lm)
        if recomputed and not self.recomputes_as_needed:
            layers += f", {recomputed} of {len(recomputable_layers(self.causal_lm))} layers recomputed"
        return f"{trainable:,} of {total:,} parameters trainable, attention {self.attention}, head {self.head}{layers}"
