"""Answers of the model before and after training, and the tables that compare them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from rich.markup import escape
from rich.table import Table
from transformers import GenerationConfig

from saro.data.chat_format import ChatFormat
from saro.data.records import KINDS, PAIR_KINDS, Record
from saro.model.attention import native_attention
from saro.model.policy import Policy


def choose_prompts(examples: Sequence[Record], number: int) -> list[Record]:
    """The first records, taking their kinds in turn; of several on one prompt the first."""
    first: dict[object, Record] = {}
    for example in examples:
        first.setdefault(example.prompt, example)
    by_kind = [[e for e in first.values() if e.kind == kind] for kind in KINDS + PAIR_KINDS]
    in_turn = [group[i] for i in range(len(examples)) for group in by_kind if i < len(group)]
    return in_turn[:number]


@torch.no_grad()
def answer(policy: Policy, chat: ChatFormat, examples: Sequence[Record], max_tokens: int) -> list[str]:
    """Greedy answers of at most ``max_tokens`` tokens to the examples' prompts, in one batch."""
    if not examples:
        return []
    prompts = [chat.prompt_ids(e.prompt) for e in examples]
    longest = max(map(len, prompts))
    pad = min(chat.stop_ids)
    lm = policy.causal_lm
    ids = torch.tensor([[pad] * (longest - len(p)) + p for p in prompts], device=lm.device)
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=lm.device)
    was_training = policy.training
    policy.eval()
    with native_attention(lm), policy.precision():
        output = lm.generate(
            input_ids=ids,
            attention_mask=mask,
            generation_config=GenerationConfig(
                max_new_tokens=max_tokens, do_sample=False, pad_token_id=pad, eos_token_id=sorted(chat.stop_ids)
            ),
        )
    policy.train(was_training)
    return [chat.tokenizer.decode(row, skip_special_tokens=True) for row in output[:, longest:]]


# What the table of stage 1 shows of held-out tokens, with the names and formats there.
_TOKENS = {"loss": ("loss, nats", ".3f"), "entropy": ("entropy, nats", ".3f"), "mean_token_accuracy": ("top-1", ".1%")}


def token_table(before: dict[str, float], after: dict[str, float]) -> Table:
    """Means over held-out tokens before and after training."""
    table = Table(title="Held-out tokens, before → after", title_justify="left")
    table.add_column("tokens")
    for label, _ in _TOKENS.values():
        table.add_column(label, justify="right")
    for of in (name.removeprefix("eval/loss") for name in before if name.startswith("eval/loss")):
        cells = [
            f"{before[f'eval/{name}{of}']:{form}} → {after[f'eval/{name}{of}']:{form}}"
            for name, (_, form) in _TOKENS.items()
        ]
        table.add_row(of.removeprefix("/") or "all", *cells)
    return table


# What the table of stage 2 shows, with their names there.
_PREFERENCE = {
    "loss": "loss",
    "rewards/accuracies": "accuracy: share of pairs with a margin above 0",
    "rewards/margins": "reward margin",
    "logps/chosen": "log-prob of the chosen response, nats",
    "logps/rejected": "log-prob of the rejected response, nats",
    "entropy/chosen": "entropy in the chosen response, nats per token",
    "mean_token_accuracy/chosen": "top-1 accuracy in the chosen response",
    "chosen_fell": "share of pairs whose chosen log-prob fell",
}


def preference_table(before: dict[str, float], after: dict[str, float]) -> Table:
    """Held-out preference metrics before and after training."""
    table = Table(title="Held-out pairs", title_justify="left")
    table.add_column("metric")
    for column in ("before", "after"):
        table.add_column(column, justify="right")
    for name, label in _PREFERENCE.items():
        if (value := before.get(f"eval/{name}")) is not None:
            # At its own reference a model has margins of rounding alone, and their signs tell nothing.
            at_reference = name == "rewards/accuracies" and abs(before["eval/rewards/margins"]) < 1e-3
            table.add_row(label, "-" if at_reference else f"{value:.3f}", f"{after[f'eval/{name}']:.3f}")
    return table


def answer_table(before: Sequence[str], after: Sequence[str], examples: Sequence[Record], show_prompts: bool) -> Table:
    """Answers to held-out prompts before and after training. Prompts are named by id unless ``show_prompts``."""
    table = Table(title="Answers to held-out prompts", title_justify="left", show_lines=True)
    for column, ratio in (("prompt", 1), ("before", 2), ("after", 2)):
        table.add_column(column, ratio=ratio)
    # A resumed run may ask for another number of samples; the first ones are the same.
    for example, old, new in zip(examples, before, after, strict=False):
        label = f"[bold]{escape(example.id)}[/bold]"
        if show_prompts:
            prompt = example.prompt if isinstance(example.prompt, str) else example.prompt[-1].content
            label += f"\n{escape(prompt)}"
        table.add_row(label, escape(old.strip()), escape(new.strip()))
    return table
