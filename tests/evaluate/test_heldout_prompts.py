"""Which prompts are answered, and how much of an answer is reasoning."""

from __future__ import annotations

from datetime import date
from types import SimpleNamespace

import pytest

from saro.config import DataConfig, ModelConfig
from saro.evaluate.heldout_prompts import choose_prompts, count_reasoning_tokens
from saro.model.source import find_model

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize(
    ("text", "tokens"),
    [("<think>\nabc\n</think>\n\nx", 5), ("<think>abcd", 4), ("abc", 0), ("<think></think>x", 0), ("abc</think>x", 3)],
)
def test_reasoning_is_the_text_between_the_tags(tiny_model, text, tokens):
    chat = find_model(ModelConfig(name=tiny_model())).chat_format(DataConfig(), date.today())
    assert count_reasoning_tokens(text, chat) == tokens


def test_several_pairs_on_one_prompt_are_answered_once(pairs):
    records = [SimpleNamespace(prompt=r["prompt"], kind=r["kind"], id=r["id"]) for r in pairs[:8]]
    assert [r.id for r in choose_prompts(records, 4)] == ["p0", "p2", "p6", "p4"]
