"""The noise that rounding and layout alone make."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from saro.checks.noise import layout_noise, perturbed
from saro.data.packs import lay_out
from saro.data.tree import build_tree

pytestmark = pytest.mark.usefixtures("cache", "one_thread")


def test_the_noise_is_at_least_one_rounding(world):
    _, policy, data = world()
    logps, noise = layout_noise(policy, [build_tree(data.sequences(0))], 256)
    assert len(logps) == sum(len(s.row_kinds) for s in data.sequences(0))
    assert noise.mean == pytest.approx(torch.finfo(torch.float32).eps * np.abs(logps).mean(), rel=1e-5)
    assert noise.most >= noise.mean


def test_the_noise_is_measured_on_trees_that_fit_into_one_pack(world):
    _, policy, data = world()
    trees = [build_tree(data.sequences(i)) for i in range(4)]
    logps, _ = layout_noise(policy, trees, trees[0].tokens + trees[1].tokens)
    assert len(logps) == sum(len(s.row_kinds) for i in (0, 1) for s in data.sequences(i))
    assert len(layout_noise(policy, trees, 1)[0]) == sum(len(s.row_kinds) for s in data.sequences(0))


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
