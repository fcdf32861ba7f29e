"""Tests of the comparison with TRL: the generated records, the checks, and the figures computed from rounds."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace

import numpy as np
import peers
import pytest
import torch
from peers_data import CHOSEN, PROMPT, REJECTED, SHARED, InOrder, Result, generate_pairs, unshared

from saro.data.packs import lay_out
from saro.errors import SaroError

VOCABULARY, STOP = 5000, 2
RESULT = Result(
    seconds=[1.0, 1.0],
    records=8,
    tokens=6000,
    read_tokens=5000,
    first={"loss": 2.0},
    loaded_gib=1.0,
    peak_gib=3.0,
    reference_seconds=4.0,
)


@pytest.fixture(scope="module")
def pairs():
    return generate_pairs(2000, VOCABULARY, STOP, seed=0)


@pytest.mark.parametrize("part", [PROMPT, SHARED, CHOSEN, REJECTED], ids=["prompt", "shared", "chosen", "rejected"])
def test_lengths_are_log_normal_with_a_median_and_a_limit(part):
    lengths = part.lengths(20_000, np.random.default_rng(0))
    assert np.median(lengths) == pytest.approx(part.median, rel=0.03)
    assert lengths.min() >= 1
    assert lengths.max() == part.most
    # The lower half of a normal distribution: its root mean square about the median is the standard deviation.
    below = np.log(lengths[lengths < part.median])
    assert np.sqrt(np.square(below - np.log(part.median)).mean()) == pytest.approx(part.sigma, rel=0.05)


def test_sides_of_a_generated_pair_share_prompt_and_reasoning_and_end_with_the_stop_token(pairs):
    for record in range(50):
        chosen, rejected = pairs.sequences(record)
        shared = chosen.scored_from + int(pairs.chosen.think_tokens[record])
        assert np.array_equal(chosen.tokens[:shared], rejected.tokens[:shared])
        assert chosen.scored_from == rejected.scored_from
        assert chosen.tokens[-1] == rejected.tokens[-1] == STOP


def test_the_same_seed_generates_the_same_pairs():
    first, second, other = (generate_pairs(4, VOCABULARY, STOP, seed) for seed in (3, 3, 4))
    assert np.array_equal(first.chosen.tokens, second.chosen.tokens)
    assert not np.array_equal(first.chosen.tokens, other.chosen.tokens)


def test_without_sharing_both_sides_are_read_completely_and_scored_the_same(pairs):
    pair = pairs.sequences(0)
    (shared,), separate = pairs.trees([0], 4096), unshared(pair)
    assert separate.tokens == sum(len(side.tokens) - 1 for side in pair)
    assert shared.tokens < separate.tokens
    packs = lay_out([shared]), lay_out([separate])
    assert torch.equal(*(pack.row_target[pack.entry_row] for pack in packs))
    assert torch.equal(*(pack.entry_sequence for pack in packs))


def test_steps_take_the_records_in_order_in_every_epoch():
    schedule = InOrder(12, 4)
    assert [schedule.records(step).tolist() for step in (0, 2, 3)] == [[0, 1, 2, 3], [8, 9, 10, 11], [0, 1, 2, 3]]


def test_sides_with_equal_first_metrics_pass():
    near = replace(RESULT, first={"loss": 2.00001})
    peers.check_same("rw", {"saro": [near, near], "trl, packed": [RESULT, RESULT]})


@pytest.mark.parametrize("change", [{"first": {"loss": 2.001}}, {"tokens": 6001}, {"first": {"loss": float("nan")}}])
def test_sides_with_other_first_metrics_or_tokens_are_an_error(change):
    with pytest.raises(SaroError, match="they do not train on the same data or model"):
        peers.check_same("rw", {"saro": [RESULT, replace(RESULT, **change)], "trl, packed": [RESULT, RESULT]})


def test_ratios_are_medians_of_the_ratios_within_each_round():
    """A slow second round slows both sides and does not change the ratio."""
    slow = replace(RESULT, seconds=[8.0, 8.0])
    fast = [replace(r, seconds=[s / 2 for s in r.seconds], peak_gib=2.0) for r in (RESULT, slow, RESULT)]
    figures = peers.summary("rw", {"saro": fast, "trl, packed": [RESULT, slow, RESULT]})
    assert figures["saro"]["records_per_second"] == 8.0
    assert figures["saro"]["records_per_second_ratio"] == 2.0
    assert figures["saro"]["above_load_gib_ratio"] == 0.5
    assert figures["trl, packed"]["records_per_second_ratio"] == 1.0


def test_a_task_without_reference_has_no_reference_seconds():
    rounds = [replace(RESULT, reference_seconds=None)]
    figures = peers.summary("rw", {"saro": rounds, "trl, packed": rounds})
    assert figures["saro"]["reference_seconds"] is None
    assert figures["saro"]["reference_seconds_ratio"] is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--pairs", "12"], "--pairs is 12; rw needs a multiple of 8"),
        (["--rounds", "0"], "--rounds is 0; it must be at least 1"),
        (["--data", "x.jsonl"], "name only the --task that it is for"),
    ],
)
def test_invalid_options_are_an_error(arguments, message):
    with pytest.raises(SaroError, match=message):
        peers.parse(arguments)


@pytest.mark.trl
def test_a_trl_batch_with_another_token_or_another_mask_is_an_error(pairs):
    pytest.importorskip("trl", reason="TRL is not installed: pip install -c constraints.txt -e '.[bench]'")
    from peers_trl import check_batch, pair_rows
    from trl.trainer.dpo_trainer import DataCollatorForPreference

    batch = DataCollatorForPreference(pad_token_id=0)(list(pair_rows(pairs, 2)))
    records = np.arange(2)
    check_batch(batch, pairs, records)
    for name in ("input_ids", "completion_mask"):
        changed = torch.where(torch.arange(batch[name].shape[1]) == 7, 1 - batch[name], batch[name])
        with pytest.raises(ValueError, match="other tokens than we do"):
            check_batch(batch | {name: changed}, pairs, records)


@pytest.mark.trl
def test_every_side_of_both_tasks_is_measured_on_the_same_records(tiny_model, tmp_path, environment):
    pytest.importorskip("trl", reason="TRL is not installed: pip install -c constraints.txt -e '.[bench]'")
    file = tmp_path / "figures.json"
    small = ["--steps", "1", "--warmup", "1", "--rounds", "1", "--pairs", "8", "--threads", "1"]
    command = [sys.executable, peers.__file__, *small, "--model", tiny_model(), "--json", str(file)]
    process = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr
    tasks = json.loads(file.read_text())["tasks"]
    for task, sides in peers.SIDES.items():
        assert set(tasks[task]["figures"]) == set(sides)
    shares = {side: values["read_share"] for side, values in tasks["srpo"]["figures"].items()}
    assert shares["saro"] < shares["saro, no sharing"] < 1 < shares["trl, one by one"] < shares["trl"]
