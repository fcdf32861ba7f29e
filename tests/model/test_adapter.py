"""Training continues from a saved adapter, with its rank, weights and base, or one line says what is wrong with it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from loaded import a_pack, load, refused
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file, save_file
from tiny import KINDS_OF_LOGITS, KINDS_OF_MODEL, save_tiny_model
from transformers import AutoModelForCausalLM

from saro.config import ModelConfig
from saro.errors import SaroError
from saro.files import file_hash
from saro.model.adapter import find_adapter
from saro.model.attention import use_packed_attention
from saro.model.load import load_policy
from saro.model.merge import merge
from saro.model.policy import Policy
from saro.model.source import find_model
from saro.runs.finish import save_final

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def base(tiny_model) -> str:
    return tiny_model()


def save_adapter(base: str, folder: Path) -> Path:
    """Save an adapter of rank 4 that changes the model's output."""
    policy = load(base, lora_rank=4, lora_alpha=12)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in policy.trainable().values():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    folder.parent.mkdir()
    save_final(folder, policy.model, find_model(ModelConfig(name=base)).tokenizer)
    return folder


@pytest.fixture
def adapter(base, tmp_path) -> Path:
    return save_adapter(base, tmp_path / "run" / "final")


def change_config(adapter: Path, **changes: object) -> None:
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def change_weights(adapter: Path, change) -> None:
    weights = load_file(adapter / "adapter_model.safetensors")
    change(weights)
    save_file(weights, adapter / "adapter_model.safetensors")


@pytest.mark.parametrize("kind", [*KINDS_OF_MODEL, *KINDS_OF_LOGITS])
def test_the_policy_starts_where_the_adapter_ended(tiny_model, tmp_path, kind):
    base = tiny_model(kind)
    adapter = save_adapter(base, tmp_path / "run" / "final")
    peft = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter)
    use_packed_attention(peft.get_base_model())
    torch.testing.assert_close(load(adapter)(a_pack()), Policy(peft)(a_pack()), rtol=1e-5, atol=1e-6)


def test_the_policy_has_one_adapter_in_fp32_with_the_saved_rank_and_alpha(adapter):
    policy = load(adapter, dtype="bfloat16")
    (config,) = policy.model.peft_config.values()
    assert (config.r, config.lora_alpha, config.inference_mode) == (4, 12, False)
    trainable = policy.trainable()
    assert {p.dtype for p in trainable.values()} == {torch.float32}
    assert {name.replace(".default", "") for name in trainable} == set(load_file(adapter / "adapter_model.safetensors"))


def test_saving_again_writes_one_adapter_on_the_original_base(base, adapter, tmp_path):
    save_final(tmp_path / "again", load(adapter).model, find_model(ModelConfig(name=str(adapter))).tokenizer)
    assert json.loads((tmp_path / "again" / "adapter_config.json").read_text())["base_model_name_or_path"] == base
    old, new = (load_file(f / "adapter_model.safetensors") for f in (adapter, tmp_path / "again"))
    assert old.keys() == new.keys()
    assert all(torch.equal(old[name], new[name]) for name in old)


def test_qlora_continues_an_adapter_too(adapter):
    assert load(adapter, "qlora").trainable().keys() == load(adapter, "lora").trainable().keys()


def test_the_tokenizer_is_the_one_saved_with_the_adapter(adapter):
    config = json.loads((adapter / "tokenizer_config.json").read_text())
    (adapter / "chat_template.jinja").unlink(missing_ok=True)
    (adapter / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": "of the run"}))
    assert find_model(ModelConfig(name=str(adapter))).tokenizer.chat_template == "of the run"


def test_dropout_may_change(adapter):
    assert load(adapter).model.peft_config["default"].lora_dropout == 0
    assert load(adapter, lora_dropout=0.25).model.peft_config["default"].lora_dropout == 0.25


@pytest.mark.parametrize(
    ("option", "value", "own"),
    [
        ("lora_rank", 8, "4"),
        ("lora_alpha", 16, "12"),
        ("lora_rslora", True, "False"),
        ("lora_targets", ["q_proj"], "{.*}"),
    ],
)
def test_an_option_that_conflicts_with_the_adapter_is_refused(adapter, option, value, own):
    refused(adapter, f"model.{option} is .*, and the adapter in .* has {own}; leave the option out", **{option: value})


def test_options_that_agree_with_the_adapter_are_accepted(adapter):
    targets = ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
    assert load(adapter, lora_rank=4, lora_alpha=12, lora_targets=targets).trainable()


@pytest.mark.parametrize("fused", [True, False])
def test_rslora_scales_by_the_root_of_the_rank_in_training_in_peft_and_after_a_merge(tiny_model, tmp_path, fused):
    """Kalajdzievski 2023, arXiv 2312.03732: alpha / sqrt(r), where PEFT's default is alpha / r."""
    policy = load(tiny_model(), lora_rank=4, lora_alpha=6, lora_rslora=True, fused_lora=fused)
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in policy.trainable().values():
            parameter.normal_(std=0.1)
    layer = policy.causal_lm.get_submodule("model.layers.0.mlp.up_proj")
    assert layer.scaling == {"default": 3.0}
    save_final(tmp_path / "final", policy.model, find_model(ModelConfig(name=tiny_model())).tokenizer)
    base = AutoModelForCausalLM.from_pretrained(tiny_model())
    peft = PeftModel.from_pretrained(base, tmp_path / "final").eval()
    assert peft.peft_config["default"].use_rslora
    pack = a_pack((20,))
    with torch.no_grad():
        rows = peft(input_ids=pack.input_ids[None]).logits[0, pack.row_hidden].log_softmax(-1)
        expected = rows.gather(1, pack.row_target[:, None])[:, 0]
        torch.testing.assert_close(policy(pack), expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(load(tmp_path / "final")(pack), expected, rtol=1e-5, atol=1e-5)
        stored = layer.get_base_layer().weight
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        merged = merge(policy, policy.causal_lm.config, torch.float32)
        weight = merged.get_submodule("model.layers.0.mlp.up_proj").weight
        torch.testing.assert_close(weight, stored + 3 * b @ a)


def test_full_fine_tuning_of_an_adapter_is_refused(adapter):
    refused(adapter, "an adapter cannot be trained with --model.method full", "full")


def test_an_adapter_with_a_missing_weight_is_refused(adapter):
    change_weights(adapter, lambda weights: weights.pop(next(iter(weights))))
    refused(adapter, "does not fit the adapter's config or its base: .*lora_A")


def test_weights_of_another_rank_are_refused(adapter):
    change_config(adapter, r=3)
    refused(adapter, "does not fit the base model")


def test_a_truncated_file_is_refused(adapter):
    file = adapter / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    refused(adapter, "does not fit the base model")


def test_pickled_adapter_weights_are_refused(adapter):
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    refused(adapter, "the adapter has no adapter_model.safetensors; save it with peft as safetensors")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "PREFIX_TUNING"}, "an adapter of type PREFIX_TUNING cannot be continued; only LORA can"),
        ({"modules_to_save": ["lm_head"]}, "the adapter has modules_to_save, weights of its own that the fused head"),
        ({"bias": "all"}, "the adapter trains biases, which is not supported"),
        ({"base_model_name_or_path": None}, "names no base model"),
        ({"base_model_name_or_path": "./gone"}, "./gone: no such folder"),
    ],
)
def test_an_adapter_that_cannot_be_continued_is_refused(adapter, changes, message):
    change_config(adapter, **changes)
    refused(adapter, message)


def test_a_broken_config_is_refused(adapter):
    (adapter / "adapter_config.json").write_text("{")
    refused(adapter, "is not an adapter config")


def test_an_adapter_on_the_head_is_refused(adapter):
    """huggingface/peft#2777: if the head is tied, a merge would change the embedding too."""
    change_config(adapter, target_modules=["lm_head"])
    refused(adapter, "the adapter is on the embedding or the LM head")


def test_another_base_than_the_one_it_was_trained_on_is_refused(base, adapter, tmp_path):
    """unslothai/unsloth-zoo#810: an adapter was merged into a base that it was not trained on."""
    files = {"model.safetensors": file_hash(Path(base) / "model.safetensors")}
    began = {"model": {"files": files, "commit": None}}
    (adapter.parent / "manifest.json").write_text(
        json.dumps({"saro": "0.1.0", "config": {}, "template_date": "2024-07-26"} | began)
    )
    assert find_model(ModelConfig(name=str(adapter))).adapter == str(adapter)
    other = save_tiny_model(tmp_path / "other", hidden_size=32, intermediate_size=32)
    change_config(adapter, base_model_name_or_path=str(other))
    refused(adapter, "was trained on another model.safetensors than that of .*other; restore the base model")


def test_another_commit_of_a_hub_base_is_refused(adapter):
    began = {"model": {"files": {}, "commit": "abc"}}
    (adapter.parent / "manifest.json").write_text(
        json.dumps({"saro": "0.1.0", "config": {}, "template_date": "2024-07-26"} | began)
    )
    source = find_adapter(str(adapter))
    source.check_base("org/model", "abc")
    with pytest.raises(SaroError, match=r"was trained on commit abc of org/model; set --model\.revision abc"):
        source.check_base("org/model", "def")


def test_a_copied_adapter_loads_only_the_commit_of_its_base(base, tmp_path):
    """Without it peft, and a later run, would load whatever the hub has by then."""
    options = ModelConfig(name=base)
    source = find_model(options)
    source.config._commit_hash = "a" * 40
    save_final(tmp_path / "copy", load_policy(source, options, torch.device("cpu"), 0).model, source.tokenizer)
    assert LoraConfig.from_pretrained(tmp_path / "copy").revision == "a" * 40
    adapter = find_adapter(str(tmp_path / "copy"))
    adapter.check_base("org/model", "a" * 40)
    adapter.check_base("a local copy", None)
    with pytest.raises(SaroError, match=rf"was trained on commit a+ of org/model; set --model\.revision {'a' * 40}"):
        adapter.check_base("org/model", "b" * 40)


def test_an_adapter_on_a_base_in_a_folder_names_no_commit(adapter):
    assert LoraConfig.from_pretrained(adapter).revision is None


def test_the_identity_tells_adapters_apart(base, adapter, tmp_path):
    plain = find_model(ModelConfig(name=base)).identity()
    first = find_model(ModelConfig(name=str(adapter))).identity()
    copy = shutil.copytree(adapter, tmp_path / "copy")
    assert first["files"] == plain["files"]
    assert (plain["adapter"], first["adapter"] is None) == (None, False)
    assert find_model(ModelConfig(name=str(copy))).identity() == first
    change_weights(copy, lambda weights: next(iter(weights.values())).add_(1))
    assert find_model(ModelConfig(name=str(copy))).identity()["adapter"] != first["adapter"]
