"""Tests against bugs of other trainers. Each names the public thread that reports the bug."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from datetime import date
from pathlib import Path

import numpy as np
import pytest
import torch
from run_files import metrics_of, scored_lines
from tiny import CHATML, IM_END, PAD, save_tiny_model, tiny_tokenizer

import saro.checks.noise
import saro.train.reference
from saro.checks.check_masks import check_masks
from saro.config import DataConfig, ModelConfig, PreferenceConfig, TrainConfig
from saro.data.chat_format import ChatFormat
from saro.data.dataset import ExampleSet, PairSet
from saro.data.encode_files import encode_files, encode_pair_files
from saro.data.packs import Pack, PairLogps, lay_out
from saro.data.records import Example, Message, Response
from saro.data.steps import Schedule, Steps
from saro.data.tree import build_tree
from saro.errors import SaroError
from saro.files import file_hash
from saro.model.architectures import TokenLimits
from saro.model.attention import native_attention
from saro.model.load import load_policy
from saro.model.policy import Policy
from saro.model.score import score_pairs
from saro.model.source import find_model
from saro.runs.finish import save_final
from saro.train.check_start import check_start
from saro.train.optim import make_optimizer
from saro.train.reference import load_reference
from saro.train.rw_objective import RWObjective
from saro.train.srpo_objective import SRPOObjective

DAY = date(2024, 7, 26)


@pytest.fixture
def chat() -> ChatFormat:
    return ChatFormat(tiny_tokenizer(), frozenset([IM_END]), DAY)


@pytest.fixture
def policy(tiny_model) -> Policy:
    return _policy(tiny_model(), "lora")


@pytest.fixture
def data(chat, records_file, examples) -> ExampleSet:
    return encode_files([records_file(examples)], chat, DataConfig(pack_tokens=2048))


def _policy(folder: str, method: str) -> Policy:
    options = ModelConfig(name=folder, method=method)
    return load_policy(find_model(options), options, torch.device("cpu"), seed=0)


def _example(answer: str = "Four.", reasoning: str | None = "Two and two.", prompt: str = "2 + 2?") -> Example:
    return Example("r1", "general", (Message("user", prompt),), Response(reasoning, answer), "file.jsonl:1")


def _pack(data: ExampleSet, records: range) -> Pack:
    return lay_out([build_tree([data.sequence(r)]) for r in records])


def _gradient(policy: Policy, data: ExampleSet, packs: list[Pack], rows: int) -> torch.Tensor:
    """Return the gradient of the mean over ``rows`` rows, from any number of packs, as one vector."""
    policy.zero_grad()
    objective = RWObjective(data.kinds)
    for pack in packs:
        (objective(policy(pack), pack).losses["rows"] / rows).backward()
    return torch.cat([p.grad.flatten() for p in policy.trainable().values()])


def test_the_stop_token_is_scored_and_is_the_last_scored_token(chat):
    """huggingface/trl#5988: a mask without the stop token teaches the model never to stop."""
    sequence = chat.encode(_example())
    assert sequence.tokens[-1] == IM_END
    assert IM_END not in sequence.tokens[sequence.scored_from : -1]
    assert len(sequence.row_kinds) == len(sequence.tokens) - sequence.scored_from


def test_a_template_that_writes_bos_leads_to_one_bos(chat):
    """huggingface/trl#1400: the template writes a BOS and the tokenizer adds another."""
    tokenizer = tiny_tokenizer("{{ bos_token }}" + CHATML)
    sequence = ChatFormat(tokenizer, frozenset([IM_END]), DAY).encode(_example())
    assert sequence.tokens.tolist().count(tokenizer.bos_token_id) == 1


def test_two_bos_in_the_text_are_refused():
    """huggingface/trl#1400, the other way round: the record's text begins with the BOS that the template writes too."""
    template = "{{ bos_token }}{% for m in messages %}{{ m['content'] + '<|im_end|>' }}{% endfor %}"
    chat = ChatFormat(tiny_tokenizer(template), frozenset([IM_END]), DAY)
    with pytest.raises(SaroError, match=r"file\.jsonl:1: the prompt begins with two BOS"):
        chat.encode(_example(prompt="<|bos|>2 + 2?"))


def test_every_record_has_scored_tokens(chat, data):
    """unslothai/unsloth#1128: all labels masked, a loss of zero or NaN, and no error."""
    assert (data.scored_tokens >= 2).all()
    check_masks(data, chat, [], TokenLimits(1000))
    without_stop = replace(data, tokens=np.where(data.tokens == IM_END, PAD, data.tokens))
    with pytest.raises(SaroError, match="record r0: the scored tokens do not end with their only stop token"):
        check_masks(without_stop, chat, [], TokenLimits(1000))


def test_a_long_prompt_is_an_error_and_never_cuts_the_completion(chat, records_file):
    """huggingface/trl#3927 and #6668: truncation to a maximal length removed the completion, and training continued."""
    file = records_file([{"prompt": "long " * 200, "answer": "the only words that are trained on"}])
    with pytest.raises(SaroError, match=r"records\.jsonl:1: \d+ tokens, more than the 512 allowed; nothing is cut"):
        encode_files([file], chat, DataConfig(pack_tokens=512))


def test_packed_records_do_not_see_each_other(policy, data):
    """hiyouga/LLaMA-Factory#7318 and huggingface/trl#3910: packed records attended to their neighbours."""
    together = policy(_pack(data, range(4)))
    alone = torch.cat([policy(_pack(data, range(r, r + 1))) for r in range(4)])
    torch.testing.assert_close(together, alone, rtol=0, atol=2e-6)
    leaking = policy(_pack(data, range(4)), isolated=False)
    assert (leaking - alone).abs().mean() > 1e-2


def test_accumulated_packs_weight_tokens_equally_however_they_are_split(policy, data):
    """huggingface/transformers#34191: the mean of micro-batch means gives tokens of short batches more weight."""
    rows = int(data.scored_tokens[:6].sum())
    whole = _gradient(policy, data, [_pack(data, range(6))], rows)
    uneven = _gradient(policy, data, [_pack(data, range(1)), _pack(data, range(1, 6))], rows)
    torch.testing.assert_close(uneven, whole, rtol=1e-4, atol=1e-6)
    mean_of_means = sum(
        _gradient(policy, data, [_pack(data, part)], int(data.scored_tokens[part.start : part.stop].sum())) / 2
        for part in (range(1), range(1, 6))
    )
    assert (mean_of_means - whole).norm() > 0.01 * whole.norm(), "the control must differ"


def test_a_run_resumed_mid_epoch_sees_the_same_records(data):
    """huggingface/accelerate#4233: after a resume mid-epoch the data came in a different order."""
    unbroken = Schedule(data.kinds, records_per_step=5, seed=7)
    in_order = [unbroken.records(step).tolist() for step in range(12)]
    resumed = Schedule(data.kinds, records_per_step=5, seed=7)
    assert [resumed.records(step).tolist() for step in range(7, 12)] == in_order[7:]


def test_small_updates_are_not_lost_because_adapters_are_fp32(tiny_model, data):
    """Adapters in bfloat16 lose updates below 1/256 of a weight; a small learning rate then trains nothing."""

    def changed_share(dtype: torch.dtype) -> float:
        policy = _policy(tiny_model(), "lora")
        trained = [p for name, p in policy.trainable().items() if "lora_A" in name]
        # lora_B starts at zero, where the gradient of lora_A is zero too.
        for name, parameter in policy.trainable().items():
            parameter.data = (parameter.data + 0.1 * ("lora_B" in name)).to(dtype)
        before = [p.detach().clone() for p in trained]
        optimizer = torch.optim.AdamW(policy.trainable().values(), lr=1e-5, weight_decay=0.0)
        _gradient(policy, data, [_pack(data, range(4))], 1)
        optimizer.step()
        changed = sum((p != b).sum().item() for p, b in zip(trained, before, strict=True))
        return changed / sum(p.numel() for p in trained)

    assert {p.dtype for p in _policy(tiny_model(), "qlora").trainable().values()} == {torch.float32}
    assert changed_share(torch.float32) > 0.99
    assert changed_share(torch.bfloat16) < 0.2, "the control must lose updates"


def test_pad_equal_to_eos_changes_nothing(chat):
    """A mask made by comparing with the pad token also hides the stop token if both are the same token."""
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    assert tokenizer.pad_token_id == IM_END != PAD
    same = ChatFormat(tokenizer, frozenset([IM_END]), DAY).encode(_example())
    other = chat.encode(_example())
    assert same.tokens.tolist() == other.tokens.tolist()
    assert same.scored_from == other.scored_from


def test_a_template_that_drops_the_reasoning_does_not_drop_it_from_training():
    """huggingface/trl#6363: templates cut <think>...</think> out of assistant turns, including the one to train on."""
    dropping = CHATML.replace("m['content']", "m['content'].split('</think>')[-1]")
    tokenizer = tiny_tokenizer(dropping)
    sequence = ChatFormat(tokenizer, frozenset([IM_END]), DAY).encode(_example())
    completion = tokenizer.decode(sequence.tokens[sequence.scored_from :])
    assert completion == "<think>\nTwo and two.\n</think>\n\nFour.<|im_end|>"


def test_a_template_that_prints_todays_date_prints_the_day_of_the_run():
    """Llama 3 templates print the date: prompts, reference log-probs and evaluation then change overnight."""
    tokenizer = tiny_tokenizer("{{ strftime_now('%d %B %Y') }}" + CHATML)
    chat = ChatFormat(tokenizer, frozenset([IM_END]), DAY)
    assert "26 Jul" in chat.render_prompt([Message("user", "Hello")])
    assert date.today().strftime("%d %b %Y") not in chat.render_prompt([Message("user", "Hello")])


def test_generation_between_steps_leaves_qlora_gradients_alone(tiny_model, data):
    """On AVX512-BF16 CPUs, bitsandbytes repacks 4-bit weights in place in the first pass without gradient."""
    policy = _policy(tiny_model(), "qlora")
    pack = _pack(data, range(4))
    before = _gradient(policy, data, [pack], 1)
    policy.eval()
    with torch.no_grad(), native_attention(policy.causal_lm):
        policy.causal_lm.generate(pack.input_ids[None, :8], max_new_tokens=3, do_sample=False)
    policy.train()
    assert torch.equal(_gradient(policy, data, [pack], 1), before)


def test_every_trainable_parameter_is_in_the_optimizer_once(policy):
    """A parameter in no group is never trained; one in two groups is trained twice."""
    optimizer = make_optimizer(policy.trainable().values(), TrainConfig())
    held = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(held) == sorted(id(p) for p in policy.trainable().values())


# Preference optimization.


@pytest.fixture
def preferences(chat, records_file, pairs) -> PairSet:
    return encode_pair_files([records_file(pairs, "pairs.jsonl")], chat, DataConfig(pack_tokens=2048))


@pytest.fixture
def after_stage_1(tiny_model, tmp_path) -> str:
    """Return the folder of an adapter whose outputs differ from those of its base."""
    policy = _policy(tiny_model(), "lora")
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in policy.trainable().values():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    (tmp_path / "rw").mkdir()
    save_final(tmp_path / "rw" / "final", policy.model, tiny_tokenizer())
    return str(tmp_path / "rw" / "final")


def _reference(runtime, folder: str, preferences: PairSet, **options) -> tuple[Policy, PairLogps]:
    options = ModelConfig(**{"name": folder, "method": "lora"} | options)
    source = find_model(options)
    policy = load_policy(source, options, torch.device("cpu"), seed=0)
    return policy, load_reference(runtime, policy, source, preferences, 256)


def _objective(preferences: PairSet, reference: PairLogps, **options) -> SRPOObjective:
    return SRPOObjective(preferences.kinds, reference, PreferenceConfig(**options))


@pytest.fixture
def scorings(monkeypatch) -> list[int]:
    """Record the number of sequences in each pack that is scored for a reference."""
    found: list[int] = []
    original = saro.train.reference.score_packs

    def counting(*arguments):
        for pack, entries in original(*arguments):
            found.append(len(pack.records))
            yield pack, entries

    for user in (saro.train.reference, saro.checks.noise):
        monkeypatch.setattr(user, "score_packs", counting)
    return found


def test_the_reference_holds_the_adapter_of_stage_1(runtime, tiny_model, after_stage_1, preferences, cache):
    """hiyouga/LLaMA-Factory#8459 and #8974: the reference was the base model, without the SFT adapter."""
    policy, reference = _reference(runtime, after_stage_1, preferences)
    pack = lay_out(preferences.trees(range(4), 256))
    now = policy(pack).detach().index_select(0, pack.entry_row)
    torch.testing.assert_close(torch.from_numpy(reference.pack_logps(pack)), now, rtol=0, atol=1e-5)
    _, of_base = _reference(runtime, tiny_model(), preferences)
    assert (torch.from_numpy(of_base.pack_logps(pack)) - now).abs().mean() > 0.05, "the control must differ"


def test_a_reference_is_never_used_for_other_tokens(runtime, tiny_model, preferences, cache, scorings):
    """huggingface/trl#3985: after a change of lengths or template, old log-probs were used."""
    _reference(runtime, tiny_model(), preferences)
    other = replace(preferences, chosen=replace(preferences.chosen, tokens=preferences.chosen.tokens.copy()))
    other.chosen.tokens[other.chosen.offsets[3] + 5] += 1
    scorings.clear()
    policy, reference = _reference(runtime, tiny_model(), other)
    assert sum(scorings) == 2 + 12  # that pair, and the spot check of two pairs in three ways
    pack = lay_out(other.trees([3], 256))
    now = policy(pack).detach().index_select(0, pack.entry_row)
    torch.testing.assert_close(torch.from_numpy(reference.pack_logps(pack)), now, rtol=0, atol=1e-5)


def test_a_reference_is_never_used_for_another_dtype(runtime, tiny_model, preferences, cache, scorings):
    """huggingface/trl#3985, but after a change of options."""
    _reference(runtime, tiny_model(), preferences)
    scorings.clear()
    _reference(runtime, tiny_model(), preferences, dtype="bfloat16")
    assert sum(scorings) == 2 * len(preferences)


def test_another_beta_needs_no_new_reference(runtime, tiny_model, preferences, cache, scorings):
    """Other trainers recompute the reference for every run of a sweep."""
    first = _reference(runtime, tiny_model(), preferences)[1]
    scorings.clear()
    again = _reference(runtime, tiny_model(), preferences)[1]
    assert sum(scorings) == 12
    np.testing.assert_array_equal(first.logps, again.logps)
    pack = lay_out(preferences.trees(range(4), 256))
    logps = torch.zeros(pack.rows)
    losses = [_objective(preferences, again, beta=beta)(logps, pack).losses["pairs"].item() for beta in (0.1, 0.5)]
    assert losses[0] != pytest.approx(losses[1])


def test_the_reference_of_a_resumed_run_is_its_start(srpo, srpo_arguments, rw_final, cache, tmp_path):
    """Other trainers take the resumed weights as the reference. Here it is the start, even if it is scored again."""
    options = {"model_name": rw_final, "train_save_every": 2}
    assert srpo(*srpo_arguments(train_output=tmp_path / "unbroken", **options)).code == 0
    assert srpo(*srpo_arguments(train_max_steps=2, **options)).code == 0
    (tmp_path / "run" / "config.yaml").unlink()
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    manifest["config"]["train"]["max_steps"] = 4
    # Make it look as if the first part had been stopped after two of four steps.
    (tmp_path / "run" / "manifest.json").write_text(json.dumps(manifest))
    for name in ("after.json", "final"):
        target = tmp_path / "run" / name
        target.unlink() if target.is_file() else shutil.rmtree(target)
    for shard in cache.rglob("shards/*.safetensors"):
        shard.unlink()
    done = srpo(*srpo_arguments("--resume", **options))
    assert done.code == 0, done.err
    assert scored_lines(done.err) == ["reference: scoring 24 of 24 pairs", "reference: scoring 5 of 5 pairs"]
    assert "loss 0.6931 at the start" in done.err
    assert metrics_of(tmp_path / "run")[2]["rewards/margins"] > 0


def test_dropout_is_off_while_the_reference_is_scored(runtime, after_stage_1, preferences, cache):
    """huggingface/trl#744: the reference was scored with dropout."""
    _, quiet = _reference(runtime, after_stage_1, preferences)
    policy, _ = _reference(runtime, after_stage_1, preferences, lora_dropout=0.5)
    policy.train()
    noisy = score_pairs(policy, preferences, preferences.trees(range(len(preferences)), 256), 256)
    np.testing.assert_allclose(noisy.logps, quiet.logps, atol=1e-5)
    assert policy.training


def test_the_prompt_comes_from_the_record_and_not_from_the_common_start_of_the_answers(chat, records_file):
    """huggingface/trl#6472: the prompt was guessed from the common text of the two answers."""
    record = {"prompt": "Hi", "chosen": {"answer": "Well, yes."}, "rejected": {"answer": "Well, no."}}
    found = encode_pair_files([records_file([record])], chat, DataConfig(pack_tokens=512))
    prompt = chat.prompt_ids([Message("user", "Hi")])
    for side in found.sequences(0):
        assert side.scored_from == len(prompt)
        assert side.tokens[: len(prompt)].tolist() == prompt
    assert found.shared_tokens[0] == len(prompt) + len("Well, ")


@pytest.mark.parametrize(("loss", "value"), [("sigmoid", np.log(2)), ("hinge", 1.0), ("ipo", 1 / (4 * 0.1**2))])
def test_the_loss_of_the_first_step_is_its_value_at_margin_zero(
    runtime, after_stage_1, preferences, cache, loss, value
):
    """allenai/open-instruct#1900: it was not ln 2."""
    policy, reference = _reference(runtime, after_stage_1, preferences)
    steps = Steps(preferences, Schedule(preferences.kinds, 4, 0), 256)
    found = check_start(runtime, policy, _objective(preferences, reference, loss=loss), steps[0], preferences, 256)
    assert found.loss == pytest.approx(value, rel=1e-4)


def test_the_nll_term_weights_chosen_tokens_equally_however_a_step_is_packed(runtime, tiny_model, preferences, cache):
    """A term normalised by micro-batch gives the tokens of small batches more weight."""
    policy, reference = _reference(runtime, tiny_model(), preferences)
    objective = _objective(preferences, reference, nll=2.0)

    def gradient(cuts: list[list[int]]) -> torch.Tensor:
        policy.zero_grad()
        counts = objective.counts(preferences.trees([r for records in cuts for r in records], 10_000))
        for records in cuts:
            pack = lay_out(preferences.trees(records, 10_000))
            sums = objective(policy(pack), pack)
            sum(value / counts[name] for name, value in sums.losses.items()).backward()
        return torch.cat([p.grad.flatten() for p in policy.trainable().values()])

    whole = gradient([[0, 5, 11, 14]])
    torch.testing.assert_close(gradient([[0], [5, 11, 14]]), whole, rtol=1e-4, atol=1e-6)


def test_an_adapter_is_never_loaded_on_a_base_other_than_its_own(after_stage_1, tiny_model, tmp_path):
    """unslothai/unsloth-zoo#810: an adapter was merged into the wrong base."""
    files = {"model.safetensors": file_hash(Path(tiny_model()) / "model.safetensors")}
    began = {"model": {"files": files, "commit": None}}
    (Path(after_stage_1).parent / "manifest.json").write_text(
        json.dumps({"saro": "0.1.0", "config": {}, "template_date": "2024-07-26"} | began)
    )
    find_model(ModelConfig(name=after_stage_1))
    other = save_tiny_model(tmp_path / "other", intermediate_size=32)
    config = Path(after_stage_1) / "adapter_config.json"
    changed = json.loads(config.read_text()) | {"base_model_name_or_path": str(other)}
    config.write_text(json.dumps(changed))
    with pytest.raises(SaroError, match=r"was trained on another model\.safetensors than that of .*other"):
        find_model(ModelConfig(name=after_stage_1))


@pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
def test_an_adapter_never_touches_a_tied_head(tiny_model, target):
    """huggingface/peft#2777: merging an adapter of a tied head changes the embedding too."""
    options = ModelConfig(name=tiny_model(), method="lora", lora_targets=[target])
    with pytest.raises(SaroError, match="if the two are tied, a merge would change both"):
        load_policy(find_model(options), options, torch.device("cpu"), seed=0)
