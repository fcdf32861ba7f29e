"""Policy: a causal LM as a function from a pack to the log-probs of its scored rows."""

from __future__ import annotations

from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

from saro.data.packs import Pack
from saro.model.attention import AttentionPlan, use_packed_attention
from saro.model.logits import logit_options
from saro_kernels import TokenStatistics, token_logps, token_statistics


class Policy(nn.Module):
    """The trained model. Only scored rows reach the LM head; nothing of size tokens x vocabulary is allocated.

    Args:
        model: a transformers causal LM, or a PEFT model around one.
        attention: "sdpa" or "varlen".
        head: implementation of ``token_logps``, by name.
        autocast: dtype of the products where parameters are fp32 masters of a lower-precision model; None without.

    Raises:
        ValueError: for an adapter of virtual tokens (prompt learning), which a pack has no place for.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        attention: str = "sdpa",
        head: str = "auto",
        autocast: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        adapters = model.peft_config.values() if isinstance(model, PeftModel) else ()
        if any(adapter.is_prompt_learning for adapter in adapters):
            raise ValueError("prompt-learning adapters put tokens before each sequence, which packs cannot; use LoRA")
        self.model = model
        self.attention = attention
        self.head = head
        self.autocast = autocast
        self.logits = logit_options(self.causal_lm.config)
        use_packed_attention(self.causal_lm)

    @property
    def causal_lm(self) -> PreTrainedModel:
        """The transformers model, inside PEFT's wrapper where there is one."""
        return self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model

    def forward(self, pack: Pack, isolated: bool = True) -> torch.Tensor:
        """Log-probs of the pack's rows: (R,), nats, float32.

        ``isolated=False`` lets sequences see each other: the control of the start-up check, never for training.
        """
        return token_logps(**self._head_inputs(pack, isolated))

    @torch.no_grad()
    def statistics(self, pack: Pack) -> TokenStatistics:
        """The same log-probs with the entropy of each row's distribution, and whether its target is the likeliest."""
        return token_statistics(**self._head_inputs(pack, isolated=True))

    def _head_inputs(self, pack: Pack, isolated: bool) -> dict[str, Any]:
        """Arguments of ``token_logps``: the hidden states of the pack's rows, their targets, and the head."""
        plan = AttentionPlan.of(pack, self.attention, isolated)
        lm = self.causal_lm
        with self.precision():
            hidden = lm.get_decoder()(
                input_ids=pack.input_ids[None],
                position_ids=pack.position_ids[None],
                use_cache=False,
                plan=plan,
            ).last_hidden_state[0]
        # index_select: the backward of advanced indexing with repeated indices is neither fast nor reproducible.
        rows = hidden.index_select(0, pack.row_hidden)
        if self.autocast is not None:
            rows = rows.to(self.autocast)
        head = lm.get_output_embeddings()
        return {
            "hidden": rows,
            "weight": head.weight,
            "targets": pack.row_target,
            "bias": head.bias,
            **self.logits._asdict(),
            "impl": self.head,
        }

    def precision(self) -> torch.autocast:
        """The context in which the model's products are computed."""
        device = self.causal_lm.device.type
        return torch.autocast(device, self.autocast, enabled=self.autocast is not None)

    def trainable(self) -> dict[str, nn.Parameter]:
        """Trainable parameters by name, tied ones once."""
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    def summary(self) -> str:
        """For people: parameters, trainable of all, 4-bit weights as what they stand for; which attention and head run."""
        sizes = [
            (p.quant_state.shape.numel() if getattr(p, "quant_state", None) is not None else p.numel(), p.requires_grad)
            for p in self.model.parameters()
        ]
        trainable, total = sum(n for n, grad in sizes if grad), sum(n for n, _ in sizes)
        return f"{trainable:,} of {total:,} parameters trainable, attention {self.attention}, head {self.head}"
