"""check_data checks every set of a run."""

from __future__ import annotations

from dataclasses import replace

import pytest
from sets import by_hand

from saro.checks import check_data as module
from saro.checks.check_data import check_data
from saro.errors import SaroError
from saro.model.architectures import TokenLimits


@pytest.fixture
def masks(monkeypatch) -> list[tuple]:
    """Return the list of calls of ``check_masks``."""
    calls: list[tuple] = []
    monkeypatch.setattr(module, "check_masks", lambda *arguments: calls.append(arguments))
    return calls


def other_prompts():
    train = by_hand()
    return replace(train, tokens=train.tokens + 1)


def test_every_set_is_compared_with_its_own_records(masks):
    sets = {"train": by_hand(), "heldout": other_prompts()}
    limits = TokenLimits(264)
    check_data(sets, {"train": ["a"], "heldout": ["b"]}, None, limits, allow_overlap=False)
    assert masks == [(sets["train"], None, ["a"], limits), (sets["heldout"], None, ["b"], limits)]


def test_a_held_out_prompt_that_is_trained_on_is_refused_unless_allowed(masks):
    data = by_hand(where=("f:1", "f:2", "f:3", "f:4", "f:5"))
    sets = {"train": data, "heldout": data}
    records = {"train": [], "heldout": []}
    with pytest.raises(SaroError, match=r"5 of 5 held-out records have the prompt of a training record"):
        check_data(sets, records, None, TokenLimits(264), allow_overlap=False)
    check_data(sets, records, None, TokenLimits(264), allow_overlap=True)


def test_without_held_out_records_only_the_training_set_is_checked(masks):
    check_data({"train": by_hand()}, {"train": ["a"], "heldout": []}, None, TokenLimits(264), allow_overlap=False)
    assert len(masks) == 1
