"""The kernels that a training step launches in each decoder layer do not become more."""

from __future__ import annotations

import launch_counts
import pytest
import torch

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize(("checkpointing", "launches", "nodes"), [(False, 144, 48), (True, 193, 49)])
def test_a_layer_launches_no_more_kernels_than_it_did(checkpointing, launches, nodes):
    counts = launch_counts.count_per_layer(method="qlora", gradient_checkpointing=checkpointing)
    assert counts.launches <= launches
    assert counts.nodes <= nodes


def test_pefts_own_layers_launch_half_as_many_kernels_more():
    ours, theirs = (launch_counts.count_per_layer(method="qlora", fused_lora=fused) for fused in (True, False))
    assert theirs.launches > 1.5 * ours.launches


def test_views_and_new_memory_are_free_and_one_kernel_counts_once():
    counter = launch_counts.LaunchCounter()
    two_products = counter.as_one_kernel("products", lambda x: x @ x @ x)
    with counter:
        x = torch.empty(4, 4)
        x.view(2, 8).t()[0].detach()
        two_products(x)
        x.mul_(2)
        x + x
    assert counter.launches == {"products": 1, "aten::mul_": 1, "aten::add": 1}


def test_it_prints_the_counts_by_operator(capsys):
    launch_counts.main(method="lora")
    printed = capsys.readouterr().out
    assert "gated_product_backward" in printed
    assert "nf4" not in printed
    assert "launches and 48 autograd nodes a layer" in printed
