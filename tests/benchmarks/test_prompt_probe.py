"""Tests of the probe that asks which prompts teach the difference between harmful and harmless ones."""

from __future__ import annotations

import prompt_probe
import pytest
import torch


def features(rows: int, shift: float, seed: int) -> torch.Tensor:
    """Return (rows, 6) random features, whose first one is shifted."""
    made = torch.randn(rows, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    made[:, 0] += shift
    return made


def test_a_probe_orders_prompts_it_has_not_seen_along_the_direction_that_it_was_taught():
    probe = prompt_probe.train_probe(features(80, 4.0, 0), features(80, 0.0, 1), penalty=1e-2)
    harmful, harmless = probe.score(features(80, 4.0, 2)), probe.score(features(80, 0.0, 3))
    assert prompt_probe.auc(harmful, harmless) > 0.98
    assert (harmful > 0).double().mean() > 0.9
    assert (harmless > 0).double().mean() < 0.1


def test_how_many_prompts_a_kind_has_does_not_move_the_threshold():
    harmful, harmless, new = features(40, 1.0, 0), features(40, 0.0, 1), features(50, 0.5, 2)
    once = prompt_probe.train_probe(harmful, harmless, penalty=1e-2)
    often = prompt_probe.train_probe(harmful.repeat(5, 1), harmless, penalty=1e-2)
    assert ((often.score(new) > 0) == (once.score(new) > 0)).double().mean() > 0.9


@pytest.mark.parametrize(
    ("harmful", "harmless", "expected"),
    [([2.0, 3.0], [0.0, 1.0], 1.0), ([0.0], [1.0], 0.0), ([1.0, 1.0], [1.0], 0.5), ([0.0, 2.0], [1.0], 0.5)],
)
def test_auc_is_the_share_of_pairs_in_order(harmful, harmless, expected):
    assert prompt_probe.auc(torch.tensor(harmful), torch.tensor(harmless)) == expected


def test_the_command_says_how_a_runs_model_orders_the_prompts_of_a_suite(finished_run, capsys):
    prompt_probe.main(run=str(finished_run()), train=["demo"], test="demo", limit=8)
    line = " ".join(capsys.readouterr().out.split())
    assert line.startswith("demo (8 + 8 prompts) → demo (60 + 60): AUC 0.")
