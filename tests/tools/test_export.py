"""`saro export`: it writes what was trained, measured with the written files, or it writes nothing."""

from __future__ import annotations

import json
import shutil
from datetime import date
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
import yaml
from bitsandbytes.nn import Linear4bit
from command import run_saro
from huggingface_hub.errors import HTTPError
from peft import AutoPeftModelForCausalLM
from rich.console import Console
from safetensors.torch import load_file, save_file
from tiny import IM_END, save_tiny_model, tiny_config
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
from transformers.models.llama import modeling_llama

import saro.tools.export
from saro.checks.deviation import choose_records
from saro.config import ModelConfig
from saro.demo import demo_file
from saro.errors import SaroError
from saro.files import file_hash
from saro.model import liger
from saro.model.load import load_policy
from saro.model.merge import merge
from saro.model.policy import Policy
from saro.model.score import score_natively, score_trees
from saro.runs.finished import FinishedRun
from saro.runs.model_card import make_card
from saro.tools.export import NOTE, Options, export, run_files
from saro.tools.export import run as export_run

pytestmark = pytest.mark.usefixtures("one_thread")

NF4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
CPU = torch.device("cpu")
MERGED_FILES = {
    "README.md",
    "chat_template.jinja",
    "config.json",
    NOTE,
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
}


@pytest.fixture
def exported(finished_run, tmp_path):
    """Exports a run of a method; returns the folder and the line about it."""

    def run(method: str = "lora", kind: str = "llama", **options) -> tuple[Path, str]:
        folder = tmp_path / "out"
        line = export(Options(run=str(finished_run(method, kind)), output=str(folder), **options), lambda line: None)
        return folder, line

    return run


@pytest.fixture
def own_run(finished_run, tmp_path):
    """Copies a run and its base, so that a test can change them."""

    def copy(method: str = "lora") -> Path:
        run = shutil.copytree(finished_run(method), tmp_path / "run")
        manifest = json.loads((run / "manifest.json").read_text())
        base = shutil.copytree(manifest["model"]["name"], tmp_path / "base")
        manifest["model"]["name"] = manifest["config"]["model"]["name"] = str(base)
        (run / "manifest.json").write_text(json.dumps(manifest))
        config = run / "final" / "adapter_config.json"
        if config.exists():
            config.write_text(json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": str(base)}))
        return run

    return copy


def change_manifest(run: Path, change) -> None:
    manifest = json.loads((run / "manifest.json").read_text())
    change(manifest)
    (run / "manifest.json").write_text(json.dumps(manifest))


def refused(run: Path, message: str, **options) -> None:
    """Check that the export fails with this message and leaves no file."""
    before = sorted(run.parent.iterdir()), sorted(run.iterdir())
    with pytest.raises(SaroError, match=message):
        export(Options(run=str(run), **options), lambda line: None)
    assert (sorted(run.parent.iterdir()), sorted(run.iterdir())) == before


def as_trained(run: Path, method: str) -> torch.nn.Module:
    """Return the trained model as PEFT and transformers load it, without any code of ours."""
    if method == "full":
        return AutoModelForCausalLM.from_pretrained(run / "final")
    if method == "lora":
        return AutoPeftModelForCausalLM.from_pretrained(run / "final")
    model = AutoPeftModelForCausalLM.from_pretrained(run / "final", quantization_config=NF4, dtype=torch.float32)
    for layer in model.modules():
        if isinstance(layer, Linear4bit):
            # Keep bitsandbytes from repacking the weight for bfloat16, as it does on CPUs with AVX512-BF16.
            layer.support_avx512bf16_for_cpu = False
    return model


def trees_of(run: Path, number: int = 4):
    opened = FinishedRun.open(str(run))
    return choose_records(run_files(opened), opened.chat_format(), 256, number)


# A merged export.


@pytest.mark.parametrize("method", ["lora", "qlora", "full"])
def test_a_merged_export_loads_as_a_plain_model_with_the_log_probs_of_the_trained_one(exported, finished_run, method):
    folder, _ = exported(method, merge=True)
    trees = trees_of(finished_run(method))
    plain = AutoModelForCausalLM.from_pretrained(folder)
    expected = score_natively(as_trained(finished_run(method), method), trees)
    torch.testing.assert_close(score_natively(plain, trees), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("method", ["lora", "qlora", "full"])
def test_so_does_that_of_ranks_that_shared_the_weights(recipes, rw_arguments, tmp_path, method):
    run, folder = tmp_path / "run", tmp_path / "out"
    done = recipes.run_ranks(2, *rw_arguments(train_shard="full", model_method=method, train_max_steps=2))
    assert [p.code for p in done] == [0, 0], done[0].err + done[1].err
    export(Options(run=str(run), output=str(folder), merge=True), lambda line: None)
    trees = trees_of(run, 5)
    plain = AutoModelForCausalLM.from_pretrained(folder)
    logps = score_natively(plain, trees)
    torch.testing.assert_close(logps, score_natively(as_trained(run, method), trees), rtol=0, atol=1e-4)
    # Those of the ranks themselves, who scored all held-out records after training.
    after = json.loads((run / "after.json").read_text())["metrics"]
    assert -logps.mean().item() == pytest.approx(after["eval/loss"], abs=1e-4)


@pytest.mark.parametrize("method", ["lora", "qlora", "full"])
def test_a_merged_export_has_no_trace_of_peft_or_quantization(exported, method):
    folder, _ = exported(method, merge=True)
    assert {p.name for p in folder.iterdir()} == MERGED_FILES
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert "quantization_config" not in config
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert set(load_file(folder / "model.safetensors")) == set(model.state_dict()) - {"lm_head.weight"}


def test_a_merged_export_has_the_tokenizer_of_the_run_and_the_generation_config_of_the_base(
    exported, finished_run, tiny_model
):
    folder, _ = exported("qlora", merge=True)
    turns = [{"role": "user", "content": "Hi"}]
    new, old = (AutoTokenizer.from_pretrained(f) for f in (folder, finished_run("qlora") / "final"))
    assert new.apply_chat_template(turns) == old.apply_chat_template(turns)
    base = Path(tiny_model()) / "generation_config.json"
    assert (folder / "generation_config.json").read_bytes() == base.read_bytes()


def test_a_base_without_a_generation_config_is_exported_with_its_end_tokens(own_run, tmp_path):
    run = own_run("lora")
    (tmp_path / "base" / "generation_config.json").unlink()
    export(Options(run=str(run), merge=True), lambda line: None)
    assert AutoModelForCausalLM.from_pretrained(run / "export").generation_config.eos_token_id == IM_END


def test_a_generation_config_that_transformers_cannot_save_is_copied(own_run, tmp_path):
    run = own_run("lora")
    file = tmp_path / "base" / "generation_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"do_sample": False, "temperature": 0.6}))
    export(Options(run=str(run), merge=True), lambda line: None)
    assert (run / "export" / file.name).read_bytes() == file.read_bytes()


def test_full_fine_tuning_exports_a_model_without_merge(exported):
    folder, line = exported("full")
    assert {p.name for p in folder.iterdir()} == MERGED_FILES
    assert "AutoModelForCausalLM.from_pretrained" in line


@pytest.mark.parametrize("method", ["lora", "qlora", "full"])
def test_tied_embeddings_stay_tied(exported, method):
    """huggingface/peft#2777: a tied head is written as a weight of its own beside the embedding."""
    folder, _ = exported(method, merge=True)
    assert "lm_head.weight" not in load_file(folder / "model.safetensors")
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


def test_an_untied_head_is_written(exported):
    folder, _ = exported("qlora", "qwen3", merge=True)
    weights = load_file(folder / "model.safetensors")
    assert not torch.equal(weights["lm_head.weight"], weights["model.embed_tokens.weight"])


def test_the_dtype_is_that_of_the_option(exported):
    folder, line = exported("qlora", merge=True, dtype="bfloat16")
    assert {w.dtype for w in load_file(folder / "model.safetensors").values()} == {torch.bfloat16}
    assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"
    assert "model in bfloat16" in line


@pytest.mark.parametrize("method", ["lora", "full"])
def test_the_default_dtype_is_that_of_the_base(recipes, rw_arguments, tiny_model, tmp_path, method):
    base = AutoModelForCausalLM.from_pretrained(tiny_model(), dtype=torch.bfloat16)
    shutil.copytree(tiny_model(), tmp_path / "base")
    base.save_pretrained(tmp_path / "base")
    done = recipes.run(*rw_arguments(model_name=tmp_path / "base", model_method=method))
    assert done.code == 0, done.err
    export(Options(run=str(tmp_path / "run"), merge=True), lambda line: None)
    weights = load_file(tmp_path / "run" / "export" / "model.safetensors")
    assert {w.dtype for w in weights.values()} == {torch.bfloat16}


# The merge itself.


# An adapter without merge.


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_without_merge_the_export_is_the_adapter_with_its_tokenizer(exported, finished_run, method):
    folder, line = exported(method)
    final = finished_run(method) / "final"
    assert {p.name for p in folder.iterdir()} == {p.name for p in final.iterdir()} | {NOTE}
    copied = [p for p in final.iterdir() if p.name != "README.md"]
    assert all((folder / p.name).read_bytes() == p.read_bytes() for p in copied)
    assert "adapter, off by 0 nats" in line
    assert ("BitsAndBytesConfig" in line) == (method == "qlora")


@pytest.mark.parametrize(("option", "value"), [("into", "original"), ("dtype", "bfloat16")])
def test_options_of_a_merge_are_refused_without_one(finished_run, option, value):
    refused(finished_run(), f"--{option} is for a merged model; add --merge", **{option: value})


# The verification.


def test_the_line_and_the_note_say_how_far_the_export_is_off_and_how_to_load_it(exported):
    folder, line = exported("qlora", merge=True)
    note = json.loads((folder / NOTE).read_text())
    assert 0 < note["shift"] < 1e-4 < 0.1 < note["change"]
    assert (note["records"], note["holds"]) == (6, "model in float32")
    assert line.startswith(f"{folder}: model in float32, off by ")
    assert f"({note['tokens']:,} tokens of 6 records)" in line
    assert line.endswith(f"load it with AutoModelForCausalLM.from_pretrained('{folder}')")


def test_the_measured_change_is_that_from_the_base_to_the_trained_model(exported, finished_run, tiny_model):
    for method in ("lora", "full"):
        folder, _ = exported(method, merge=True)
        trees = trees_of(finished_run(method), 16)
        base = score_natively(AutoModelForCausalLM.from_pretrained(tiny_model()), trees)
        trained = score_natively(as_trained(finished_run(method), method), trees)
        note = json.loads((folder / NOTE).read_text())
        assert note["change"] == pytest.approx((trained - base).abs().mean().item(), rel=1e-4)
        shutil.rmtree(folder)


def spoil(model: torch.nn.Module) -> torch.nn.Module:
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.mul_(-1)
    return model


@pytest.fixture
def wrong_merge(monkeypatch):
    monkeypatch.setattr(saro.tools.export, "merge", lambda *arguments: spoil(merge(*arguments)))


@pytest.mark.parametrize("method", ["lora", "qlora", "full"])
def test_a_merge_that_is_not_what_was_trained_leaves_nothing(finished_run, wrong_merge, method):
    refused(finished_run(method), r"export: not written, it is off by .* of the .* that training changed", merge=True)


@pytest.mark.parametrize("method", ["lora", "full"])
def test_the_written_model_is_verified_with_the_rotary_embedding_of_transformers(exported, monkeypatch, method):
    """liger-kernel's, which a GPU has by default, would stay for the written model. A fault of it would not be seen."""
    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", own_rotary := modeling_llama.apply_rotary_pos_emb)
    monkeypatch.setattr(liger, "why_not_liger", lambda model_type, device: None)
    calls = []
    for original in (score_trees, score_natively):

        def score(*args, original=original):
            # Before it is run: liger-kernel's layers cannot run on a CPU.
            assert modeling_llama.apply_rotary_pos_emb is own_rotary
            calls.append(original)
            return original(*args)

        monkeypatch.setattr(saro.tools.export, original.__name__, score)
    exported(method, merge=True)
    assert calls == [score_trees, score_trees, score_natively]


def test_the_written_files_are_verified_and_not_the_model_in_memory(finished_run, monkeypatch):
    save = saro.tools.export.save_final
    monkeypatch.setattr(saro.tools.export, "save_final", lambda folder, model, tok: save(folder, spoil(model), tok))
    refused(finished_run("qlora"), "not written", merge=True)


def test_an_existing_export_survives_one_that_fails(exported, monkeypatch):
    folder, _ = exported("lora", merge=True)
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    monkeypatch.setattr(saro.tools.export, "merge", lambda *arguments: spoil(merge(*arguments)))
    with pytest.raises(SaroError, match="not written"):
        exported("lora", merge=True, overwrite=True)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before


def test_an_export_that_rounding_changed_too_much_is_refused_with_the_fix(finished_run, monkeypatch):
    monkeypatch.setattr("saro.checks.deviation.EXPORT_SHARE", 1e-5)
    refused(
        finished_run("lora"),
        "the model in bfloat16 rounds away too much: set --dtype float32$",
        merge=True,
        dtype="bfloat16",
    )


def test_nan_is_refused_even_with_allow_shift(finished_run, monkeypatch):
    monkeypatch.setattr(saro.tools.export, "score_natively", lambda *arguments: torch.full((1,), torch.nan))
    options = {"merge": True, "into": "original", "allow_shift": True}
    refused(finished_run(), "not written, it is off by nan nats", **options)


def test_too_little_memory_is_one_line_and_leaves_nothing(finished_run, monkeypatch):
    def full(*arguments):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(saro.tools.export, "score_natively", full)
    refused(finished_run(), "not written, the GPU has too little memory; set CUDA_VISIBLE_DEVICES=", merge=True)


def in_bfloat16(run: Path, share: float) -> Path:
    """Change a LoRA run: it computed in bfloat16, and its adapter is scaled by ``share``."""
    change_manifest(run, lambda manifest: manifest["config"]["model"].update(dtype="bfloat16"))
    weights = load_file(run / "final" / "adapter_model.safetensors")
    save_file(
        {k: share * w if "lora_B" in k else w for k, w in weights.items()}, run / "final/adapter_model.safetensors"
    )
    return run


def test_a_small_change_by_a_run_in_bfloat16_can_be_exported(own_run, tmp_path):
    """The run's rounding is more than a tenth of its change, so no file can be nearer."""
    run = in_bfloat16(own_run(), 0.02)
    export(Options(run=str(run), merge=True, dtype="float32", output=str(tmp_path / "out")), lambda line: None)
    note = json.loads((tmp_path / "out" / NOTE).read_text())
    assert 0.1 * note["change"] < note["shift"] < 0.1 * note["change"] + 1.5 * note["noise"]


def test_an_export_in_bfloat16_that_lost_the_change_is_refused(own_run, monkeypatch):
    run = in_bfloat16(own_run(), 1.0)
    monkeypatch.setattr(saro.tools.export, "merge", lambda policy, *rest: merge(without_adapters(policy), *rest))
    refused(run, "not written, it is off by .* rounding explains", merge=True, dtype="bfloat16")


def test_a_copied_adapter_is_allowed_no_rounding(own_run, monkeypatch):
    run = in_bfloat16(own_run(), 0.02)
    monkeypatch.setattr(
        saro.tools.export, "load_policy", lambda *arguments, **kw: without_adapters(load_policy(*arguments, **kw))
    )
    refused(run, r"not written, it is off by .*, 100.00% of the .* rounding explains 0 ")


def without_adapters(policy: Policy) -> Policy:
    with torch.no_grad():
        for parameter in policy.trainable().values():
            parameter.zero_()
    return policy


# Into the original weights.


def test_a_merge_into_the_original_weights_is_refused_if_it_shifts(finished_run):
    refused(
        finished_run("qlora"),
        "leave --into original out, or accept the shift with --allow_shift",
        merge=True,
        into="original",
    )


def test_with_allow_shift_the_merge_is_written_and_its_shift_reported(exported, finished_run, tiny_model):
    folder, line = exported("qlora", merge=True, into="original", allow_shift=True)
    note = json.loads((folder / NOTE).read_text())
    assert note["shift"] > 0.1 * note["change"]
    assert f"off by {note['shift']:.2g} nats" in line
    adapted = AutoPeftModelForCausalLM.from_pretrained(finished_run("qlora") / "final")
    expected = adapted.merge_and_unload().state_dict()
    weights = load_file(folder / "model.safetensors")
    for name, weight in weights.items():
        torch.testing.assert_close(weight, expected[name], rtol=0, atol=1e-6)


def test_a_run_on_the_original_weights_has_no_shift(exported):
    folder, _ = exported("lora", merge=True, into="original")
    assert json.loads((folder / NOTE).read_text())["shift"] < 1e-4


def test_allow_shift_is_only_for_the_original_weights():
    with pytest.raises(SaroError, match="--allow_shift goes with --into original"):
        Options(run="x", merge=True, allow_shift=True)


# The base, and the run.


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_another_base_than_the_trained_one_is_refused(own_run, tmp_path, method):
    """unslothai/unsloth-zoo#810: an adapter merged into a base that it was not trained on."""
    run = own_run(method)
    torch.manual_seed(9)
    shutil.rmtree(tmp_path / "base")
    save_tiny_model(tmp_path / "base", intermediate_size=32)
    refused(run, "was trained on another model.safetensors than that of .*base; restore the base model", merge=True)


def test_a_full_model_is_not_measured_against_another_base(own_run, tmp_path):
    run = own_run("full")
    shutil.rmtree(tmp_path / "base")
    save_tiny_model(tmp_path / "base", intermediate_size=32)
    refused(run, "base: the weights are not those that the run began with; restore them")


def test_a_missing_base_is_named(own_run, tmp_path):
    run = own_run("qlora")
    shutil.rmtree(tmp_path / "base")
    refused(run, "base: no such folder")


def test_a_missing_run_names_the_nearest(own_run):
    run = own_run()
    with pytest.raises(SaroError, match=f"rum: there is no such folder; did you mean {run}"):
        FinishedRun.open(str(run.with_name("rum")))


def test_without_a_run_nearby_the_option_is_named(tmp_path):
    with pytest.raises(SaroError, match=r"holds no run \(no manifest.json\); give the folder that --train"):
        FinishedRun.open(str(tmp_path))


def test_a_folder_inside_a_run_is_not_the_run(own_run):
    run = own_run()
    with pytest.raises(SaroError, match=f"final: is a part of a run; give the run's folder, {run}$"):
        FinishedRun.open(str(run / "final"))


def test_an_unfinished_run_is_refused(own_run):
    run = own_run()
    shutil.rmtree(run / "final")
    refused(run, "the run has not finished .no final/.; continue it with --resume")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_precision_is_that_of_the_training_on_any_device(own_run, dtype):
    run = own_run()
    change_manifest(run, lambda m: m["config"]["model"].update(dtype=dtype))
    assert FinishedRun.open(str(run)).options.dtype == dtype


@pytest.mark.parametrize(("device", "dtype"), [("cpu", "float32"), ("cuda:0", "bfloat16")])
def test_a_run_that_recorded_no_precision_had_that_of_its_device(own_run, device, dtype):
    run = own_run()
    change_manifest(run, lambda m: (m["machine"].update(device=device), m["config"]["model"].update(dtype="auto")))
    assert FinishedRun.open(str(run)).options.dtype == dtype


def test_conversations_become_tokens_as_in_the_run(own_run):
    run = own_run()
    change_manifest(run, lambda m: m["config"]["data"].update(think_tags=["<a>", "</a>"], template_variables={"x": 1}))
    chat = FinishedRun.open(str(run)).chat_format()
    assert (chat.think_tags, chat.template_variables) == (("<a>", "</a>"), {"x": 1})
    assert chat.template_date == date(2024, 7, 26)


# The records.


def test_the_records_are_held_out_or_else_training_records(own_run):
    run = own_run()
    assert [Path(f).name for f in run_files(FinishedRun.open(str(run)))] == ["heldout.jsonl"]
    change_manifest(run, lambda m: m["config"]["data"].update(heldout=[]))
    assert [Path(f).name for f in run_files(FinishedRun.open(str(run)))] == ["train.jsonl"]


def test_the_demo_records_are_found_after_the_package_has_moved(own_run):
    run = own_run()
    digest = file_hash(Path(demo_file("srpo_heldout")))
    change_manifest(run, lambda m: m["config"]["data"].update(heldout=["demo"]))
    change_manifest(run, lambda m: m["data"].update({"/elsewhere/saro/demo/srpo_heldout.jsonl": digest}))
    assert run_files(FinishedRun.open(str(run))) == [demo_file("srpo_heldout")]


@pytest.mark.parametrize(("change", "state"), [("remove", "is not here any more"), ("edit", "has changed")])
def test_records_that_are_not_those_of_the_run_are_refused_with_the_fix(own_run, tmp_path, change, state):
    run = own_run()
    heldout = shutil.copy(json.loads((run / "manifest.json").read_text())["config"]["data"]["heldout"][0], tmp_path)

    def use_copy(manifest):
        old = manifest["config"]["data"]["heldout"][0]
        manifest["data"][heldout] = manifest["data"].pop(old)
        manifest["config"]["data"]["heldout"] = [heldout]

    change_manifest(run, use_copy)
    if change == "edit":
        Path(heldout).write_text(Path(heldout).read_text() + "\n")
    else:
        Path(heldout).unlink()
    refused(run, f"heldout.jsonl: {state}.*; restore it, or verify the export with other records: --data FILE")


def test_other_records_can_be_given(exported, records_file):
    file = records_file([{"prompt": "Hi", "reasoning": "well", "answer": f"answer {i}"} for i in range(3)])
    folder, _ = exported("lora", data=file)
    assert json.loads((folder / NOTE).read_text())["records"] == 3


def pairs(n: int) -> list[dict[str, object]]:
    return [
        {
            "prompt": f"Question {i}",
            "chosen": {"reasoning": "first this, then that", "answer": "yes"},
            "rejected": {"reasoning": "first this, then nothing", "answer": "no"},
        }
        for i in range(n)
    ]


def test_preference_pairs_are_scored_on_both_sides(exported, records_file):
    file = records_file(pairs(3))
    folder, _ = exported("qlora", merge=True, data=[file])
    note = json.loads((folder / NOTE).read_text())
    assert note["records"] == 3
    assert note["shift"] < 1e-4
    ends = ("<think>\nfirst this, then that\n</think>\n\nyes", "<think>\nfirst this, then nothing\n</think>\n\nno")
    assert note["tokens"] >= 3 * sum(len(end) + 1 for end in ends)


def test_labelled_responses_are_scored_like_examples(finished_run, records_file):
    run = FinishedRun.open(str(finished_run("lora")))
    labelled = [{"prompt": f"Why {i}?", "completion": " So.", "label": i % 2 == 0} for i in range(3)]
    file = records_file(labelled, "labelled.jsonl")
    assert [len(tree.sequences) for tree in choose_records([file], run.chat_format(), 256, 3)] == [1, 1, 1]


def test_packed_and_plain_scoring_give_the_same_tokens_in_the_same_order(finished_run, records_file):
    run = FinishedRun.open(str(finished_run("full")))
    trees = choose_records([records_file(pairs(4))], run.chat_format(), 256, 3)
    packed = score_trees(run.load(CPU), trees, 256)
    plain = score_natively(AutoModelForCausalLM.from_pretrained(finished_run("full") / "final"), trees)
    assert len(packed) == sum(len(s.row_kinds) for tree in trees for s in tree.sequences)
    torch.testing.assert_close(packed, plain, rtol=0, atol=1e-4)


def test_records_are_chosen_from_all_over_the_files(finished_run, records_file):
    chat = FinishedRun.open(str(finished_run())).chat_format()
    files = [records_file([{"prompt": "Hi", "answer": f"{n}{i}"} for i in range(4)], f"{n}.jsonl") for n in "ab"]
    trees = choose_records(files, chat, 256, 4)
    answers = [chat.tokenizer.decode(t.sequences[0].tokens).split("\n")[-1] for t in trees]
    assert answers == [f"{n}<|im_end|>" for n in ("a0", "a2", "b0", "b2")]


def test_records_that_are_too_long_are_skipped(finished_run, records_file):
    chat = FinishedRun.open(str(finished_run())).chat_format()
    file = records_file([{"prompt": "x" * n, "answer": "y"} for n in (300, 1, 300, 2)])
    assert [s.tokens.size < 100 for tree in choose_records([file], chat, 256, 4) for s in tree.sequences] == [
        True,
        True,
    ]
    with pytest.raises(SaroError, match="all records are longer than the run's packs of 20 tokens"):
        choose_records([file], chat, 20, 4)


def test_pairs_with_equal_sides_are_skipped_as_in_a_run_that_drops_them(finished_run, records_file):
    chat = FinishedRun.open(str(finished_run())).chat_format()
    equal = {"prompt": "Hi", "chosen": {"answer": "same"}, "rejected": {"answer": "same"}}
    file = records_file([*pairs(2), equal], "some-equal.jsonl")
    assert len(choose_records([file], chat, 256, 3)) == 2


# The target.


def test_the_default_target_is_in_the_run(own_run):
    run = own_run()
    line = export(Options(run=str(run)), lambda line: None)
    assert line.startswith(str(run / "export"))
    assert (run / "export" / "adapter_model.safetensors").is_file()


def test_an_export_is_replaced_only_with_overwrite(exported):
    folder, _ = exported("lora")
    with pytest.raises(SaroError, match="out: exists already; add --overwrite, or give another folder with --output"):
        exported("lora", merge=True)
    exported("lora", merge=True, overwrite=True)
    assert {p.name for p in folder.iterdir()} == MERGED_FILES


def test_a_folder_that_holds_something_else_is_never_replaced(finished_run, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").touch()
    for target in (tmp_path / "mine", finished_run(), finished_run() / "final"):
        refused(finished_run(), r"is not an export \(no export.json\)", output=str(target), overwrite=True)


def test_an_empty_folder_can_be_the_target(finished_run, tmp_path):
    (tmp_path / "empty").mkdir()
    export(Options(run=str(finished_run()), output=str(tmp_path / "empty")), lambda line: None)
    assert (tmp_path / "empty" / NOTE).is_file()


# The command.


def test_the_command_ends_with_one_line_on_stdout(finished_run, tmp_path, monkeypatch, capsys):
    target = str(tmp_path / "out")
    code, out, err = run_saro(
        monkeypatch,
        capsys,
        "export",
        "--run",
        str(finished_run("qlora")),
        "--merge",
        "--dtype",
        "bfloat16",
        "--output",
        target,
    )
    assert (code, out.count("\n")) == (0, 1)
    assert out.startswith(f"{target}: model in bfloat16, off by")
    assert err.splitlines()[0] == "scoring 6 records as trained and before training"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--run", "absent"], "absent: there is no such folder"),
        (["--run", "x", "--into", "orignal"], "--into is orignal; it must be dequantized or original"),
        (["--run", "x", "--records", "0"], "--records is 0; it must be at least 1"),
        (["--run", "x", "--mrge"], "unknown option --mrge; did you mean --merge?"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(monkeypatch, capsys, arguments, message):
    code, _, err = run_saro(monkeypatch, capsys, "export", *arguments)
    assert code == 2
    assert err.startswith(f"error: {message}")
    assert err.count("\n") == 1


# The model card and the hub.


def test_the_card_has_the_figures_of_the_run_and_no_path(exported, finished_run):
    folder, _ = exported("lora")
    text = (folder / "README.md").read_text()
    _, metadata, body = text.split("---\n", 2)
    assert yaml.safe_load(metadata) == {"library_name": "peft", "pipeline_tag": "text-generation", "tags": ["saro"]}
    run = finished_run("lora")
    before, after = (json.loads((run / f"{name}.json").read_text())["metrics"] for name in ("before", "after"))
    assert f"| loss | {before['eval/loss']:.4g} | {after['eval/loss']:.4g} |" in body
    assert "RW, supervised fine-tuning" in body
    assert "general" in body
    assert f"AutoPeftModelForCausalLM.from_pretrained({folder.name!r})" in body
    assert str(run.parent) not in text
    assert str(folder.parent) not in text


def test_the_card_of_a_run_that_kept_its_best_model_names_its_step_and_figure(finished_run, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(finished_run("lora"), folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["config"]["train"]["keep_best"] = "eval/loss"
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with (folder / "metrics.jsonl").open("a") as file:
        file.writelines(
            json.dumps({"step": step, "eval/loss": loss}) + "\n" for step, loss in ((7, 0.02), (8, 0.01), (9, 0.03))
        )
    assert "- the model is that of step 8, the best of the run: held-out eval/loss 0.01\n" in card_of(folder)


def card_of(folder: Path) -> str:
    return make_card(FinishedRun.open(str(folder)), "mine", "adapter", "nothing", "load()")


def test_the_card_has_the_version_and_all_steps_of_the_run_also_if_it_logged_none(own_run):
    folder = own_run()
    change_manifest(folder, lambda manifest: manifest.update(saro="0.0.9"))
    lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    (folder / "metrics.jsonl").write_text("".join(line for line in lines if "grad_norm" not in line))
    (folder / "checkpoints" / "step_000123").mkdir(parents=True)
    card = card_of(folder)
    assert "with saro 0.0.9\n" in card
    assert "; 123 steps of at most" in card
    assert "training loss" not in card


def test_the_card_names_the_step_of_the_training_loss(own_run):
    folder = own_run()
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 77, "loss": 0.25, "grad_norm": 1.0}) + "\n")
    (folder / "checkpoints" / "step_000080").mkdir()
    card = card_of(folder)
    assert "; 80 steps of at most" in card
    assert "training loss of step 77 0.25\n" in card


def test_the_card_of_a_continued_adapter_names_the_run_before(own_run, tmp_path):
    folder = own_run()
    shutil.copytree(folder, tmp_path / "stage1")

    def continue_stage_1(manifest):
        manifest["start"] = str(tmp_path / "stage1" / "final")
        manifest["model"]["adapter"] = {"config": {}}

    change_manifest(folder, continue_stage_1)
    expected = "- continues the adapter stage1/final, which a run had trained before: RW, supervised fine-tuning\n"
    assert expected in card_of(folder)


@pytest.fixture
def hub(monkeypatch):
    """Stand in for the hub: collects what is sent."""
    sent: list[tuple[str, dict]] = []
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "hf_of_nobody")
    monkeypatch.setattr(huggingface_hub, "list_repo_files", lambda repo: [".gitattributes", "README.md"])
    monkeypatch.setattr(huggingface_hub, "create_repo", lambda repo, **options: sent.append((repo, options)))
    monkeypatch.setattr(
        huggingface_hub,
        "upload_folder",
        lambda repo_id, folder_path, commit_message: sent.append((repo_id, set(map(str, Path(folder_path).iterdir())))),
    )
    return sent


def test_a_pushed_export_is_uploaded_with_its_card_to_a_private_repository(finished_run, tmp_path, hub, capsys):
    folder = tmp_path / "out"
    options = Options(run=str(finished_run("lora")), output=str(folder), push="org/name")
    assert export_run(options, Console()) == 0
    assert hub[0] == ("org/name", {"private": True, "exist_ok": True})
    assert hub[1] == ("org/name", {str(file) for file in folder.iterdir()})
    assert (folder / "README.md").read_text().count("org/name") == 2
    assert capsys.readouterr().out.splitlines()[-1] == "uploaded to https://huggingface.co/org/name"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"push": "a/b/c"}, "--push a/b/c: is not the name of a repository; write it as ORG/NAME"),
        ({"push": "org/name", "token": None}, "--push needs an account of the hub: log in with hf auth login"),
        ({"public": True}, "--public is for a repository of the hub; name it with --push ORG/NAME"),
    ],
)
def test_a_push_that_cannot_succeed_is_refused_before_the_export(
    finished_run, tmp_path, hub, monkeypatch, changes, message
):
    if "token" in changes:
        monkeypatch.setattr(huggingface_hub, "get_token", lambda: changes["token"])
    given = {name: value for name, value in changes.items() if name != "token"}
    with pytest.raises(SaroError) as caught:
        export_run(Options(run=str(finished_run("lora")), output=str(tmp_path / "out"), **given), Console())
    assert str(caught.value).startswith(message)
    assert not (tmp_path / "out").exists()
    assert not hub


@pytest.mark.parametrize(
    ("merge", "file"), [(True, "adapter_config.json"), (False, "model-00001-of-00002.safetensors")]
)
def test_a_model_and_an_adapter_are_not_pushed_to_one_repository(finished_run, tmp_path, hub, monkeypatch, merge, file):
    """transformers loads an adapter that lies beside a model on top of it."""
    monkeypatch.setattr(huggingface_hub, "list_repo_files", lambda repo: ["README.md", file])
    options = Options(run=str(finished_run("lora")), output=str(tmp_path / "out"), push="org/name", merge=merge)
    with pytest.raises(SaroError, match=f"^--push org/name: holds {file}, .* in one repository; delete it there, or"):
        export_run(options, Console())
    assert not (tmp_path / "out").exists()
    assert not hub


def test_a_repository_that_cannot_be_looked_at_is_one_line_before_the_export(finished_run, tmp_path, hub, monkeypatch):
    def refuse(repo):
        raise HTTPError("no connection\nmore")

    monkeypatch.setattr(huggingface_hub, "list_repo_files", refuse)
    with pytest.raises(SaroError, match=r"^--push org/name: cannot be looked at \(no connection\); leave --push out"):
        export_run(Options(run=str(finished_run("lora")), output=str(tmp_path / "out"), push="org/name"), Console())
    assert not (tmp_path / "out").exists()


def test_a_multimodal_base_is_loaded_in_the_commit_of_the_run():
    run = SimpleNamespace(
        source=SimpleNamespace(config=tiny_config("qwen3_vl"), path="org/base"),
        is_full=False,
        options=ModelConfig(name="run/final"),
        manifest={"model": {"commit": "abc"}},
    )
    call = saro.tools.export._loader(run, Options(run="run"), "out")
    assert "from_pretrained('org/base', revision='abc', quantization_config=" in call


@pytest.mark.parametrize("error", [OSError, HTTPError])
def test_a_failed_upload_leaves_the_export_and_is_one_line(finished_run, tmp_path, hub, monkeypatch, error):
    """HTTPError is also raised if there is no connection; it is no OSError."""

    def refuse(**_):
        raise error("403 Forbidden\nmore")

    monkeypatch.setattr(huggingface_hub, "upload_folder", refuse)
    options = Options(run=str(finished_run("lora")), output=str(tmp_path / "out"), push="org/name")
    with pytest.raises(SaroError, match=r"^--push org/name: not uploaded \(403 Forbidden\); the export is in .*/out"):
        export_run(options, Console())
    assert (tmp_path / "out" / "README.md").is_file()
