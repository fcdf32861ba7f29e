"""Tests that the prompt is the inference prompt and that the completion follows it and ends with the stop token."""

import re
from datetime import date, datetime

import pytest
from chat_cases import (
    CHATS,
    DAY,
    DROPS_THINK,
    HARMONY,
    LLAMA3,
    MISTRAL,
    OPENS_THINK,
    QWEN3,
    START,
    STOP,
    TEMPLATES,
    TOKENS,
    chat_of,
    written,
)
from hypothesis import given
from hypothesis import strategies as st
from tiny import BOS, CHATML, IM_END, IM_START, tiny_tokenizer
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from saro.data.chat_format import ChatFormat
from saro.data.records import Example, Message, Response, parse_example, parse_pair
from saro.data.tree import RowKind
from saro.errors import SaroError

SECRET = "do not print me"
every_template = pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)


def ask(prompt="Why?", reasoning="Because.", answer="So.") -> Example:
    """Make an example. The prompt is a string for one user turn, or (role, content) pairs."""
    turns = [("user", prompt)] if isinstance(prompt, str) else prompt
    return Example("a", "general", tuple(Message(*turn) for turn in turns), Response(reasoning, answer), "data.jsonl:7")


def raw(prompt: str, completion: str) -> Example:
    return Example("a", "general", prompt, Response(None, completion), "data.jsonl:7")


def texts(chat: ChatFormat, example: Example) -> tuple[str, str]:
    """Return prompt and completion as the model reads them."""
    sequence = chat.encode(example)
    decode = chat.tokenizer.decode
    return decode(sequence.tokens[: sequence.scored_from]), decode(sequence.tokens[sequence.scored_from :])


def by_kind(chat: ChatFormat, example: Example) -> dict[RowKind, str]:
    """Return the text of the scored tokens by kind."""
    sequence = chat.encode(example)
    scored = sequence.tokens[sequence.scored_from :]
    return {kind: chat.tokenizer.decode(scored[sequence.row_kinds == kind]) for kind in RowKind}


def refusal(chat: ChatFormat, example: Example) -> str:
    """Return the error for an example, without its place. It must be one line without the record's text."""
    with pytest.raises(SaroError) as caught:
        chat.encode(example)
    message = str(caught.value)
    assert message.startswith("data.jsonl:7: ")
    assert "\n" not in message
    assert SECRET not in message
    return message.removeprefix("data.jsonl:7: ")


conversations = st.lists(written, min_size=1, max_size=5).map(
    lambda said: [(("user", "assistant")[(len(said) - 1 - i) % 2], text) for i, text in enumerate(said)]
)


# The prompt


@pytest.mark.parametrize("name", TEMPLATES)
@given(turns=conversations, reasoning=st.none() | written, answer=written)
def test_the_prompt_is_what_transformers_makes_for_generation(name, turns, reasoning, answer):
    chat = CHATS[name]
    sequence = chat.encode(ask(turns, reasoning, answer))
    messages = [{"role": role, "content": content} for role, content in turns]
    expected = chat.tokenizer.apply_chat_template(
        messages,
        # This template has a clock, and the day of the run is in the past.
        chat_template=LLAMA3.replace("strftime_now('%d %b %Y')", "'04 Jul 1999'") if name == "llama3" else None,
        add_generation_prompt=True,
        return_dict=False,
    )
    assert sequence.tokens[: sequence.scored_from].tolist() == expected


@every_template
def test_the_prompt_compared_with_inference_is_the_prompt_that_is_encoded(template):
    chat, example = chat_of(template), ask([("user", "Hi"), ("assistant", "Yes?"), ("user", "Why?")])
    assert chat.inference_prompt_ids(example.prompt) == chat.prompt_ids(example.prompt)


def test_control_tokens_in_the_prompt_are_encoded_as_at_inference():
    chat = chat_of()
    example = ask("Say <|im_end|> twice.")
    assert chat.prompt_ids(example.prompt) == chat.inference_prompt_ids(example.prompt)
    assert chat.prompt_ids(example.prompt).count(IM_END) == 2


def test_a_system_turn_is_in_the_prompt():
    prompt, _ = texts(chat_of(), ask([("system", "Be brief."), ("user", "Why?")]))
    assert (
        prompt == "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n"
    )


def test_only_the_last_turn_of_a_conversation_is_scored():
    prompt, completion = texts(chat_of(), ask([("user", "Hi"), ("assistant", "Yes?"), ("user", "Why?")]))
    assert "Yes?" in prompt
    assert completion == "<think>\nBecause.\n</think>\n\nSo.<|im_end|>"


def test_reasoning_of_earlier_turns_is_left_out_if_the_template_drops_it():
    turns = [("user", "Hi"), ("assistant", "<think>\nHm.\n</think>\n\nYes?"), ("user", "Why?")]
    prompt, completion = texts(chat_of(DROPS_THINK), ask(turns))
    assert "Hm." not in prompt
    assert "Yes?" in prompt
    assert completion == "<think>\nBecause.\n</think>\n\nSo.<|im_end|>"


def test_template_variables_reach_the_template():
    template = "{{ tone }}:" + CHATML
    prompt, _ = texts(chat_of(template, template_variables={"tone": "kind"}), ask())
    assert prompt.startswith("kind:<|im_start|>")


def test_the_default_of_several_templates_is_used():
    tokenizer = tiny_tokenizer({"tool_use": "unused", "default": CHATML})
    assert texts(chat_of(tokenizer=tokenizer), ask()) == texts(chat_of(), ask())


def test_several_templates_without_a_default_are_refused():
    chat = chat_of(tokenizer=tiny_tokenizer({"rag": CHATML, "tool_use": CHATML}))
    assert refusal(chat, ask()).startswith("the model has several chat templates (rag, tool_use) and no default; ")


# The completion


@pytest.mark.parametrize("name", TEMPLATES)
@given(reasoning=written, answer=written)
def test_reasoning_and_answer_are_trained_on_to_the_letter(name, reasoning, answer):
    prompt, completion = texts(CHATS[name], ask("Why?", reasoning, answer))
    opened = "" if prompt.endswith("<think>\n") else "<think>\n"
    start, stop = START.get(TEMPLATES[name], ""), STOP.get(TEMPLATES[name], "<|im_end|>")
    assert completion == f"{start}{opened}{reasoning}\n</think>\n\n{answer}{stop}"


@pytest.mark.parametrize("name", TEMPLATES)
@given(reasoning=st.none() | written, answer=written)
def test_the_last_scored_token_is_the_only_stop_token(name, reasoning, answer):
    chat = CHATS[name]
    sequence = chat.encode(ask("Why?", reasoning, answer))
    is_stop = [token in chat.stop_ids for token in sequence.tokens[sequence.scored_from :].tolist()]
    assert is_stop[-1]
    assert sum(is_stop) == 1


@every_template
def test_nothing_after_the_stop_token_is_trained_on(template):
    # ChatML writes a line end after the stop token.
    assert texts(chat_of(template), ask())[1].endswith("So." + STOP.get(template, "<|im_end|>"))


@every_template
def test_everything_from_the_first_token_of_the_response_is_scored(template):
    chat, example = chat_of(template), ask()
    sequence = chat.encode(example)
    assert sequence.scored_from == len(chat.prompt_ids(example.prompt))
    assert len(sequence.row_kinds) == len(sequence.tokens) - sequence.scored_from


@pytest.mark.parametrize("space", [" ", "\n", ""])
def test_white_space_that_the_template_writes_before_an_answer_is_trained_on(space):
    template = CHATML.replace("m['role'] + '\n'", f"m['role'] + ':{space}'").replace("assistant\n", "assistant:")
    prompt, completion = texts(chat_of(template), ask())
    assert prompt.endswith("<|im_start|>assistant:")
    assert completion == f"{space}<think>\nBecause.\n</think>\n\nSo.<|im_end|>"


def test_other_text_that_the_template_writes_before_an_answer_is_not_trained_on():
    # Qwen3 writes empty reasoning before an answer that has none.
    template = CHATML.replace(
        "m['content']", "('<think>\n\n</think>\n\n' if m['role'] == 'assistant' else '') + m['content']"
    )
    assert texts(chat_of(template), ask())[1] == "<think>\nBecause.\n</think>\n\nSo.<|im_end|>"


def test_an_answer_without_reasoning_is_trained_on_unchanged():
    assert texts(chat_of(), ask(reasoning=None, answer=" So.\n"))[1] == " So.\n<|im_end|>"


def test_the_record_index_is_kept():
    assert chat_of().encode(ask(), record=12).record == 12


def test_text_that_the_template_writes_before_its_end_token_is_trained_on():
    # Formats such as Harmony write another control token, the end of a channel, before the end of the turn.
    template = CHATML.replace("'<|im_end|>\n'", "'</s><|im_end|>\n'")
    assert texts(chat_of(template), ask())[1] == "<think>\nBecause.\n</think>\n\nSo.</s><|im_end|>"


def test_control_tokens_that_a_model_writes_before_its_answer_are_trained_on():
    prompt, completion = texts(chat_of(HARMONY), ask())
    assert prompt.endswith("<|head|>assistant")
    assert completion == "[INST]final<|eot_id|><think>\nBecause.\n</think>\n\nSo.<|im_end|>"


def test_the_first_token_after_the_answer_that_ends_generation_is_the_stop_token():
    template = CHATML.replace("'<|im_end|>\n'", "'\n<|eot_id|></s>\n'")
    assert texts(chat_of(template, stop=["</s>", "<|eot_id|>"]), ask())[1].endswith("So.\n<|eot_id|>")


# Templates that open or close the reasoning


def test_the_completion_starts_after_a_tag_that_the_template_opened():
    prompt, completion = texts(chat_of(OPENS_THINK), ask())
    assert prompt.endswith("<|im_start|>assistant\n<think>\n")
    assert completion == "Because.\n</think>\n\nSo.<|im_end|>"


def test_the_completion_adds_the_line_end_that_the_template_did_not_write_after_its_tag():
    chat = chat_of(OPENS_THINK.replace("<think>\n'", "<think>'"))
    assert texts(chat, ask())[1] == "\nBecause.\n</think>\n\nSo.<|im_end|>"


def test_an_answer_without_reasoning_closes_a_tag_that_the_template_opened():
    prompt, completion = texts(chat_of(OPENS_THINK), ask(reasoning=None))
    assert (prompt + completion).endswith("<think>\n\n</think>\n\nSo.<|im_end|>")


def test_text_with_tags_of_its_own_does_not_open_the_tag_again():
    prompt, completion = texts(chat_of(OPENS_THINK), ask(reasoning=None, answer="<think>\nHm.\n</think>\n\nSo."))
    assert (prompt + completion).count("<think>") == 1
    assert completion == "Hm.\n</think>\n\nSo.<|im_end|>"


def test_reasoning_after_a_tag_that_the_template_closed_is_refused():
    chat = chat_of(QWEN3, template_variables={"enable_thinking": False})
    assert "set --data.template_variables.enable_thinking true" in refusal(chat, ask())


def test_text_with_tags_after_a_tag_that_the_template_closed_is_refused():
    chat = chat_of(QWEN3, template_variables={"enable_thinking": False})
    assert "closes the reasoning" in refusal(chat, ask(reasoning=None, answer="<think>\nHm.\n</think>\n\nSo."))


def test_an_answer_without_reasoning_may_follow_a_tag_that_the_template_closed():
    prompt, completion = texts(chat_of(QWEN3, template_variables={"enable_thinking": False}), ask(reasoning=None))
    assert prompt.endswith("<think>\n\n</think>\n\n")
    assert completion == "So.<|im_end|>"


@pytest.mark.parametrize("variables", [None, {}, {"enable_thinking": True}])
def test_reasoning_is_allowed_with_a_template_that_leaves_thinking_on(variables):
    prompt, completion = texts(chat_of(QWEN3, template_variables=variables), ask())
    assert prompt.endswith("<|im_start|>assistant\n")
    assert completion.startswith("<think>\nBecause.")


# Kinds of rows


@every_template
def test_rows_are_thought_answer_and_stop(template):
    opened = "" if template == OPENS_THINK else "<think>\n"
    assert by_kind(chat_of(template), ask()) == {
        RowKind.THINK: f"{START.get(template, '')}{opened}Because.\n</think>",
        RowKind.ANSWER: "\n\nSo.",
        RowKind.STOP: STOP.get(template, "<|im_end|>"),
    }


def test_kinds_come_in_order():
    assert sorted(kinds := chat_of().encode(ask()).row_kinds.tolist()) == kinds


def test_without_reasoning_there_is_no_thought():
    assert by_kind(chat_of(), ask(reasoning=None))[RowKind.THINK] == ""


def test_thought_in_text_with_tags_is_recognised():
    kinds = by_kind(chat_of(), ask(reasoning=None, answer="<think>Hm.</think>So."))
    assert kinds[RowKind.THINK] == "<think>Hm.</think>"
    assert kinds[RowKind.ANSWER] == "So."


def test_characters_of_several_tokens_have_one_kind():
    assert (
        by_kind(chat_of(), ask(reasoning="\u00e9\U0001f600", answer="\u00fc"))[RowKind.THINK].count("\U0001f600") == 1
    )


def test_other_tags_may_be_chosen():
    chat = chat_of(think_tags=("[[", "]]"))
    assert by_kind(chat, ask())[RowKind.THINK] == "[[\nBecause.\n]]"
    assert by_kind(chat, ask(reasoning="A <think> of no meaning"))[RowKind.THINK] == "[[\nA <think> of no meaning\n]]"


@pytest.mark.parametrize("special", [False, True], ids=["added", "special"])
def test_tags_that_are_tokens_survive(special):
    tokenizer = tiny_tokenizer(CHATML)
    tokenizer.add_tokens(["<think>", "</think>"], special_tokens=special)
    sequence = chat_of(tokenizer=tokenizer).encode(ask())
    tags = tokenizer.convert_tokens_to_ids(["<think>", "</think>"])
    scored = sequence.tokens[sequence.scored_from :].tolist()
    assert [scored.count(tag) for tag in tags] == [1, 1]
    assert sequence.row_kinds[scored.index(tags[1])] == RowKind.THINK
    assert sequence.row_kinds[scored.index(tags[1]) + 1] == RowKind.ANSWER


def test_a_tokenizer_that_loses_the_tag_is_refused():
    tokenizer = tiny_tokenizer(CHATML)
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace("</think>", "")
    assert "does not keep the tag </think>; set --data.think_tags" in refusal(chat_of(tokenizer=tokenizer), ask())


@pytest.mark.parametrize("tag", ["<think>", "</think>"])
def test_reasoning_with_a_tag_of_its_own_is_refused(tag):
    message = refusal(chat_of(), ask(reasoning=f"{SECRET} {tag}"))
    assert message == "the reasoning holds a <think> or </think> tag of its own; remove it"


@pytest.mark.parametrize("tag", ["<think>", "</think>", "<think>Hm.</think>"])
def test_an_answer_with_a_tag_after_reasoning_is_refused(tag):
    message = refusal(chat_of(), ask(answer=f"So. {tag} {SECRET}"))
    assert message == "the answer holds a <think> or </think> tag of its own; remove it"


@pytest.mark.parametrize("template", [OPENS_THINK, QWEN3], ids=["opens think", "qwen3"])
def test_an_answer_with_a_tag_after_reasoning_is_refused_with_any_template(template):
    assert refusal(chat_of(template), ask(answer="</think> So.")).startswith(
        "the answer holds a <think> or </think> tag"
    )


@pytest.mark.parametrize(
    "answer",
    [
        "Hm.\n</think>\n\nSo.",
        "<think>\nHm.",
        "So. <think>Hm.</think>",
        "<think>Hm.</think>So.<think>Hm.</think>So.",
        "<think>Hm.</think>So.</think>",
        "<think><think>Hm.</think>So.",
        "</think>Hm.<think>So.",
    ],
)
def test_tags_in_a_response_that_are_not_one_pair_at_its_beginning_are_refused(answer):
    message = refusal(chat_of(), ask(reasoning=None, answer=answer + SECRET))
    assert message == (
        "the response's <think> and </think> tags are not one pair at its beginning; "
        "write the reasoning once, before the answer, and remove other tags"
    )


@pytest.mark.parametrize("field", ["messages", "completion"])
def test_a_second_tag_in_a_message_is_refused(field):
    reply = {"role": "assistant", "content": "<think>Hm.</think>So. </think>"}
    turns = [{"role": "user", "content": "Why?"}]
    record = {"messages": [*turns, reply]} if field == "messages" else {"prompt": turns, "completion": [reply]}
    assert "are not one pair at its beginning" in refusal(chat_of(), parse_example(record, "data.jsonl:7", "a"))


@pytest.mark.parametrize("side", ["chosen", "rejected"])
def test_an_answer_with_a_tag_is_refused_on_both_sides_of_a_pair(side):
    record = {
        "prompt": "Why?",
        "chosen": {"reasoning": "a", "answer": "b"},
        "rejected": {"reasoning": "a", "answer": "c"},
    }
    record[side]["answer"] += "</think>"
    with pytest.raises(SaroError, match=r"^pairs.jsonl:3: the answer holds a <think> or </think> tag of its own"):
        chat_of().encode_pair(parse_pair(record, "pairs.jsonl:3", "p"))


def test_a_response_may_continue_reasoning_that_the_template_opened():
    # As a model with such a template writes it.
    prompt, completion = texts(chat_of(OPENS_THINK), ask(reasoning=None, answer="Hm.\n</think>\n\nSo."))
    assert prompt.endswith("<think>\n")
    assert completion == "Hm.\n</think>\n\nSo.<|im_end|>"


def test_tags_in_the_prompt_are_as_at_inference():
    turns = [
        ("user", "What does </think> mean?"),
        ("assistant", "<think>Hm.</think>It ends <think>."),
        ("user", "Why?"),
    ]
    chat, example = chat_of(), ask(turns)
    assert chat.prompt_ids(example.prompt) == chat.inference_prompt_ids(example.prompt)
    assert "<think>Hm.</think>It ends <think>." in texts(chat, example)[0]


def test_a_tag_of_another_name_is_text():
    assert texts(chat_of(think_tags=("[[", "]]")), ask(answer="So </think>."))[1].endswith("So </think>.<|im_end|>")


def test_one_tag_may_be_a_part_of_the_other():
    chat = chat_of(think_tags=("THINK", "UNTHINK"))
    native, whole = ask(), ask(reasoning=None, answer="THINK\nBecause.\nUNTHINK\n\nSo.")
    assert chat.encode(native).tokens.tolist() == chat.encode(whole).tokens.tolist()


def test_tags_in_raw_text_are_trained_on_to_the_letter():
    example = raw("Q: Why?\nA: <think>", "Hm.</think>So.<think>")
    assert texts(chat_of(), example) == ("Q: Why?\nA: <think>", "Hm.</think>So.<think><|im_end|>")


# BOS


@every_template
def test_there_is_one_bos_if_the_template_writes_one(template):
    tokens = chat_of(template).encode(ask()).tokens.tolist()
    assert tokens.count(BOS) == ("bos_token" in template)
    assert BOS not in tokens[1:]


def adds_bos(template=CHATML, single="<|bos|> $A") -> PreTrainedTokenizerFast:
    """Make a tokenizer that adds a BOS to every text, as most do. ``single`` may add an end token too."""
    tokenizer = tiny_tokenizer(template, TOKENS)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=single, special_tokens=[("<|bos|>", BOS), ("<|im_end|>", IM_END)]
    )
    assert tokenizer("a").input_ids[0] == BOS
    return tokenizer


@every_template
def test_a_tokenizer_that_adds_bos_adds_none_to_the_text_of_a_template(template):
    stop = [STOP.get(template, "<|im_end|>")]
    plain = chat_of(template).encode(ask()).tokens
    assert chat_of(tokenizer=adds_bos(template), stop=stop).encode(ask()).tokens.tolist() == plain.tolist()


def test_two_bos_from_the_template_are_refused():
    message = refusal(chat_of("{{ bos_token }}{{ bos_token }}" + CHATML), ask(SECRET))
    assert message == "the prompt begins with two BOS tokens; remove the one in its text"


def test_a_bos_in_a_raw_prompt_besides_the_tokenizers_is_refused():
    assert refusal(chat_of(tokenizer=adds_bos()), raw(f"<|bos|>{SECRET}", "So.")).startswith(
        "the prompt begins with two"
    )


def test_a_model_without_bos_has_none():
    tokenizer = tiny_tokenizer()
    tokenizer.bos_token = None
    assert texts(chat_of(tokenizer=tokenizer), ask()) == texts(chat_of(), ask())


def test_the_start_of_a_turn_may_be_the_bos_token():
    # As in SmolLM2: <|im_start|> is its BOS and starts every turn.
    tokenizer = tiny_tokenizer()
    tokenizer.bos_token = "<|im_start|>"
    assert chat_of(tokenizer=tokenizer).encode(ask()).tokens.tolist().count(IM_START) == 2


# Stop tokens


@every_template
def test_a_pad_token_that_is_the_end_token_changes_nothing(template):
    plain = chat_of(template)
    same = tiny_tokenizer(template, TOKENS)
    same.pad_token = STOP.get(template, "<|im_end|>")
    chat = ChatFormat(same, plain.stop_ids, DAY)
    for example in (ask(), ask(reasoning=None), raw("Why?", "So.")):
        expected, got = plain.encode(example), chat.encode(example)
        assert got.tokens.tolist() == expected.tokens.tolist()
        assert got.scored_from == expected.scored_from
        assert got.row_kinds.tolist() == expected.row_kinds.tolist()


@pytest.mark.parametrize(("after", "shown"), [("", "''"), ("\n", r"'\n'")], ids=["nothing", "a line end"])
def test_a_template_without_an_end_token_is_refused_and_the_end_tokens_are_named(after, shown):
    template = CHATML.replace("<|im_end|>\n", after.replace("\n", "\\n"))
    message = refusal(chat_of(template, stop=["<|eot_id|>", "</s>"]), ask(SECRET))
    assert message.startswith(f"after an answer the chat template writes {shown}, and generation ends only at ")
    assert "'<|eot_id|>'" in message
    assert "'</s>'" in message
    assert "eos_token_id in generation_config.json" in message


def test_a_template_whose_end_token_does_not_end_generation_is_refused():
    # As if generation_config.json named only <|end_of_text|>, while the template writes <|eot_id|>.
    message = refusal(chat_of(LLAMA3, stop=["</s>"]), ask())
    assert "writes '<|eot_id|>', and generation ends only at '</s>'" in message


def test_a_template_that_leaves_the_answer_out_is_refused():
    template = "{% for m in messages if m['role'] == 'user' %}{{ m['content'] }}<|im_end|>{% endfor %}"
    assert refusal(chat_of(template), ask(SECRET)).startswith("the chat template does not write the assistant's answer")


@pytest.mark.parametrize("token", ["<|im_end|>", "<|im_start|>", "<|bos|>", "<|pad|>", "<|eot_id|>"])
@pytest.mark.parametrize("part", ["reasoning", "answer"])
def test_a_control_token_in_the_response_is_refused_by_name(token, part):
    message = refusal(chat_of(stop=["<|im_end|>", "<|eot_id|>"]), ask(**{part: f"{SECRET} {token}"}))
    assert message == f"the response holds the model's control token '{token}' as text; remove or rewrite it"


def test_all_control_tokens_are_named():
    assert "'<|pad|>', '<|bos|>'" in refusal(chat_of(), ask(answer="<|bos|><|pad|><|bos|>"))


def test_an_end_token_that_is_also_the_unknown_token_is_refused_in_the_response():
    # As in GPT-2: <|endoftext|> is both.
    tokenizer = tiny_tokenizer()
    tokenizer.unk_token = "<|im_end|>"
    assert "'<|im_end|>'" in refusal(chat_of(tokenizer=tokenizer), ask(answer="So.<|im_end|>So."))


def test_an_unknown_character_is_not_a_control_token():
    vocab = {token: i for i, token in enumerate(["<unk>", *"Whyso?.", "<|im_end|>"])}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>"))
    backend.add_special_tokens(["<unk>", "<|im_end|>"])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", eos_token="<|im_end|>")
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] + '<|im_end|>' }}{% endfor %}"
    sequence = chat_of(tokenizer=tokenizer).encode(ask(reasoning=None, answer="so\u00e9."))
    assert tokenizer.convert_ids_to_tokens(sequence.tokens.tolist())[-5:] == ["s", "o", "<unk>", ".", "<|im_end|>"]


def newline_stops() -> ChatFormat:
    """Make a format whose turns end with a line end. Two line ends in a row are one token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate([*alphabet, "ĊĊ"])}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[("Ċ", "Ċ")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] + '\n' }}{% endfor %}"
    return chat_of(tokenizer=tokenizer, stop=["Ċ"])


def test_a_stop_token_that_merges_with_the_answer_is_refused():
    message = refusal(newline_stops(), ask(reasoning=None, answer="So.\n"))
    assert message.startswith("the stop token merges with the end of the answer; ")


def test_a_stop_token_of_plain_text_is_refused_in_the_answer():
    assert "control token 'Ċ'" in refusal(newline_stops(), ask(reasoning=None, answer="One.\nTwo."))


def test_a_stop_token_of_plain_text_ends_the_answer():
    assert texts(newline_stops(), ask(reasoning=None)) == ("Why?\n", "So.\n")


# Models that cannot work at all


def test_a_slow_tokenizer_is_refused():
    with pytest.raises(SaroError, match=r"no fast tokenizer \(tokenizer.json\); convert it"):
        ChatFormat(ByT5Tokenizer(), frozenset({1}), DAY)


def test_a_model_without_end_token_is_refused():
    with pytest.raises(SaroError, match=r"names no end token: set eos_token_id in its generation_config.json"):
        ChatFormat(tiny_tokenizer(), frozenset(), DAY)


def test_a_model_without_template_is_refused():
    assert refusal(chat_of(None), ask(SECRET)).startswith(
        "the model has no chat template; give one with --data.chat_template FILE"
    )


def test_a_role_that_the_template_refuses_is_an_error_with_the_templates_message():
    message = refusal(chat_of(MISTRAL), ask([("system", SECRET), ("user", SECRET)]))
    assert message == (
        "the model's chat template refuses this conversation: Only user and assistant roles are supported!"
    )


@pytest.mark.parametrize(
    "template",
    ["{{ raise_exception('two\nlines') }}", "line\n{{ 1 + }}", "{% for m in messages %}", "{{ messages[0].a.b }}"],
    ids=["refusal", "syntax", "unclosed", "undefined"],
)
def test_an_error_in_a_template_is_one_line(template):
    assert refusal(chat_of(template), ask(SECRET)).startswith("the model's chat template refuses this conversation: ")


# Raw text: TRL's string prompt and completion


def test_raw_text_skips_the_template():
    assert texts(chat_of(), raw("Q: Why?\nA:", " So.")) == ("Q: Why?\nA:", " So.<|im_end|>")


def test_raw_text_needs_no_template():
    assert texts(chat_of(None), raw("Why?", " So.")) == ("Why?", " So.<|im_end|>")


def test_a_raw_prompt_has_the_bos_that_the_tokenizer_adds():
    chat = chat_of(tokenizer=adds_bos())
    assert chat.prompt_ids("Why?") == [BOS, *tiny_tokenizer()("Why?").input_ids]
    assert chat.encode(raw("Why?", " So.")).tokens.tolist().count(BOS) == 1


@pytest.mark.parametrize("single", ["<|bos|> $A <|im_end|>", "$A <|im_end|>"])
def test_a_raw_prompt_has_no_end_token_that_the_tokenizer_adds(single):
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=single, special_tokens=[("<|bos|>", BOS), ("<|im_end|>", IM_END)]
    )
    prompt, completion = texts(chat_of(tokenizer=tokenizer), raw("Why?", " So."))
    assert prompt == single.split("$A")[0].strip() + "Why?"
    assert completion == " So.<|im_end|>"


def test_a_raw_completion_ends_with_the_tokenizers_end_token():
    assert texts(chat_of(stop=["</s>", "<|im_end|>"]), raw("a", "b"))[1] == "b<|im_end|>"


def test_a_raw_completion_ends_with_a_stop_token_if_the_end_token_is_not_one():
    assert texts(chat_of(stop=["</s>"]), raw("a", "b"))[1] == "b</s>"


def test_tags_in_a_raw_completion_are_recognised():
    assert by_kind(chat_of(), raw("a", "<think>b</think>c"))[RowKind.THINK] == "<think>b</think>"


@given(prompt=written, completion=written)
def test_raw_text_is_trained_on_to_the_letter(prompt, completion):
    assert texts(CHATS["chatml"], raw(prompt, completion)) == (prompt, completion + "<|im_end|>")


# TRL's formats, starting from the record

TURNS = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}]
REPLY = {"role": "assistant", "content": "<think>\nBecause.\n</think>\n\nSo."}


@pytest.mark.parametrize(
    "record",
    [
        {"messages": [*TURNS, REPLY]},
        {"prompt": TURNS, "completion": [REPLY]},
        {"prompt": TURNS, "reasoning": "Because.", "answer": "So."},
        {"prompt": TURNS, "reasoning": ["Because."], "answer": "So."},
    ],
    ids=["messages", "prompt and completion", "native", "native steps"],
)
@every_template
def test_every_format_of_a_conversation_gives_the_same_tokens(template, record):
    if template == MISTRAL:
        record = {k: [m for m in v if m != TURNS[0]] if v and v[0] == TURNS[0] else v for k, v in record.items()}
    chat = chat_of(template)
    turns = [("user", "Why?")] if template == MISTRAL else [("system", "Be brief."), ("user", "Why?")]
    sequence, native = chat.encode(parse_example(record, "data.jsonl:7", "a")), chat.encode(ask(turns))
    assert sequence.tokens.tolist() == native.tokens.tolist()
    assert sequence.scored_from == native.scored_from
    assert sequence.row_kinds.tolist() == native.row_kinds.tolist()


def test_trl_strings_are_raw_text():
    example = parse_example({"prompt": "Q: Why?\nA:", "completion": " So."}, "data.jsonl:7", "a")
    assert texts(chat_of(), example) == ("Q: Why?\nA:", " So.<|im_end|>")


# The date

CLOCK = "Today: {{ strftime_now('%d %b %Y') }}\n" + CHATML
DATE_STRING = "Today: {{ date_string }}\n" + CHATML
# As Llama 3.1.
FIXED = "{% if not date_string is defined %}{% set date_string = '26 Jul 2024' %}{% endif %}" + DATE_STRING
BOTH = "{% if strftime_now is defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}" + DATE_STRING


@pytest.mark.parametrize("template", [CLOCK, BOTH, LLAMA3], ids=["clock", "both", "llama3"])
def test_a_template_sees_the_fixed_day(template):
    assert "Today: 04 Jul 1999" in texts(chat_of(template), ask())[0]


@pytest.mark.parametrize("template", [CLOCK, BOTH, LLAMA3], ids=["clock", "both", "llama3"])
def test_a_template_never_reads_the_clock(template, monkeypatch):
    class Stopped:
        def now(self):
            raise AssertionError("the template read the clock")

    monkeypatch.setattr("transformers.utils.chat_template_utils.datetime", Stopped())
    chat = chat_of(template)
    assert "04 Jul 1999" in chat.tokenizer.decode(chat.inference_prompt_ids(ask().prompt))


def test_another_day_is_another_prompt():
    assert "Today: 29 Feb 2024" in texts(chat_of(CLOCK, day=date(2024, 2, 29)), ask())[0]


def test_a_template_without_a_clock_gets_no_date_that_a_server_would_not_give():
    chat = chat_of(FIXED)
    messages = [{"role": "user", "content": "Why?"}]
    expected = chat.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert chat.prompt_ids(ask().prompt) == expected == chat.inference_prompt_ids(ask().prompt)
    assert "Today: 26 Jul 2024\n" in chat.tokenizer.decode(expected)


def test_the_date_may_be_set_by_hand():
    chat = chat_of(DATE_STRING, template_variables={"date_string": "never"})
    assert "Today: never\n" in texts(chat, ask())[0]


def test_the_fixed_day_reaches_macros_and_loops():
    template = (
        "{% macro today(form) %}{{ strftime_now(form) }}{% endmacro %}"
        "{% for m in messages %}{{ today('%Y-%m-%d') }} {{ m['content'] }}<|im_end|>{% endfor %}"
    )
    assert texts(chat_of(template), ask())[0] == "1999-07-04 Why?<|im_end|>"


@pytest.mark.parametrize("day", [DAY, date(2024, 2, 29), date(2030, 12, 31)], ids=str)
def test_every_date_directive_gives_the_value_of_that_day(day):
    form = " ".join(f"%{letter} %-{letter}" for letter in "aAbBcdDeFgGhHIjmMpSTuUVwxXyY")
    chat = chat_of("{{ strftime_now('" + form + "') }}", day=day)
    assert chat.render_prompt(ask().prompt) == datetime(day.year, day.month, day.day).strftime(form)


def test_a_line_end_at_the_start_of_a_template_with_a_date_is_kept():
    with_date, without = chat_of("\n" + CLOCK), chat_of("\nToday: 04 Jul 1999\n" + CHATML)
    assert texts(with_date, ask()) == texts(without, ask())


def test_the_date_is_also_fixed_in_the_text_before_the_stop_token():
    template = CHATML.replace("'<|im_end|>\n'", "strftime_now('(%Y)') + '<|im_end|>\n'")
    assert re.search(r"So\.\(1999\)<\|im_end\|>$", texts(chat_of(template), ask())[1])


# Roles and reasoning of a record's turns

ONLY_KNOWN_ROLES = (
    "{% for m in messages %}{% if m['role'] in ('system', 'user', 'assistant') %}"
    "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TOOL_TURNS = [("user", "2 + 2?"), ("assistant", "add"), ("tool", "4")]


@pytest.mark.parametrize("turns", [TOOL_TURNS, [("developer", "Be brief."), ("user", "Hi")]], ids=["tool", "developer"])
def test_turns_of_roles_that_the_template_writes_are_in_the_prompt(turns):
    chat, example = chat_of(), ask(turns)
    assert chat.prompt_ids(example.prompt) == chat.inference_prompt_ids(example.prompt)
    assert all(f"<|im_start|>{role}\n{text}<|im_end|>" in texts(chat, example)[0] for role, text in turns)


@pytest.mark.parametrize("turns", [TOOL_TURNS, [("developer", "Be brief."), ("user", "Hi")]], ids=["tool", "developer"])
def test_turns_of_roles_that_the_template_leaves_out_are_refused(turns):
    role = next(role for role, _ in turns if role in ("tool", "developer"))
    assert refusal(chat_of(ONLY_KNOWN_ROLES), ask(turns)) == (
        f"the model's chat template leaves {role} turns out; drop the record, or give a template that writes them with "
        "--data.chat_template FILE"
    )
    assert refusal(chat_of(MISTRAL), ask(turns)).startswith("the model's chat template refuses this conversation: Only")


@pytest.mark.parametrize("field", ["reasoning_content", "reasoning", "thinking"])
def test_the_template_decides_whether_the_reasoning_of_an_earlier_turn_is_in_the_prompt(field):
    shows = CHATML.replace("m['content'] +", "m.get('reasoning_content', '') + m['content'] +")
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes?", field: "Hm."}]
    record = {"messages": [*turns, {"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}]}
    example = parse_example(record, "data.jsonl:7", "a")
    assert "Hm.Yes?" in texts(chat_of(shows), example)[0]
    assert "Hm." not in texts(chat_of(CHATML), example)[0]
