"""`saro doctor`: all checks pass on a sound model, and each breakage fails in its own row."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from functools import partial

import pytest
import torch
from command import run_saro
from rich.console import Console
from tiny import save_tiny_model, tiny_tokenizer
from transformers import AutoTokenizer

from saro.config import DataConfig, ModelConfig
from saro.distributed.runtime import Runtime
from saro.errors import SaroError
from saro.model import attention, fused_lora
from saro.tools.doctor import checked_model as model_module
from saro.tools.doctor import doctor as doctor_module
from saro.tools.doctor import kernel_checks as kernels
from saro.tools.doctor import memory_check as memory
from saro.tools.doctor import model_checks as model
from saro.tools.doctor import training_checks as training
from saro.tools.doctor.checked_model import CheckedModel
from saro.tools.doctor.doctor import Options, doctor
from saro.tools.doctor.finding import Check, Finding, guarded, within
from saro.tools.doctor.memory_check import Memory
from saro.train import checkpoint, engine, restore
from saro.train.optim import make_optimizer

pytestmark = pytest.mark.usefixtures("one_thread")

METHODS = ("full", "lora", "qlora")
# Rows of the table, whatever fails.
ROWS = 21
PACK_TOKENS = 2048


@pytest.fixture
def examine(runtime, tiny_model, tmp_path):
    """Runs the doctor; returns its exit code, the findings by name, the recommendations and what it printed."""

    def run(**model_options: object) -> tuple[int, dict[str, Finding], list[str], str]:
        file, screen = tmp_path / "findings.json", io.StringIO()
        options = Options(
            model=ModelConfig(**{"name": tiny_model(), "method": "lora"} | model_options),
            data=DataConfig(pack_tokens=PACK_TOKENS),
            json=str(file),
        )
        code = doctor(runtime, options, Console(file=screen, width=200))
        written = json.loads(file.read_text())
        assert written["ok"] is (code == 0)
        findings = [Finding(**finding) for finding in written["checks"]]
        return code, {f.name: f for f in findings}, written["recommendations"], screen.getvalue()

    return run


def failed(findings: dict[str, Finding]) -> set[str]:
    return {name for name, finding in findings.items() if finding.ok is False}


# Sound models.


@pytest.mark.parametrize("method", METHODS)
def test_all_checks_pass_on_a_tiny_model(examine, method):
    code, findings, advice, screen = examine(method=method)
    assert code == 0, failed(findings)
    skipped = {name for name, finding in findings.items() if finding.ok is None}
    triton = {f"token_logps, triton tiles, {head} head" for head in ("frozen", "trainable")}
    assert skipped - triton == {"attention backends"} | ({"qlora after generation"} if method != "qlora" else set())
    assert all(findings[name].figure for name in findings)
    assert advice[:2] == ["dtype: float32 (--model.dtype)", "attention: sdpa (--model.attention)"]
    assert [line.partition(":")[0] for line in advice[2:]] == [
        "pack size",
        "gradient checkpointing for packs of 2,048 tokens",
        "gradient checkpointing for packs of 4,096 tokens",
    ]
    assert "FAILED" not in screen
    assert all(line in screen for line in advice)
    assert findings["resume after two steps"].limit == "the same bits"


def test_on_a_cpu_that_is_faster_in_bfloat16_the_model_is_checked_in_it_and_it_is_advised(examine, monkeypatch):
    for module in (model_module, doctor_module):
        monkeypatch.setattr(module, "decide_dtype", lambda name, *_: "bfloat16" if name == "auto" else name)
    loaded, load = [], model_module.load_policy

    def load_policy(source, options, *arguments, **keywords):
        loaded.append(options.dtype)
        return load(source, options, *arguments, **keywords)

    monkeypatch.setattr(model_module, "load_policy", load_policy)
    code, findings, advice, _ = examine()
    assert code == 0, failed(findings)
    assert advice[0] == "dtype: bfloat16 (--model.dtype)"
    assert loaded == ["bfloat16"]


@pytest.mark.parametrize("kind", ["mistral", "gemma3", "gemma3 with a softcap", "granite", "qwen3"])
def test_all_checks_pass_on_other_models(examine, tiny_model, kind):
    code, findings, _, _ = examine(name=tiny_model(kind))
    assert code == 0, failed(findings)


def test_all_checks_pass_in_bfloat16(examine):
    code, findings, _, _ = examine(method="qlora", dtype="bfloat16")
    assert code == 0, failed(findings)


def test_a_model_without_chat_template_is_checked_on_generated_tokens(examine, tmp_path):
    folder = save_tiny_model(tmp_path / "plain")
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    tiny_tokenizer(template=None).save_pretrained(folder)
    assert AutoTokenizer.from_pretrained(folder).chat_template is None
    code, findings, _, _ = examine(name=str(folder))
    assert code == 0, failed(findings)
    assert findings["the model loads"].figure.endswith("generated tokens")


def test_the_runs_leave_no_files(examine, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    examine()
    assert [path.name for path in tmp_path.iterdir()] == ["findings.json"]


# Broken parts: each fails in its row, and the table keeps all other rows.


def changed_torch_tiles(patch, change):
    """Change only torch's tile op: Triton's may be available too, and has its own rows."""
    original = kernels.tiled_token_logps

    def tiled(*args, **options):
        logps = original(*args, **options)
        return change(logps) if options["tile_op"] == "torch" else logps

    patch.setattr(kernels, "tiled_token_logps", tiled)


def wrong_tiles(patch):
    changed_torch_tiles(patch, lambda logps: logps * 1.001)


def tiles_that_do_not_compile(patch):
    def broken(_: torch.Tensor) -> None:
        raise RuntimeError("no image for this device\nand much more")

    changed_torch_tiles(patch, broken)


def wrong_lora(patch):
    original = kernels.lora_linear
    patch.setattr(kernels, "lora_linear", lambda x, layer: original(x, replace(layer, scaling=1.51)))


def not_a_number(patch):
    original = kernels.lora_gated_mlp
    patch.setattr(kernels, "lora_gated_mlp", lambda *args: original(*args) * torch.nan)


def wrong_attention(patch):
    original = attention._sdpa

    def sdpa(query, key, value, plan, scaling, *others):
        return original(query, key, value, plan, scaling * 1.01, *others)

    patch.setattr(attention, "_sdpa", sdpa)


def wrong_fused_adapters(patch):
    original = fused_lora._parts
    patch.setattr(fused_lora, "_parts", lambda layer: replace(original(layer), scaling=0.0))


def checkpoint_without_the_optimizer(patch):
    original = restore.load_checkpoint

    def load(folder, trainable, optimizer, scheduler):
        step = original(folder, trainable, optimizer, scheduler)
        optimizer.state.clear()
        return step

    patch.setattr(restore, "load_checkpoint", load)


def checkpoint_of_half_precision(patch):
    original = checkpoint.save_file

    def save(weights, file):
        original({name: w.bfloat16().float() if w.is_floating_point() else w for name, w in weights.items()}, file)

    patch.setattr(checkpoint, "save_file", save)


def training_that_changes_nothing(patch):
    patch.setitem(training._RATE, "lora", 1e-30)


def training_uphill(patch):
    original = engine._clip

    def clip(parameters, norm):
        grad_norm = original(parameters, norm)
        for parameter in parameters:
            parameter.grad.neg_()
        return grad_norm

    patch.setattr(engine, "_clip", clip)


def another_reference(patch):
    original = model.score_pairs

    def score(*args):
        reference = original(*args)
        return replace(reference, logps=reference.logps * 1.01)

    patch.setattr(model, "score_pairs", score)


def packs_that_take_no_memory(patch):
    patch.setattr(memory, "_peak", lambda checked, pack: 1.0)


TILES = {"token_logps, torch tiles, frozen head", "token_logps, torch tiles, trainable head"}
SABOTAGES = {
    wrong_tiles: TILES,
    tiles_that_do_not_compile: TILES,
    wrong_lora: {"lora_linear, dense base", "lora_linear, NF4 base"},
    not_a_number: {"lora_gated_mlp, dense base", "lora_gated_mlp, NF4 base"},
    wrong_attention: {"packs of examples", "packs of pair trees"},
    wrong_fused_adapters: {"packs of examples", "packs of pair trees", "three steps of training"},
    checkpoint_without_the_optimizer: {"resume after two steps"},
    checkpoint_of_half_precision: {"resume after two steps"},
    training_that_changes_nothing: {"three steps of training"},
    training_uphill: {"three steps of training"},
    another_reference: {"margins at the start"},
    packs_that_take_no_memory: {"memory of two packs"},
}


@pytest.mark.parametrize(("sabotage", "expected"), SABOTAGES.items(), ids=lambda s: getattr(s, "__name__", ""))
def test_a_broken_part_fails_only_in_its_row(examine, monkeypatch, sabotage, expected):
    sabotage(monkeypatch)
    code, findings, _, screen = examine()
    assert failed(findings) == expected
    assert code == 1
    assert screen.count("FAILED") == len(expected)
    assert len(findings) == ROWS


def test_a_head_is_checked_with_the_softcap_of_the_model(examine, tiny_model, monkeypatch):
    original = kernels.tiled_token_logps
    monkeypatch.setattr(kernels, "tiled_token_logps", lambda *args, **o: original(*args, **o | {"softcap": None}))
    _, findings, _, _ = examine(name=tiny_model("gemma3 with a softcap"))
    assert {f"token_logps, torch tiles, {head} head" for head in ("frozen", "trainable")} <= failed(findings)


def test_log_probs_with_the_error_of_rounded_logits_fail_in_bfloat16(examine, monkeypatch):
    changed_torch_tiles(monkeypatch, lambda logps: logps + (logps.bfloat16() - logps).detach())
    _, findings, _, _ = examine(dtype="bfloat16")
    assert failed(findings) == TILES


def test_an_error_is_shown_by_its_first_line(examine, monkeypatch):
    tiles_that_do_not_compile(monkeypatch)
    _, findings, _, screen = examine()
    assert findings["token_logps, torch tiles, frozen head"].figure == "no image for this device"
    assert "and much more" not in screen


def test_gradients_that_generation_changes_fail(examine, monkeypatch):
    original = model._generate

    def generate(checked):
        original(checked)
        with torch.no_grad():
            next(p for p in checked.policy.parameters() if p.dtype == torch.float32 and p.ndim == 1).mul_(1.001)

    monkeypatch.setattr(model, "_generate", generate)
    code, findings, _, _ = examine(method="qlora")
    assert code == 1
    assert failed(findings) == {"qlora after generation"}


def test_steps_that_end_in_an_error_leave_nothing_to_resume(examine, monkeypatch):
    monkeypatch.setattr(engine, "_clip", lambda parameters, norm: torch.tensor(torch.nan))
    code, findings, _, _ = examine()
    assert code == 1
    assert failed(findings) == {"three steps of training"}
    assert "gradient norm nan" in findings["three steps of training"].figure
    assert findings["resume after two steps"].ok is None


def test_checkpoints_that_do_not_fit_the_disk_are_not_written(examine, monkeypatch):
    monkeypatch.setattr(training, "_COPIES", 10**15)
    code, findings, _, _ = examine()
    assert code == 0
    assert "set TMPDIR to another disk" in findings["three steps of training"].figure
    assert findings["resume after two steps"].ok is None


def test_if_a_broken_backend_cannot_load_the_model_the_rows_of_the_machine_remain(examine, monkeypatch):
    def load_policy(*_: object, **__: object) -> None:
        raise RuntimeError("CUDA error: no kernel image")

    monkeypatch.setattr(model_module, "load_policy", load_policy)
    code, findings, advice, _ = examine()
    assert code == 1
    assert list(findings) == ["versions", "device", "threads", "free disk of the cache", "the model loads"]
    assert findings["the model loads"] == Finding("the model loads", False, "CUDA error: no kernel image", "no error")
    assert len(advice) == 2


# Attention backends. A CPU has only sdpa.


@pytest.fixture
def varlen_runs(monkeypatch):
    """Makes varlen available without a GPU; sdpa computes it."""
    monkeypatch.setattr(model, "choose_backend", lambda name, *_: name)
    monkeypatch.setattr(attention, "_varlen", attention._sdpa)


@pytest.mark.usefixtures("varlen_runs")
def test_backends_that_agree_are_ok(examine):
    code, findings, _, _ = examine()
    assert code == 0
    assert findings["attention backends"].figure == "0 nats per token apart"


@pytest.mark.usefixtures("varlen_runs")
def test_a_backend_that_differs_fails(examine, monkeypatch):
    def varlen(query, key, value, plan, scaling, dropout, window):
        return attention._sdpa(query, key, value, plan, scaling * 1.01, dropout, window)

    monkeypatch.setattr(attention, "_varlen", varlen)
    code, findings, _, _ = examine()
    assert code == 1
    assert failed(findings) == {"attention backends"}


# Parts.


def test_the_users_interrupt_is_not_a_finding():
    def interrupted() -> Finding:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        guarded(Check("a check", interrupted))


def test_an_error_without_message_is_shown_by_its_kind():
    def broken() -> Finding:
        raise MemoryError

    assert guarded(Check("a check", broken)) == Finding("a check", False, "MemoryError", "no error")


@pytest.mark.parametrize(("value", "ok"), [(1.0, True), (2.0, True), (2.1, False), (float("nan"), False)])
def test_a_figure_must_be_within_its_limit(value, ok):
    assert within("a check", value, 2.0, "nats").ok is ok


def test_the_largest_pack_is_a_multiple_of_256():
    line = Memory(base=1.0, slope=0.001)
    assert line.at(2000) == pytest.approx(3.0)
    assert line.largest_pack(3.0) == 1792
    assert line.largest_pack(1.1) == 0
    assert line.largest_pack(0.5) == 0


def test_memory_is_measured_with_gradients_and_optimizer_states(runtime, tiny_model, monkeypatch):
    """From the second step on they exist; a first step allocates its states after the activations are freed."""
    checked = CheckedModel.load(runtime, ModelConfig(name=tiny_model(), method="full"), PACK_TOKENS)
    optimizers, seen = [], []

    def note_optimizer(*args):
        optimizers.append(make_optimizer(*args))
        return optimizers[-1]

    def note(backward):
        parameters = checked.policy.trainable().values()
        seen.append(all(p.grad is not None and "exp_avg" in optimizers[0].state[p] for p in parameters))
        backward()
        return float(len(seen))

    monkeypatch.setattr(memory, "make_optimizer", note_optimizer)
    monkeypatch.setattr(memory, "resident_peak", note)
    measured = memory.measure_memory(checked)
    assert seen == [True, True]
    assert measured.slope > 0
    assert all(p.grad is None for p in checked.policy.trainable().values())


def test_gradient_checkpointing_is_advised_if_packs_do_not_fit(monkeypatch):
    monkeypatch.setattr(memory, "measure_memory", lambda _: Memory(base=1.0, slope=0.001))
    monkeypatch.setattr(memory, "device_memory", lambda _: 4.0)  # a step may use 3.4 GiB
    checked = type("CheckedModel", (), {"runtime": type("Runtime", (), {"device": torch.device("cpu")})})
    advice: list[str] = []
    assert memory.memory_check(checked, advice.append).ok
    assert advice == [
        "pack size: up to 2,304 tokens (--data.pack_tokens)",
        "gradient checkpointing for packs of 2,048 tokens: not needed; a step takes 3.0 GiB",
        "gradient checkpointing for packs of 4,096 tokens: needed (--model.gradient_checkpointing true); a step takes "
        "5.1 GiB",
    ]


# The command.


@pytest.fixture
def saro(monkeypatch, capsys, runtime):
    """Runs `saro doctor` in this process; returns exit code, stdout and stderr."""
    monkeypatch.setattr(Runtime, "start", lambda: runtime)
    return partial(run_saro, monkeypatch, capsys, "doctor")


def test_the_command_exits_with_0_or_1(saro, tiny_model, monkeypatch):
    arguments = ("--model.name", tiny_model(), "--model.method", "lora", "--data.pack_tokens", "512")
    code, out, _ = saro(*arguments)
    assert code == 0
    assert "gradient checkpointing for packs of 4,096 tokens: not needed" in out
    wrong_tiles(monkeypatch)
    code, out, _ = saro(*arguments)
    assert code == 1
    assert "FAILED" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--model.name", "./nowhere"), "error: ./nowhere: no such folder; give a model's folder or its hub name"),
        (("--model.name", "MODEL", "--model.attention", "varlen"), "error: varlen attention needs CUDA and bfloat16"),
        (("--data.pack_tokens", "8"), "error: --data.pack_tokens is 8; it must be at least 256"),
        (("--json", "nowhere/findings.json"), "error: --json: there is no folder"),
        (("--model.methd", "lora"), "error: unknown option --model.methd; did you mean --model.method?"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(saro, tiny_model, arguments, message):
    code, _, err = saro(*(tiny_model() if part == "MODEL" else part for part in arguments))
    assert code == 2
    lines = [line for line in err.splitlines() if not line.startswith("checking: ")]
    assert len(lines) == 1
    assert lines[0].startswith(message)


def test_an_adapter_is_not_trained_in_full(runtime, rw_final):
    with pytest.raises(SaroError, match="an adapter cannot be trained"):
        doctor(runtime, Options(model=ModelConfig(name=str(rw_final), method="full")), Console(quiet=True))


def test_an_adapter_is_checked_as_training_continues_it(examine, rw_final):
    code, findings, _, _ = examine(name=str(rw_final))
    assert code == 0, failed(findings)
