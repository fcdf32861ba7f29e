"""lm-eval gets from our models the log-likelihoods of its own class for transformers models, and answers without reasoning."""

from __future__ import annotations

import random
import string
from datetime import date

import pytest

pytest.importorskip("lm_eval")

from chat_cases import HARMONY, chat_of
from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model
from lm_eval.models.huggingface import HFLM
from loaded import load
from scripted import FromPolicy, Scripted
from tiny import CHATML, IM_END, tiny_tokenizer

from saro.data.chat_format import ChatFormat
from saro.errors import SaroError
from saro.evaluate.saro_lm import SaroLM
from saro.evaluate.subjects import find_measured

pytestmark = pytest.mark.usefixtures("one_thread")

OPENS_THINKING = CHATML.replace("assistant\n' }}", "assistant\n<think>\n' }}")
CLOSES_THINKING = CHATML.replace("assistant\n' }}", "assistant\n<think>\n\n</think>\n\n' }}")


def ask(kind: str, *arguments, document: int = 0) -> Instance:
    return Instance(kind, {}, arguments, 0, ("quiz", document, 1))


def choices(*contexts: str) -> list[Instance]:
    ends = ("yes", " no", "\nmaybe so", " Maybe not at all.")
    return [ask("loglikelihood", context, end) for context in contexts for end in ends]


def a_text(characters: int) -> str:
    return "".join(random.Random(characters).choices("abcdefgh .\n", k=characters))


def no_generator():
    raise AssertionError("nothing is to be generated")


def talker(chat: ChatFormat | None = None, reply=lambda _: "4", max_length: int = 512, **options) -> SaroLM:
    """Make a model that says what ``reply`` gives, and the generator that says it as its attribute ``asked``."""
    chat = chat or a_chat()
    generator = Scripted(chat, reply)
    lm = SaroLM(chat, max_length, load_policy=no_generator, load_generator=lambda: generator, **options)
    lm.script = generator
    return lm


def a_chat(template: str = CHATML) -> ChatFormat:
    return ChatFormat(tiny_tokenizer(template), frozenset({IM_END}), date(2024, 7, 26))


@pytest.fixture(scope="module", params=["llama", "gemma3"])
def both(request, tiny_model) -> tuple[HFLM, SaroLM]:
    folder = tiny_model(request.param)
    hflm = HFLM(pretrained=folder, device="cpu", dtype="float32", batch_size=3)
    return hflm, SaroLM.of(find_measured(None, folder), pack_tokens=300)


def assert_same(theirs: list[tuple[float, bool]], ours: list[tuple[float, bool]]) -> None:
    assert [logp for logp, _ in ours] == pytest.approx([logp for logp, _ in theirs], abs=1e-4, rel=1e-6)
    assert [is_greedy for _, is_greedy in ours] == [is_greedy for _, is_greedy in theirs]


@pytest.mark.parametrize(
    "contexts",
    [
        pytest.param(["Is it so? ", "Is it so?\n\n", "Is that so?"], id="spaces at the end"),
        pytest.param(["", "<|bos|>Is it?"], id="empty"),
        pytest.param([a_text(511), a_text(512), a_text(900)], id="too long"),
    ],
)
def test_log_likelihoods_are_those_of_lm_evals_own_class(both, contexts):
    hflm, lm = both
    requests = choices(*contexts)
    assert_same(hflm.loglikelihood(requests, disable_tqdm=True), lm.loglikelihood(requests))


def test_what_greedy_decoding_gives_is_greedy_for_both(both):
    hflm, lm = both
    requests = [ask("loglikelihood", "Q" + a_text(n), end) for n in range(12) for end in string.printable.strip()]
    theirs = hflm.loglikelihood(requests, disable_tqdm=True)
    assert any(is_greedy for _, is_greedy in theirs)
    assert_same(theirs, lm.loglikelihood(requests))


@pytest.mark.parametrize("characters", [0, 1, 511, 512, 513, 1024, 1700])
def test_texts_in_windows_have_the_log_likelihood_of_lm_evals_own_class(both, characters):
    hflm, lm = both
    requests = [ask("loglikelihood_rolling", a_text(characters)), ask("loglikelihood_rolling", "Another one.")]
    theirs = hflm.loglikelihood_rolling(requests, disable_tqdm=True)
    assert lm.loglikelihood_rolling(requests) == pytest.approx(theirs, abs=1e-4, rel=1e-6)


def test_greedy_answers_are_those_of_lm_evals_own_class(both):
    hflm, lm = both
    policy = lm._scoring()
    lm = SaroLM(lm._chat, lm.max_length, load_policy=no_generator, load_generator=lambda: FromPolicy(policy, lm._chat))
    requests = [
        ask("generate_until", text, {"until": ["z", "e"], "max_gen_toks": 12, "do_sample": False})
        for text in ("Is it?", "Is it so? ", a_text(600))
    ]
    assert lm.generate_until(requests) == hflm.generate_until(requests, disable_tqdm=True)


def test_contexts_that_are_too_long_are_counted_in_one_line(tiny_model, capsys):
    lm = SaroLM.of(find_measured(None, tiny_model()))
    lm.loglikelihood(choices("Is it?", a_text(900)))
    assert "warning: 4 of 8 contexts are longer than the 512 tokens that the model reads" in capsys.readouterr().err
    assert lm.counts["cut contexts"] == 4


def test_choices_of_a_context_read_it_once(tiny_model):
    lm = SaroLM.of(find_measured(None, tiny_model()))
    lm.loglikelihood(choices("Is it?"))
    # One token per byte: the context, and of each choice all but its last; two begin alike.
    assert (
        lm.counts["tokens read"]
        == len("Is it?") + sum(map(len, ("yes", " no", "\nmaybe so", " Maybe not at all."))) - 4 - 1
    )


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (ask("loglikelihood", "Is it?", "", document=7), "task quiz, document 7: the continuation has no token"),
        (ask("loglikelihood", "Is it?", "a" * 600), "the continuation is 600 tokens, and the model reads 512"),
        (ask("loglikelihood", "Is it?<think>\n", "yes"), "the chat template opens the reasoning.*give --no_think"),
    ],
)
def test_a_continuation_that_cannot_be_scored_is_one_line(request_, message):
    lm = SaroLM(a_chat(), 512, load_policy=no_generator, load_generator=no_generator)
    with pytest.raises(SaroError, match=message):
        lm.loglikelihood([request_])


TURNS = [{"role": "user", "content": "Why?"}]
BEGUN = [*TURNS, {"role": "assistant", "content": "The answer is"}]


def test_conversations_are_rendered_as_in_training():
    dated = "{{ strftime_now('%Y-%m-%d') }} " + CHATML
    assert talker(a_chat(dated)).apply_chat_template(TURNS).startswith("2024-07-26 <|im_start|>user\nWhy?")


@pytest.mark.parametrize(
    ("template", "no_think", "turns", "end"),
    [
        (CHATML, False, TURNS, "assistant\n"),
        (CHATML, True, TURNS, "assistant\n<think>\n\n</think>\n\n"),
        (OPENS_THINKING, False, TURNS, "assistant\n<think>\n"),
        (OPENS_THINKING, True, TURNS, "assistant\n<think>\n\n</think>\n\n"),
        (CLOSES_THINKING, True, TURNS, "assistant\n<think>\n\n</think>\n\n"),
        (CHATML, False, BEGUN, "assistant\nThe answer is"),
        (CHATML, True, BEGUN, "assistant\n<think>\n\n</think>\n\nThe answer is"),
        (OPENS_THINKING, False, BEGUN, "assistant\n<think>\n\n</think>\n\nThe answer is"),
        (CLOSES_THINKING, True, BEGUN, "assistant\n<think>\n\n</think>\n\nThe answer is"),
    ],
)
def test_a_prompt_ends_where_the_answer_or_its_reasoning_begins(template, no_think, turns, end):
    lm = talker(a_chat(template), no_think=no_think)
    text = lm.apply_chat_template(turns, add_generation_prompt=turns is TURNS)
    assert text.partition("<|im_start|>")[2].partition("<|im_start|>")[2] == end


@pytest.mark.parametrize(
    ("no_think", "turns", "end"),
    [
        (False, TURNS, ""),
        (True, TURNS, "[INST]final<|eot_id|><think>\n\n</think>\n\n"),
        (False, BEGUN, "[INST]final<|eot_id|>The answer is"),
    ],
)
def test_an_answer_of_its_own_channel_begins_after_it_as_in_training(no_think, turns, end):
    lm = talker(chat_of(HARMONY), no_think=no_think)
    text = lm.apply_chat_template(turns, add_generation_prompt=turns is TURNS)
    assert text == "<|head|>user<|eot_id|>Why?<|im_end|><|head|>assistant" + end


def test_choices_right_after_the_role_are_refused_if_answers_have_a_channel():
    lm = talker(chat_of(HARMONY))
    context = lm.apply_chat_template(TURNS)
    with pytest.raises(SaroError, match=r"document 0: a model begins its answers with .*final.*; give --no_think"):
        lm.loglikelihood([ask("loglikelihood", context, "yes")])


def test_the_name_for_kept_requests_changes_with_all_that_changes_a_prompt():
    lms = [talker(), talker(no_think=True), talker(a_chat(OPENS_THINKING)), talker(name="output/srpo")]
    assert len({lm.tokenizer_name for lm in lms}) == 4
    assert not any("/" in lm.tokenizer_name for lm in lms)


def test_a_template_by_name_is_refused():
    lm = talker()
    assert (lm.chat_template(True), lm.chat_template(False)) == (CHATML, None)
    with pytest.raises(SaroError, match="--apply_chat_template tools: a run has one template; give no name"):
        lm.chat_template("tools")


def test_stop_strings_of_the_task_end_the_answer_and_not_the_reasoning():
    lm = talker(reply=lambda _: "<think>\nFirst.\n\nQ: 1?\n</think>\n\nIt is 4.\n\nQ: 2?")
    context = lm.apply_chat_template(TURNS)
    assert lm.generate_until([ask("generate_until", context, {"until": ["\n\n", "Q:"]})]) == ["It is 4."]
    assert lm.script.asked[0].sampling.stop == ()


def test_reasoning_that_did_not_end_is_an_empty_answer_and_counted(capsys):
    lm = talker(reply=lambda _: "<think>\n" + "a" * 400)
    context = lm.apply_chat_template(TURNS)
    assert lm.generate_until([ask("generate_until", context, {"until": []})] * 2) == ["", ""]
    assert lm.counts["unfinished"] == 2
    assert "2 of 2 texts reached the limit before their reasoning ended" in capsys.readouterr().err


def test_the_limit_is_the_tasks_unless_the_user_gives_one():
    requests = [ask("generate_until", "Why?", {"max_gen_toks": 9}), ask("generate_until", "How?", {})]
    lm, limited = talker(), talker(max_tokens=30)
    lm.generate_until(requests)
    limited.generate_until(requests)
    assert [request.sampling.max_tokens for request in lm.script.asked] == [9, 256]
    assert [request.sampling.max_tokens for request in limited.script.asked] == [30, 30]


def test_a_context_leaves_room_for_the_answer(capsys):
    lm = talker(max_length=20)
    lm.generate_until([ask("generate_until", "0123456789abcdef", {"max_gen_toks": 12})])
    assert lm.tokenizer.decode(lm.script.asked[0].ids) == "89abcdef"
    assert "warning: 1 of 1 contexts are longer" in capsys.readouterr().err


def test_sampled_repeats_are_draws_of_their_own_and_greedy_ones_are_not():
    lm = talker()
    sampled = ask("generate_until", "Why?", {"do_sample": True, "temperature": 0.5, "top_p": 0.9})
    greedy = ask("generate_until", "Why?", {"do_sample": False, "temperature": 0.7})
    lm.generate_until([sampled, greedy, sampled, greedy])
    asked = [(r.number, r.sampling.temperature, r.sampling.top_p) for r in lm.script.asked]
    assert asked == [(0, 0.5, 0.9), (0, 0.0, 1.0), (1, 0.5, 0.9), (0, 0.0, 1.0)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_beams": 4}, "task quiz, document 0: generation_kwargs has num_beams, which is not supported"),
        ({"repetition_penalty": 1.2}, "generation_kwargs has repetition_penalty"),
        ({"max_gen_toks": 512}, "texts of 512 tokens leave no room for a prompt in the model's 512"),
    ],
)
def test_a_task_that_asks_for_more_than_there_is_is_one_line(options, message):
    with pytest.raises(SaroError, match=message):
        talker().generate_until([ask("generate_until", "Why?", options)])


def test_only_one_of_the_two_models_is_in_memory(tiny_model):
    loaded = []
    lm = SaroLM(
        a_chat(),
        512,
        load_policy=lambda: loaded.append("policy") or load(tiny_model()),
        load_generator=lambda: loaded.append("generator") or Scripted(a_chat(), lambda _: "4"),
    )
    for _ in range(2):
        lm.loglikelihood(choices("Is it?"))
        lm.loglikelihood(choices("Is it?"))
        assert lm._generator is None
        lm.generate_until([ask("generate_until", "Why?", {})])
        assert lm._policy is None
    assert loaded == ["policy", "generator"] * 2


def test_lm_eval_knows_the_model_by_name(tiny_model, finished_run):
    model = get_model("saro")
    assert model is SaroLM
    run = finished_run()
    lm = model.create_from_arg_string(f"run={run},max_tokens=30", {"batch_size": 1, "device": None})
    assert lm._max_tokens == 30
    with pytest.raises(SaroError, match="--model_args: unknown argument runs; did you mean run"):
        model.create_from_arg_obj({"runs": str(run)})
