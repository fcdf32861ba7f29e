"""Tests that one process can be a rank of many: it holds that rank's parts, and leaves no process group behind."""

from __future__ import annotations

import pytest
import torch
from tiny import tiny_config

from saro.config import ModelConfig
from saro.distributed.pretended import pretended_ranks
from saro.distributed.shard import local
from saro.model.fake_policy import MemoryMeter, make_policy
from saro.model.policy import Policy


def full_policy() -> Policy:
    return make_policy(
        tiny_config(hidden_size=128, vocab_size=2048),
        ModelConfig(method="full"),
        recomputed=0,
        dtype=torch.float32,
        attention="sdpa",
        head="tiled-torch",
    )


@pytest.mark.parametrize(("shard", "per_machine", "shares"), [("full", 2, 4), ("hybrid", 2, 2), ("none", 2, 1)])
def test_a_rank_holds_its_parts(shard, per_machine, shares):
    policy = full_policy()
    whole = sum(p.nbytes for p in policy.parameters())
    with pretended_ranks(shard, 4, per_machine) as mesh:
        if mesh is not None:
            policy.shard(mesh)
    assert sum(local(p).nbytes for p in policy.parameters()) == whole / shares
    assert not torch.distributed.is_initialized()


def test_sharding_gathers_nothing():
    """A rank never holds embedding and head in whole just to share them."""
    policy, meter = full_policy(), MemoryMeter()
    meter.ignore(policy.parameters())
    with pretended_ranks("full", 4, 8) as mesh, meter:
        policy.shard(mesh)
    parts = sum(local(p).nbytes for p in policy.parameters())
    assert parts <= meter.take_peak() < 1.1 * parts
