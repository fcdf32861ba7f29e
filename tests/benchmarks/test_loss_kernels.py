"""Tests of the benchmark of the loss kernels: all sides compute the same, and it writes figures and a plot."""

from __future__ import annotations

import json
import re

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


def test_the_defined_sum_adds_the_log_probs_of_all_rows():
    case = Case.of(SMOKE["smoke"], 600, CPU, torch.float32)
    want = (case.hidden @ case.weight.T).log_softmax(1).gather(1, case.targets[:, None]).sum()
    assert case.defined_sum() == pytest.approx(want.item(), rel=1e-6)


def smoke_results(file, *sides, passes=("frozen", "trainable")):
    """Return the exit code of a smoke run, and its results as {(side, pass): result}."""
    arguments = ["--smoke", "--sides", *sides, "--passes", *passes, "--threads", "1", "--json", str(file)]
    code = loss_kernels.main(arguments)
    results = json.loads(file.read_text())["heads"]["smoke"]["results"]
    return code, {(result["side"], result["pass"]): result for result in results}


def test_a_side_with_another_sum_is_left_out_and_the_exit_code_is_1(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(SIDES, "log_softmax", lambda hidden, weight, targets: hidden.sum() * 1.0)
    # Also if it is the first side: each is compared with the definition.
    code, results = smoke_results(tmp_path / "figures.json", "log_softmax", "cross_entropy")
    assert code == 1
    message = r"DifferentSum: it sums to \S+, the definition to -\S+: they do not compute the same"
    for pass_name in ("frozen", "trainable"):
        assert re.fullmatch(message, results["log_softmax", pass_name]["error"])
        assert results["cross_entropy", pass_name]["seconds"] > 0
    assert "log_softmax, frozen: DifferentSum: it sums to" in capsys.readouterr().out


def fail_in_backward(exception):
    """Return a side that is right, but raises as soon as its gradient is computed."""

    def side(hidden, weight, targets):
        total = SIDES["cross_entropy"](hidden, weight, targets)
        if weight.requires_grad:
            total.register_hook(lambda gradient: raise_(exception))
        return total

    return side


def raise_(exception):
    raise exception


@pytest.mark.parametrize(
    "exception", [ValueError("no such kernel\nmore"), torch.OutOfMemoryError("CUDA out of memory\nmore")]
)
def test_a_failing_side_loses_no_result_of_others_nor_of_its_other_passes(tmp_path, monkeypatch, exception):
    monkeypatch.setitem(SIDES, "log_softmax", fail_in_backward(exception))
    code, results = smoke_results(tmp_path / "figures.json", "log_softmax", "cross_entropy")
    assert code == 0
    line = f"{type(exception).__name__}: {str(exception).splitlines()[0]}"
    assert results["log_softmax", "trainable"] == {"side": "log_softmax", "pass": "trainable", "error": line}
    assert {pair for pair, result in results.items() if "seconds" in result} == {
        ("log_softmax", "frozen"),
        ("cross_entropy", "frozen"),
        ("cross_entropy", "trainable"),
    }


def test_a_failing_side_of_our_own_makes_the_exit_code_1(tmp_path, monkeypatch):
    monkeypatch.setitem(SIDES, "saro, torch tiles", lambda *_: raise_(RuntimeError("a fault")))
    code, results = smoke_results(tmp_path / "figures.json", "saro, torch tiles", "log_softmax")
    assert code == 1
    assert results["saro, torch tiles", "frozen"]["error"] == "RuntimeError: a fault"
    assert results["log_softmax", "frozen"]["seconds"] > 0


def test_figures_are_written_after_each_pass(tmp_path, monkeypatch):
    """A run that is killed in the second pass leaves the first one's figures."""
    file = tmp_path / "figures.json"
    monkeypatch.setitem(SIDES, "log_softmax", fail_in_backward(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        smoke_results(file, "log_softmax", passes=("frozen", "trainable"))
    (result,) = json.loads(file.read_text())["heads"]["smoke"]["results"]
    assert result["pass"] == "frozen"
    assert result["seconds"] > 0


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
    code, results = smoke_results(tmp_path / "figures.json", "saro, torch tiles", "Liger", passes=["frozen"])
    assert code == 0
    assert "Liger is left out: it runs on CUDA only" in capsys.readouterr().out
    assert list(results) == [("saro, torch tiles", "frozen")]
    assert results["saro, torch tiles", "frozen"]["seconds"] > 0
    assert results["saro, torch tiles", "frozen"]["share_of_gemm_rate"] > 0


def test_the_plot_leaves_gaps_for_sides_that_did_not_run(tmp_path):
    pytest.importorskip("matplotlib", reason="the extra bench brings matplotlib")
    figures = {"pass": "frozen", "share_of_gemm_rate": 0.5, "peak_bytes": 2**20}
    heads = {
        "one": {"sides": ["saro, torch tiles", "TRL"], "results": [{"side": "TRL", **figures}]},
        "two": {
            "sides": ["saro, torch tiles", "TRL"],
            "results": [
                {"side": "saro, torch tiles", **figures, "peak_bytes": None},
                {"side": "TRL", "pass": "frozen", "error": "ValueError: a fault"},
            ],
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
