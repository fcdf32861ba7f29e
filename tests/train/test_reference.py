"""Reference log-probs equal the model's own, are read from the cache, and are scored again only if they must be."""

from __future__ import annotations

import gc
import json
import shutil
import socket
from dataclasses import replace
from datetime import date

import numpy as np
import pytest
import torch
from tiny import save_tiny_model, tiny_tokenizer

from saro.checks import noise as noise_module
from saro.checks.check_packs import check_packs
from saro.config import DataConfig, ModelConfig
from saro.data.dataset import PairSet
from saro.data.encode_files import encode_pair_files
from saro.data.packs import lay_out
from saro.data.records import CHOSEN, REJECTED
from saro.distributed.runtime import Runtime
from saro.errors import SaroError
from saro.model.load import load_policy
from saro.model.score import score_pairs
from saro.model.source import find_model
from saro.train import reference as module
from saro.train.reference import (
    cache_key,
    load_other_references,
    load_reference,
    load_references,
    other_reference_options,
)

CPU = torch.device("cpu")
pytestmark = pytest.mark.usefixtures("cache", "one_thread")

# Sequences that a start scores to verify the cache: two pairs with two sides, in a pack, alone, and with noise.
SPOTS = 2 * 2 * 3


@pytest.fixture
def scored(monkeypatch) -> list[int]:
    """Record the number of sequences of each pack that is scored."""
    calls: list[int] = []
    original = module.score_packs

    def counting(policy, packs):
        for pack, entries in original(policy, packs):
            calls.append(len(pack.records))
            yield pack, entries

    for user in (module, noise_module):
        monkeypatch.setattr(user, "score_packs", counting)
    return calls


def native_logps(policy, sequence) -> np.ndarray:
    tokens = torch.from_numpy(sequence.tokens.astype(np.int64))
    lm = policy.causal_lm
    lm.set_attn_implementation("sdpa")
    with torch.no_grad():
        logps = lm(input_ids=tokens[None]).logits[0, :-1].double().log_softmax(-1)
    lm.set_attn_implementation("saro_packed")
    return logps.gather(1, tokens[1:, None])[sequence.scored_from - 1 :, 0].numpy()


def test_they_equal_the_models_own_log_probs_for_every_scored_token(runtime, world):
    source, policy, data = world()
    reference = load_reference(runtime, policy, source, data, 256)
    for i in range(len(data)):
        for side, sequence in enumerate(data.sequences(i)):
            np.testing.assert_allclose(reference.side_logps(i, side), native_logps(policy, sequence), atol=2e-5)


def test_dropout_is_off_while_they_are_scored_and_the_mode_is_kept(runtime, world):
    """huggingface/trl#744: the reference was scored with dropout."""
    source, policy, data = world()
    plain = load_reference(runtime, policy, source, data, 256)
    source, noisy, _ = world(lora_dropout=0.5)
    with torch.no_grad():
        for name, parameter in noisy.trainable().items():
            if "lora_B" in name:
                parameter.normal_()
    noisy.train()
    trees = data.trees(range(len(data)), 256)
    first, second = (score_pairs(noisy, data, trees, 256) for _ in range(2))
    assert noisy.training
    np.testing.assert_array_equal(first.logps, second.logps)
    assert np.abs(first.logps - plain.logps).mean() > 0.1


def test_a_pack_gets_the_log_probs_of_its_sequences_in_order(runtime, world):
    source, policy, data = world()
    reference = load_reference(runtime, policy, source, data, 256)
    pack = lay_out(data.trees([7, 2, 6], 256))
    with torch.no_grad():
        entries = policy.eval()(pack).index_select(0, pack.entry_row)
    torch.testing.assert_close(torch.from_numpy(reference.pack_logps(pack)), entries, rtol=0, atol=1e-5)


def test_a_pack_without_trees_has_no_entries(runtime, world):
    source, policy, data = world()
    assert len(load_reference(runtime, policy, source, data, 256).pack_logps(lay_out([]))) == 0


def test_cached_and_uncached_log_probs_are_equal(runtime, world):
    source, policy, data = world()
    direct = score_pairs(policy, data, data.trees(range(len(data)), 256), 256)
    first = load_reference(runtime, policy, source, data, 256)
    again = load_reference(runtime, policy, source, data, 256)
    np.testing.assert_array_equal(first.logps, again.logps)
    np.testing.assert_array_equal(first.offsets, direct.offsets)
    np.testing.assert_allclose(first.logps, direct.logps, atol=1e-5)


def test_only_a_spot_check_is_scored_again(runtime, world, scored):
    source, policy, data = world()
    load_reference(runtime, policy, source, data, 256)
    assert sum(scored) == 2 * len(data)
    scored.clear()
    load_reference(runtime, policy, source, data, 256)
    assert sum(scored) == SPOTS


def test_pairs_on_one_prompt_are_spot_checked_within_their_noise(runtime, tmp_path, records_file, pairs):
    """They are scored in one tree and checked in two: other segments, other rounding, which a deep model amplifies."""
    folder = save_tiny_model(tmp_path / "deep", num_hidden_layers=12, hidden_size=64, intermediate_size=128)
    options = ModelConfig(name=str(folder), method="lora")
    source = find_model(options)
    policy = load_policy(source, options, CPU, seed=0)
    records = [pairs[i] | {"prompt": "One prompt for all of them."} for i in range(8)]
    chat = source.chat_format(DataConfig(), date(2024, 7, 26))
    data = encode_pair_files([records_file(records)], chat, DataConfig(pack_tokens=2048))
    assert len(data.trees(range(8), 2048)) == 1
    for _ in range(12):
        load_reference(runtime, policy, source, data, 2048)


def test_only_new_rows_are_scored(runtime, world, scored, pairs):
    source, policy, data = world(pairs[:20])
    load_reference(runtime, policy, source, data, 256)
    scored.clear()
    _, _, more = world(pairs)
    load_reference(runtime, policy, source, more, 256)
    assert sum(scored) == 2 * 4 + SPOTS


def test_another_seed_or_rank_of_a_new_adapter_needs_no_new_scores(runtime, world, scored):
    source, policy, data = world()
    load_reference(runtime, policy, source, data, 256)
    scored.clear()
    source, other, _ = world(lora_rank=4, gradient_checkpointing=True)
    load_reference(runtime, other, source, data, 512)
    assert sum(scored) == SPOTS


@pytest.mark.parametrize(
    "change",
    [{"dtype": "bfloat16"}, {"method": "qlora"}, {"head": "reference"}, {"fused_lora": False}],
    ids=["dtype", "4 bits", "head", "layers of PEFT"],
)
def test_another_way_of_computing_is_another_reference(world, change):
    """huggingface/trl#3985: a stale reference after a change of options."""
    source, policy, _ = world()
    _, other, _ = world(**change)
    assert cache_key(policy, source, CPU) != cache_key(other, source, CPU)


def test_another_device_or_version_is_another_reference(world, monkeypatch):
    source, policy, _ = world()
    here = cache_key(policy, source, CPU)
    assert cache_key(policy, source, torch.device("cuda")) != here
    monkeypatch.setattr(module, "version", lambda name: "0.0.1")
    assert cache_key(policy, source, CPU) != here


def test_moving_a_model_keeps_its_reference(world, tiny_model, tmp_path):
    source, policy, _ = world()
    moved, other, _ = world(name=str(shutil.copytree(tiny_model(), tmp_path / "moved")))
    assert cache_key(policy, source, CPU) == cache_key(other, moved, CPU)


def test_a_commit_that_changes_only_the_readme_keeps_the_reference(world, monkeypatch):
    source, policy, _ = world()
    monkeypatch.setattr("saro.model.source.weight_hashes", lambda path, commit: {"model.safetensors": "hash"})
    source.config._commit_hash = "abc"
    here = cache_key(policy, source, CPU)
    source.config._commit_hash = "def"
    assert cache_key(policy, source, CPU) == here
    monkeypatch.setattr("saro.model.source.weight_hashes", lambda path, commit: {"model.safetensors": "other"})
    assert cache_key(policy, source, CPU) != here


def test_other_code_of_the_model_is_another_reference(world, tiny_model, tmp_path):
    folder = shutil.copytree(tiny_model(), tmp_path / "coded")
    source, policy, _ = world(name=str(folder))
    source.config.auto_map = {"AutoModelForCausalLM": "modeling.Model"}
    (folder / "modeling.py").write_text("1")
    here = cache_key(policy, source, CPU)
    (folder / "modeling.py").write_text("2")
    assert cache_key(policy, source, CPU) != here


def test_another_scored_span_is_scored_separately(runtime, world, scored):
    """A cached value belongs to a scored span, so it is not used if other tokens are scored."""
    source, policy, data = world()
    whole = load_reference(runtime, policy, source, data, 256)
    scored.clear()
    parted = data.divergent()
    tail = load_reference(runtime, policy, source, parted, 256)
    assert sum(scored) == 2 * len(data)
    for i in range(len(data)):
        for side in (0, 1):
            rows = len(tail.side_logps(i, side))
            np.testing.assert_allclose(tail.side_logps(i, side), whole.side_logps(i, side)[-rows:], atol=1e-5)


def with_open_sides(pairs):
    """Return the pairs with rejected sides that end inside their reasoning."""
    return [
        pair | {"rejected": {"reasoning": pair["rejected"]["reasoning"], "answer": "", "open": True}} for pair in pairs
    ]


def test_open_sides_have_the_log_probs_of_the_whole_responses_that_they_begin(runtime, world, pairs, scored):
    source, policy, whole = world()
    all_logps = load_reference(runtime, policy, source, whole, 256)
    data = world(with_open_sides(pairs))[2]
    scored.clear()
    reference = load_reference(runtime, policy, source, data, 256)
    # The whole sides are in the cache, under other keys than the open ones, so that each pair lacks one side.
    assert sum(scored) >= 2 * len(data)
    for i in range(len(data)):
        chosen, cut = (reference.side_logps(i, side) for side in (CHOSEN, REJECTED))
        np.testing.assert_array_equal(chosen, all_logps.side_logps(i, CHOSEN))
        np.testing.assert_allclose(cut, all_logps.side_logps(i, REJECTED)[: len(cut)], atol=1e-5)
        assert len(cut) == len(data.rejected.sequence(i).row_kinds) < len(all_logps.side_logps(i, REJECTED))


def test_packs_of_open_sides_equal_the_models_own_forward(world, pairs):
    _, policy, data = world(with_open_sides(pairs))
    result = check_packs(policy, data)
    assert result.logps <= 3 * result.logps_floor


def test_a_cache_that_the_model_contradicts_is_an_error(runtime, world):
    source, policy, data = world()
    load_reference(runtime, policy, source, data, 256)
    with torch.no_grad():
        policy.causal_lm.get_decoder().norm.weight.mul_(1.001)
    with pytest.raises(SaroError, match=r"the cached reference of p\d+, p\d+ differs .*; remove the folder"):
        load_reference(runtime, policy, source, data, 256)


def test_a_kill_loses_only_what_was_scored_since_the_last_flush(runtime, world, scored, monkeypatch):
    source, policy, data = world()
    monkeypatch.setattr(module, "_FLUSH_SECONDS", 0.0)
    original = module.ReferenceCache.add
    added = []

    def dying(self, logps):
        original(self, logps)
        added.append(len(logps))
        if len(added) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(module.ReferenceCache, "add", dying)
    with pytest.raises(KeyboardInterrupt):
        load_reference(runtime, policy, source, data, 256)
    monkeypatch.setattr(module.ReferenceCache, "add", original)
    scored.clear()
    load_reference(runtime, policy, source, data, 256)
    assert sum(scored) == 2 * len(data) - sum(added) + SPOTS


def test_all_pairs_are_scored_chunk_by_chunk(runtime, world, monkeypatch):
    source, policy, data = world()
    whole = score_pairs(policy, data, data.trees(range(len(data)), 256), 256)
    monkeypatch.setattr(module, "_CHUNK_PAIRS", 5)
    np.testing.assert_allclose(load_reference(runtime, policy, source, data, 256).logps, whole.logps, atol=1e-5)


def score_on_ranks(model: str, *files: str) -> None:
    """Load the references of each file of pairs. Print how many sequences this rank scored for it, and the log-probs."""
    scored: list[int] = []
    original = module.score_packs

    def counting(policy, packs):
        for pack, entries in original(policy, packs):
            scored.append(len(pack.records))
            yield pack, entries

    module.score_packs = counting
    runtime = Runtime.start()
    options = ModelConfig(name=model, method="lora")
    source = find_model(options)
    policy = load_policy(source, options, CPU, seed=0)
    chat = source.chat_format(DataConfig(), date(2024, 7, 26))
    for file in files:
        scored.clear()
        data = encode_pair_files([file], chat, DataConfig(pack_tokens=512))
        logps = load_reference(runtime, policy, source, data, 128).logps
        print(json.dumps([sum(scored), logps.tolist()]))
    runtime.end()


def test_ranks_share_out_only_what_is_missing_and_have_the_same_log_probs(
    recipes, tiny_model, records_file, pairs, cache
):
    """Each rank has a cache folder of its own, as on machines without a common file system."""
    files = [records_file(pairs[:n], f"{n}.jsonl") for n in (20, 24)]
    arguments = [tiny_model(), *files]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        group = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    started = []
    for rank in range(2):
        own = {"RANK": str(rank), "LOCAL_RANK": "0", "SARO_CACHE": str(cache / str(rank))}
        started.append(recipes.start(*arguments, call=f"{__file__}:score_on_ranks", environment=group | own))
    ended = [process.wait() for process in started]
    assert [p.code for p in ended] == [0, 0], ended[0].err + ended[1].err
    first, second = ([json.loads(line) for line in process.out.splitlines()] for process in ended)
    for pairs_scored, (one, logps), (other, same) in zip((20, 4), first, second, strict=True):
        assert one > 0 < other
        assert one + other == 2 * pairs_scored
        assert logps == same
    assert not (cache / "1" / "reference").exists()


# Another model as the reference.


def other(runtime, world, name, sets: dict[str, PairSet], **options):
    source, _, _ = world()
    options = ModelConfig(**{"name": "the policy's, which must not be read", "method": "lora"} | options)
    options = other_reference_options(options, name)
    chat = source.chat_format(DataConfig(), date(2024, 7, 26))
    return load_other_references(runtime, find_model(options), options, chat, sets, 256)


def test_another_model_gives_its_own_log_probs(runtime, world, tiny_model):
    _, policy, data = world(name=tiny_model("qwen3"))
    reference = other(runtime, world, tiny_model("qwen3"), {"train": data}, lora_rank=3)["train"]
    np.testing.assert_allclose(reference.side_logps(3, 1), native_logps(policy, data.sequences(3)[1]), atol=2e-5)


def test_the_other_model_is_freed_afterwards(runtime, world, tiny_model):
    _, _, data = world()
    gc.collect()
    models = sum(isinstance(o, torch.nn.Embedding) for o in gc.get_objects())
    other(runtime, world, tiny_model("qwen3"), {"train": data})
    assert sum(isinstance(o, torch.nn.Embedding) for o in gc.get_objects()) == models


def test_a_model_of_another_vocabulary_is_refused(runtime, world, tmp_path):
    _, _, data = world()
    folder = save_tiny_model(tmp_path / "other", vocab_size=300)
    tiny_tokenizer(extra=("<|more|>",)).save_pretrained(folder)
    with pytest.raises(SaroError, match="has another vocabulary than the policy; give a model of its family"):
        other(runtime, world, str(folder), {"train": data})


def test_a_missing_model_is_refused(runtime, world):
    with pytest.raises(SaroError, match=r"\./gone: no such folder"):
        other(runtime, world, "./gone", {})


def test_several_sets_are_scored_in_turn(runtime, world):
    source, policy, data = world()
    sets = {"train": data, "heldout": replace(data)}
    references = load_references(runtime, policy, source, sets, 256)
    assert references.keys() == sets.keys()
    first, second = references.values()
    np.testing.assert_array_equal(first.logps, second.logps)
