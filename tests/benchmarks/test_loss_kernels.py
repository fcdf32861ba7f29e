"""The benchmark of the loss kernels: its sides compute the same, and a smoke run writes figures and a picture."""

from __future__ import annotations

import json

import loss_kernels
import pytest
import torch
from loss_kernels_sides import HEADS, PASSES, SIDES, SMOKE, Case, why_not

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
HERE = [side for side in SIDES if why_not(side, CPU, torch.float32) is None]

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def case():
    return Case.of(SMOKE["smoke"], 16, CPU, torch.float32)


@pytest.mark.parametrize("which", PASSES)
@pytest.mark.parametrize("side", [side for side in HERE if side != "TRL"])
def test_every_side_computes_the_same_sum(case, side, which):
    want = (case.hidden @ case.weight.T).log_softmax(1).gather(1, case.targets[:, None]).sum()
    torch.testing.assert_close(case.run(side, which), want.detach())
    assert case.hidden.grad is None
    assert case.weight.grad is None


@pytest.mark.trl
def test_trl_computes_the_same_sum(case):
    pytest.importorskip("trl")
    torch.testing.assert_close(case.run("TRL", "trainable"), case.run("saro, torch tiles", "trainable"))


def test_a_side_that_computes_something_else_ends_the_run(case, monkeypatch):
    monkeypatch.setitem(SIDES, "log_softmax", lambda hidden, weight, targets: hidden.sum() * 1.0)
    with pytest.raises(
        SystemExit, match=r"log_softmax sums to .*, saro, torch tiles to .*: they do not compute the same"
    ):
        loss_kernels.check_same(case, ["saro, torch tiles", "log_softmax"])


def test_memory_that_must_be_there(case):
    n, d, v = 16, SMOKE["smoke"].width, SMOKE["smoke"].vocab
    assert [case.floor_bytes(which) for which in PASSES] == [4 * n, 4 * (n + n * d), 4 * (n + n * d + v * d)]


@pytest.mark.parametrize("side", ["Liger", "cut cross-entropy"])
def test_sides_for_cuda_are_left_out_with_a_reason(side):
    assert why_not(side, CPU, torch.float32) == "it runs on CUDA only"


@pytest.mark.parametrize("side", ["TRL", "Liger", "cut cross-entropy"])
def test_absent_packages_are_left_out_with_a_reason(monkeypatch, side):
    monkeypatch.setattr("loss_kernels_sides.find_spec", lambda name: None)
    assert "is not installed; pip install" in why_not(side, CUDA, torch.bfloat16)


def test_the_peak_of_a_pass_is_that_of_the_logits():
    """Two copies of N x V, by the plain way; one tile, by this project's."""
    head = HEADS["SmolLM2-135M"]
    rows = 1024
    plain, ours = (
        loss_kernels.peak_bytes(side, "scoring", head, Case.of(SMOKE["smoke"], rows, CPU, torch.float32), threads=1)
        for side in ("log_softmax", "saro, torch tiles")
    )
    logits = 4 * rows * head.vocab
    if plain is None:
        pytest.skip("this system does not tell the peak of resident memory")
    assert 1.9 * logits < plain < 2.5 * logits
    assert 0.4 * logits < ours < 0.8 * logits


def test_smoke_run(tmp_path, capsys):
    figures = tmp_path / "figures.json"
    arguments = ["--smoke", "--sides", "saro, torch tiles", "Liger", "--passes", "frozen", "--threads", "1"]
    loss_kernels.main([*arguments, "--json", str(figures)])
    assert "Liger is left out: it runs on CUDA only" in capsys.readouterr().out
    entry = json.loads(figures.read_text())["heads"]["smoke"]
    (result,) = entry["results"]
    assert (result["side"], result["pass"]) == ("saro, torch tiles", "frozen")
    assert result["seconds"] > 0
    assert result["share_of_gemm_rate"] > 0


def test_the_picture_has_a_place_for_what_could_not_run(tmp_path):
    pytest.importorskip("matplotlib", reason="the extra bench brings matplotlib")
    figures = {"pass": "frozen", "share_of_gemm_rate": 0.5, "peak_bytes": 2**20}
    heads = {
        "one": {"sides": ["saro, torch tiles", "TRL"], "results": [{"side": "TRL", **figures}]},
        "two": {
            "sides": ["saro, torch tiles"],
            "results": [{"side": "saro, torch tiles", **figures, "peak_bytes": None}],
        },
    }
    loss_kernels.plot(heads, str(tmp_path / "picture.png"))
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")


def test_a_picture_needs_matplotlib(monkeypatch, capsys):
    monkeypatch.setattr(loss_kernels, "find_spec", lambda name: None)
    with pytest.raises(SystemExit):
        loss_kernels.parse(["--plot", "picture.png"])
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
def test_bad_options(arguments, message, capsys):
    with pytest.raises(SystemExit):
        loss_kernels.parse(arguments)
    assert message in capsys.readouterr().err
