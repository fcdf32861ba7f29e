"""A model on this machine: its identity, its groups and their order, choices, and what it does without memory."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from loaded import CPU, load
from tiny import IM_END, save_tiny_model, tiny_tokenizer
from transformers.models.llama import modeling_llama

from saro.config import ModelConfig
from saro.draws import local
from saro.draws.choices import ChoiceTokens, read_choices
from saro.draws.decode import continue_texts
from saro.draws.local import LocalGenerator, fit_rows, generation_dtype
from saro.draws.request import Request, Sampling
from saro.errors import SaroError
from saro.model import liger
from saro.model.source import find_model
from saro.model.unmodified import unmodified
from saro.runs.finished import FinishedRun

pytestmark = pytest.mark.usefixtures("one_thread")
STOPS = {IM_END, *range(5, 264, 16)}
REQUESTS = [
    Request(Sampling(max_tokens=limit), ids=tuple(range(100 + start, 100 + start + length)))
    for start, length, limit in ((0, 5, 8), (30, 1, 8), (7, 20, 3), (50, 5, 8), (0, 6, 8), (90, 12, 8), (60, 2, 1))
]


def generator_of(name, batch=2, **options):
    model = ModelConfig(name=str(name), **{"method": "lora", "dtype": "float32"} | options)
    return LocalGenerator.load(find_model(model), model, STOPS, CPU, batch=batch, progress=False)


def draw_all(generator, requests):
    draws = {i: draw for group in generator.draw(requests) for i, draw in group}
    return [draws[i] for i in range(len(requests))]


def ids_of(draws):
    return [draw.ids for draw in draws]


def test_every_request_gets_its_draw_in_groups_cut_in_order(tiny_model):
    generator = generator_of(tiny_model(), batch=2)
    groups = list(generator.draw(REQUESTS))
    assert generator.group_size == 4
    assert [[i for i, _ in group] for group in groups] == [[0, 1, 2, 3], [4, 5, 6]]
    expected = continue_texts(load(tiny_model(), "full"), REQUESTS, STOPS, 2)
    drawn = [draw for group in groups for _, draw in group]
    assert [(d.ids, d.finish) for d in drawn] == [(text.ids, text.finish) for text in expected]
    assert [d.usage for d in drawn] == [
        {"prompt": len(r.ids), "completion": len(d.ids)} for r, d in zip(REQUESTS, drawn, strict=True)
    ]
    assert all(d.seconds > 0 and d.failure is None and set(d.versions) == {"torch", "transformers"} for d in drawn)


def test_the_order_does_not_depend_on_how_requests_come(tiny_model):
    generator = generator_of(tiny_model())
    ordered = [REQUESTS[i] for i in generator.order(REQUESTS)]
    lengths = [len(r.ids) + r.sampling.max_tokens for r in ordered]
    assert lengths == sorted(lengths, reverse=True)
    for seed in range(5):
        shuffled = random.Random(seed).sample(REQUESTS, len(REQUESTS))
        assert [shuffled[i] for i in generator.order(shuffled)] == ordered


def test_after_an_interruption_the_groups_are_those_that_were_left(tiny_model):
    """In bfloat16, where a text depends on its neighbours by rounding, the texts are therefore the same."""
    generator = generator_of(tiny_model(), batch=2, dtype="bfloat16")
    requests = [REQUESTS[i] for i in generator.order(REQUESTS)] * 2
    requests = [replace(r, number=i) for i, r in enumerate(requests)]
    whole = draw_all(generator, requests)
    first_group = next(generator.draw(requests))
    rest = requests[len(first_group) :]
    assert ids_of(draw_all(generator, rest)) == ids_of(whole[len(first_group) :])


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_a_merged_adapter_draws_what_the_layers_of_training_draw(finished_run, method):
    run = FinishedRun.open(str(finished_run(method)))
    generators = [
        LocalGenerator.load(run.source, run.options, STOPS, CPU, merge=merge, progress=False) for merge in (True, False)
    ]
    merged, trained = (ids_of(draw_all(generator, REQUESTS)) for generator in generators)
    assert merged == trained
    assert merged == [text.ids for text in continue_texts(run.load(CPU), REQUESTS, STOPS, 4)]
    assert [generator.identity["merged"] for generator in generators] == [True, False]


def test_merging_leaves_plain_layers_in_the_dtype_that_was_asked_for(finished_run):
    run = FinishedRun.open(str(finished_run("qlora")))
    generator = LocalGenerator.load(run.source, run.options, STOPS, CPU, dtype="bfloat16", progress=False)
    assert {p.dtype for p in generator.policy.parameters()} == {torch.bfloat16}
    assert not any("lora" in name for name, _ in generator.policy.named_modules())
    assert generator.identity["dtype"] == "bfloat16"
    assert not any(p.requires_grad for p in generator.policy.parameters())


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_a_merged_model_and_its_base_are_computed_by_the_same_layers(finished_run, monkeypatch, method):
    """Were liger-kernel's put in, as in training, its rotary embedding would also stay for each model loaded later."""
    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", own_rotary := modeling_llama.apply_rotary_pos_emb)
    monkeypatch.setattr(liger, "why_not_liger", lambda model_type, device: None)
    run = FinishedRun.open(str(finished_run(method)))
    generator = LocalGenerator.load(run.source, run.options, STOPS, CPU, progress=False)
    assert not liger.uses_liger(generator.policy.causal_lm)
    assert modeling_llama.apply_rotary_pos_emb is own_rotary


def test_the_identity_is_that_of_the_files_and_of_how_they_compute(tiny_model, tmp_path, finished_run):
    identity = generator_of(tiny_model()).identity
    assert set(identity) == {
        *("kind", "files", "definition", "adapter", "method", "dtype", "merged", "stop_ids", "engine", "device")
    }
    assert identity["stop_ids"] == sorted(STOPS)
    # The same files elsewhere are the same model; without an adapter, lora and full are too.
    assert generator_of(save_tiny_model(tmp_path / "copy"), method="full").identity == identity
    others = [
        generator_of(tiny_model("qwen3")).identity,
        generator_of(tiny_model(), method="qlora").identity,
        generator_of(tiny_model(), dtype="bfloat16").identity,
        generator_of(finished_run("lora") / "final").identity,
    ]
    keys = [REQUESTS[0].key(i) for i in (identity, *others)]
    assert len(set(keys)) == len(keys)


def test_a_model_that_nothing_identifies_is_refused(tiny_model, monkeypatch):
    monkeypatch.setattr("saro.model.source.weight_hashes", lambda path, commit: {})
    with pytest.raises(SaroError, match="cannot be identified"):
        generator_of(tiny_model())


def test_a_prompt_that_fills_the_model_is_a_failure_and_others_end_where_it_ends(tmp_path):
    generator = generator_of(save_tiny_model(tmp_path / "short", max_position_embeddings=16))
    limit = Sampling(max_tokens=8)
    full, nearly, short = (Request(limit, ids=tuple(range(100, 100 + n))) for n in (16, 13, 3))
    generator._stop_ids = frozenset()
    draws = draw_all(generator, [full, nearly, short])
    assert (draws[0].failure, draws[0].ids, draws[0].finish) == ("length", None, None)
    assert draws[0].detail == "the prompt has 16 tokens, and the model reads 16"
    assert [len(draw.ids) for draw in draws[1:]] == [3, 8]
    assert [draw.finish for draw in draws[1:]] == ["length", "length"]


def test_a_request_without_ids_is_refused(tiny_model):
    with pytest.raises(ValueError, match="takes requests with ids"):
        list(generator_of(tiny_model()).draw([Request(Sampling(4), text="hello")]))


def test_choices_get_the_log_probs_of_their_first_differing_tokens(tiny_model):
    generator = generator_of(tiny_model())
    tokenizer = tiny_tokenizer()
    prompt = tuple(tokenizer.encode("Is it? ", add_special_tokens=False))
    sampling = Sampling(max_tokens=8, choices=("very good", "very bad", "very"[:4] + " ugly"))
    (draw,) = draw_all(generator, [Request(sampling, ids=prompt)])
    start = (*prompt, *tokenizer.encode("very ", add_special_tokens=False))
    policy = load(tiny_model(), "full")
    with torch.no_grad(), unmodified(policy):
        expected = policy.causal_lm(torch.tensor([start])).logits[0, -1].log_softmax(-1)
    firsts = [tokenizer.encode(letter, add_special_tokens=False)[0] for letter in "gbu"]
    assert draw.choices == pytest.approx(expected[firsts].tolist(), abs=1e-5)
    assert (draw.ids, draw.finish, draw.failure) == ((), "stop", None)
    assert sum(map(math.exp, draw.choices)) < 1


def test_choices_and_texts_may_be_asked_for_together(tiny_model):
    generator = generator_of(tiny_model())
    asked = Request(Sampling(max_tokens=8, choices=("yes", "no")), ids=REQUESTS[0].ids)
    draws = draw_all(generator, [REQUESTS[0], asked, REQUESTS[1]])
    assert ids_of([draws[0], draws[2]]) == ids_of(draw_all(generator, [REQUESTS[0], REQUESTS[1]]))
    assert draws[1].choices == pytest.approx(read_choices(generator.policy, tiny_tokenizer(), [asked])[0], abs=1e-5)


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        (("good", "great", "bad"), "'good' and 'great' begin with the same token"),
        (("un", "unsafe"), "'un' is the beginning of all others"),
        (("", "yes"), "'' is the beginning of all others, or empty"),
        (("yes", "no", "yes"), "one is there twice"),
    ],
)
def test_choices_that_one_token_does_not_tell_apart_are_refused(choices, message):
    with pytest.raises(SaroError, match=message) as caught:
        ChoiceTokens.of(choices, tiny_tokenizer())
    assert "\n" not in str(caught.value)


def out_of_memory_above(rows, monkeypatch):
    """Make every batch of more than ``rows`` texts run out of memory. Return the batches that were tried."""
    tried = []

    def continue_or_fail(policy, requests, stop_ids, batch, **options):
        tried.append(batch)
        if batch > rows:
            raise torch.OutOfMemoryError("CUDA out of memory.\nmore")
        return continue_texts(policy, requests, stop_ids, batch, **options)

    monkeypatch.setattr(local, "continue_texts", continue_or_fail)
    return tried


def test_out_of_memory_halves_the_batch_and_nothing_is_lost(tiny_model, monkeypatch):
    generator = generator_of(tiny_model(), batch=4)
    expected = ids_of(draw_all(generator, REQUESTS))
    tried = out_of_memory_above(2, monkeypatch)
    assert ids_of(draw_all(generator, REQUESTS)) == expected
    assert ids_of(draw_all(generator, REQUESTS)) == expected
    assert tried == [4, 2, 2]
    assert generator.group_size == 8


@pytest.mark.parametrize(("batch", "rows"), [(4, 1), (1, 0)])
def test_out_of_memory_again_is_one_line(tiny_model, monkeypatch, batch, rows):
    generator = generator_of(tiny_model(), batch=batch)
    out_of_memory_above(rows, monkeypatch)
    with pytest.raises(SaroError, match=r"out of memory with \d texts at a time .*; lower the batch") as caught:
        draw_all(generator, REQUESTS)
    assert "\n" not in str(caught.value)


def test_rows_are_halved_until_their_cache_fits(tiny_model):
    config = find_model(ModelConfig(name=tiny_model())).config
    per_token = 2 * 2 * 2 * 8 * 4  # layers, keys and values, key heads, head size, bytes
    for free, rows in ((10**9, 24), (100 * per_token * 18, 12), (100 * per_token * 2, 1)):
        assert fit_rows(config, torch.float32, 100, 24, free) == rows
    with pytest.raises(SaroError, match=r"needs .* GiB of cache"):
        fit_rows(config, torch.float32, 100, 24, per_token)


@pytest.mark.parametrize(("capabilities", "dtype"), [({"avx512_bf16": True}, "bfloat16"), ({}, "float32")])
def test_auto_is_bfloat16_where_a_cpu_has_instructions_for_it(monkeypatch, capabilities, dtype):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    assert generation_dtype("auto", CPU) == getattr(torch, dtype)
    assert generation_dtype("float32", CPU) == torch.float32


def test_a_batch_of_nothing_is_refused(tiny_model):
    with pytest.raises(SaroError, match="batch is 0"):
        generator_of(tiny_model(), batch=0)


@pytest.mark.parametrize(("device", "rows"), [("cpu", 64), ("cuda", 256)])
def test_the_default_batch_is_larger_on_a_gpu(device, rows):
    policy = SimpleNamespace(causal_lm=SimpleNamespace(device=torch.device(device)))
    assert LocalGenerator(policy, {}, tiny_tokenizer(), STOPS).group_size == 2 * rows
