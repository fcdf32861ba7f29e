"""Tests of the benchmark of the loss kernels: all sides compute the same, and it writes figures and a plot."""

from __future__ import annotations

import json

import loss_kernels
import pytest
import torch
from loss_kernels_sides import HEADS, PASSES, SIDES, SMOKE, Case, why_unavailable

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
AVAILABLE = [side for side in SIDES if why_unavailable(side, CPU, torch.float32) is None]

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def case():
    return Case.of(SMOKE["smoke"], 16, CPU, torch.float32)


@pytest.mark.parametrize("pass_name", PASSES)
@pytest.mark.parametrize("side", [side for side in AVAILABLE if side != "TRL"])
def test_every_side_computes_the_same_sum(case, side, pass_name):
    want = (case.hidden @ case.weight.T).log_softmax(1).gather(1, case.targets[:, None]).sum()
    torch.testing.assert_close(case.run(side, pass_name), want.detach())
    assert case.hidden.grad is None
    assert case.weight.grad is None


@pytest.mark.trl
def test_trl_computes_the_same_sum(case):
    pytest.importorskip("trl")
    torch.testing.assert_close(case.run("TRL", "trainable"), case.run("saro, torch tiles", "trainable"))


def test_a_side_with_another_sum_is_an_error(case, monkeypatch):
    monkeypatch.setitem(SIDES, "log_softmax", lambda hidden, weight, targets: hidden.sum() * 1.0)
    with pytest.raises(
        SystemExit, match=r"log_softmax sums to .*, saro, torch tiles to .*: they do not compute the same"
    ):
        loss_kernels.check_same(case, ["saro, torch tiles", "log_softmax"])


def test_floor_bytes_are_log_probs_and_gradients(case):
    n, d, v = 16, SMOKE["smoke"].width, SMOKE["smoke"].vocab
    assert [case.floor_bytes(pass_name) for pass_name in PASSES] == [4 * n, 4 * (n + n * d), 4 * (n + n * d + v * d)]


@pytest.mark.parametrize("side", ["Liger", "cut cross-entropy"])
def test_cuda_sides_are_left_out_on_a_cpu_with_a_reason(side):
    assert why_unavailable(side, CPU, torch.float32) == "it runs on CUDA only"


@pytest.mark.parametrize("side", ["TRL", "Liger", "cut cross-entropy"])
def test_sides_without_their_package_are_left_out_with_a_reason(monkeypatch, side):
    monkeypatch.setattr("loss_kernels_sides.find_spec", lambda name: None)
    assert "is not installed; pip install" in why_unavailable(side, CUDA, torch.bfloat16)


def test_the_peak_of_a_pass_is_that_of_its_logits():
    """log_softmax holds two N x V tensors, this project's kernel one tile."""
    head = HEADS["SmolLM2-135M"]
    rows = 1024
    plain, ours = (
        loss_kernels.peak_bytes(side, "scoring", head, Case.of(SMOKE["smoke"], rows, CPU, torch.float32), threads=1)
        for side in ("log_softmax", "saro, torch tiles")
    )
    logits = 4 * rows * head.vocab
    if plain is None:
        pytest.skip("this system does not report the peak of resident memory")
    assert 1.9 * logits < plain < 2.5 * logits
    assert 0.4 * logits < ours < 0.8 * logits


def test_a_smoke_run_writes_figures(tmp_path, capsys):
    figures = tmp_path / "figures.json"
    arguments = ["--smoke", "--sides", "saro, torch tiles", "Liger", "--passes", "frozen", "--threads", "1"]
    loss_kernels.main([*arguments, "--json", str(figures)])
    assert "Liger is left out: it runs on CUDA only" in capsys.readouterr().out
    entry = json.loads(figures.read_text())["heads"]["smoke"]
    (result,) = entry["results"]
    assert (result["side"], result["pass"]) == ("saro, torch tiles", "frozen")
    assert result["seconds"] > 0
    assert result["share_of_gemm_rate"] > 0


def test_the_plot_leaves_gaps_for_sides_that_did_not_run(tmp_path):
    pytest.importorskip("matplotlib", reason="the extra bench brings matplotlib")
    figures = {"pass": "frozen", "share_of_gemm_rate": 0.5, "peak_bytes": 2**20}
    heads = {
        "one": {"sides": ["saro, torch tiles", "TRL"], "results": [{"side": "TRL", **figures}]},
        "two": {
            "sides": ["saro, torch tiles"],
            "results": [{"side": "saro, torch tiles", **figures, "peak_bytes": None}],
        },
    }
    loss_kernels.plot(heads, str(tmp_path / "plot.png"))
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_a_plot_needs_matplotlib(monkeypatch, capsys):
    monkeypatch.setattr(loss_kernels, "find_spec", lambda name: None)
    with pytest.raises(SystemExit):
        loss_kernels.parse(["--plot", "plot.png"])
    assert "--plot needs matplotlib; pip install -e '.[bench]'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rounds", "0"], "--rounds is 0; it must be at least 1"),
        (["--rows", "0"], "--rows is 0; it must be at least 1"),
        (["--warmup", "-1"], "--warmup is -1; it must be at least 0"),
        (["--heads", "Llama"], "invalid choice: 'Llama'"),
    ],
)
def test_invalid_options_are_an_error(arguments, message, capsys):
    with pytest.raises(SystemExit):
        loss_kernels.parse(arguments)
    assert message in capsys.readouterr().err
