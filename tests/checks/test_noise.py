"""The noise that rounding and layout alone make."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from saro.checks.noise import LayoutNoise, fitting_trees, layout_noise, perturbed, shared_rows
from saro.data.packs import lay_out
from saro.data.tree import ScoredSequence, build_tree

pytestmark = pytest.mark.usefixtures("cache", "one_thread")


def test_the_noise_is_at_least_one_rounding_to_float32(world):
    _, policy, data = world(dtype="float32")
    noise = layout_noise(policy, [build_tree(data.sequences(0))], 256)
    assert len(noise.logps) == sum(len(s.row_kinds) for s in data.sequences(0))
    still = replace(noise, changes=np.zeros_like(noise.changes))
    rounding = np.finfo(np.float32).eps * np.abs(noise.logps)
    assert still.mean == pytest.approx(rounding.mean())
    assert still.most == pytest.approx(rounding.max())
    assert 0 < still.margin <= noise.margin
    assert still.mean <= noise.mean < noise.most


def test_trees_that_do_not_fit_into_one_pack_are_scored_in_several(world):
    _, policy, data = world()
    trees = [build_tree(data.sequences(i)) for i in range(4)]
    together = layout_noise(policy, trees, 1000)
    apart = layout_noise(policy, trees, trees[0].tokens)
    assert together.logps == pytest.approx(apart.logps, abs=1e-4)
    assert len(together.logps) == sum(len(s.row_kinds) for i in range(4) for s in data.sequences(i))


def test_the_first_trees_that_fit_into_a_pack_are_chosen(world):
    _, _, data = world()
    trees = [build_tree(data.sequences(i)) for i in range(4)]
    assert fitting_trees(trees, trees[0].tokens + trees[1].tokens) == trees[:2]
    assert fitting_trees(trees, 1) == trees[:1]


def test_the_noise_of_margins_adds_up_as_the_roots_of_rows_if_rows_are_independent():
    rng = np.random.default_rng(0)
    sequences = [ScoredSequence(rng.integers(0, 9, n).astype(np.int32), 1, np.zeros(n - 1), 0) for n in (400, 300) * 50]
    rows = sum(len(s.row_kinds) for s in sequences)
    changes = rng.normal(scale=[[0.1], [0.05]], size=(2, rows))
    noise = LayoutNoise(np.full(rows, -1.0), changes, tuple(sequences))
    assert noise.margin == pytest.approx(0.1, rel=0.2)


def test_errors_of_one_direction_show_in_the_noise_of_margins():
    rng = np.random.default_rng(0)
    sequences = [ScoredSequence(rng.integers(0, 9, 101).astype(np.int32), 1, np.zeros(100), 0) for _ in range(2)]
    changes = np.array([[0.01] * 100 + [-0.01] * 100, [0.0] * 200])
    noise = LayoutNoise(np.full(200, -1.0), changes, tuple(sequences))
    assert noise.margin == pytest.approx(0.01 * 200 / 200**0.5, rel=0.05)


def test_rows_that_both_sides_share_cancel_in_the_noise_of_margins():
    shared = np.arange(50, dtype=np.int32)
    sequences = [ScoredSequence(np.append(shared, last).astype(np.int32), 1, np.zeros(50), 0) for last in (1, 2)]
    changes = np.zeros((2, 100))
    changes[0, :49] = 5.0  # one layout of the chosen side, in shared rows only
    noise = LayoutNoise(np.full(100, -1.0), changes, tuple(sequences))
    assert shared_rows(sequences) == 49
    assert noise.margin == pytest.approx(np.sqrt((changes[0] ** 2).mean()))  # as independent rows, not as a sum


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_perturbed_layers_change_log_probs_by_about_a_rounding(world, dtype):
    _, policy, data = world(dtype=dtype)
    pack = lay_out([build_tree(data.sequences(0))])
    state = torch.get_rng_state()
    with torch.no_grad():
        before = policy(pack)
        with perturbed(policy):
            changed, again = policy(pack), policy(pack)
        after = policy(pack)
    eps = torch.finfo(policy.compute_dtype).eps
    assert torch.equal(before, after)
    assert torch.equal(changed, again)
    assert torch.equal(torch.get_rng_state(), state)  # its generator is its own
    assert 0 < (changed - before).abs().mean() < 100 * eps * before.abs().mean()


def test_the_perturbation_ends_with_an_exception(world):
    _, policy, data = world()
    pack = lay_out([build_tree(data.sequences(0))])
    before = policy(pack)
    with pytest.raises(TypeError), perturbed(policy):
        policy(pack, "too", "many", "arguments")
    assert torch.equal(policy(pack), before)
