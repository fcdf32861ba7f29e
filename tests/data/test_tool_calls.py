"""Tests that tools and tool_calls are trained on as the chat template writes them, or refused."""

from __future__ import annotations

import json

import pytest
import torch
from chat_cases import CHATS, TOOLS, chat_of

from saro.checks.check_masks import check_masks
from saro.checks.check_packs import check_packs
from saro.config import DataConfig, ModelConfig
from saro.data.chat_format import ChatFormat
from saro.data.encode_files import encode_files, encode_pair_files
from saro.data.records import parse_example, parse_pair, read_example_files
from saro.data.tree import RowKind, ScoredSequence
from saro.errors import SaroError
from saro.model.architectures import TokenLimits
from saro.model.load import load_policy
from saro.model.source import find_model

SECRET = "do not print me"
ADD = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}
ASK = {"role": "user", "content": "1 + 2?"}
RESULT = {"role": "tool", "name": "add", "tool_call_id": "c1", "content": "3"}
SO = {"role": "assistant", "content": "It is 3."}
# As Llama 3.1's, which drops the text beside a call.
DROPS_TEXT = TOOLS.replace("+ m['content'] }}", "+ ('' if m.tool_calls else m['content']) }}", 1)


def calls(*arguments: object, content: str | None = "", **fields: object) -> dict[str, object]:
    """Return an assistant turn that calls a function once for each of the arguments."""
    items = [{"id": "c1", "type": "function", "function": {"name": "add", "arguments": item}} for item in arguments]
    return {"role": "assistant", "content": content, "tool_calls": items, **fields}


def encode(record: dict[str, object], chat: ChatFormat | None = None) -> ScoredSequence:
    return (chat or chat_of(TOOLS)).encode(parse_example(record, "data.jsonl:7", "a"))


def refusal(record: dict[str, object], template: str | None = TOOLS, **options: object) -> str:
    chat = chat_of(template, **options)
    parse, encode = (parse_pair, chat.encode_pair) if "chosen" in record else (parse_example, chat.encode)
    with pytest.raises(SaroError) as raised:
        encode(parse(record, "data.jsonl:7", "a"))
    message = str(raised.value)
    assert message.startswith("data.jsonl:7: ")
    assert SECRET not in message
    assert "\n" not in message
    return message


@pytest.mark.parametrize("content", ["", "Let me add."])
@pytest.mark.parametrize("arguments", [[{"a": 1, "b": [2, "é</b>"]}], [{}, {"a": 0.5}]], ids=["one", "two"])
def test_a_call_has_the_tokens_that_the_template_gives_it(content, arguments):
    chat, turns = chat_of(TOOLS), [ASK, calls(*arguments, content=content)]
    ours = encode({"messages": turns, "tools": [ADD]}, chat)
    theirs = chat.tokenizer.apply_chat_template(turns, tools=[ADD], tokenize=False)
    assert chat.tokenizer.decode(ours.tokens) + "\n" == theirs
    prompt = chat.tokenizer.apply_chat_template([ASK], tools=[ADD], return_dict=False, add_generation_prompt=True)
    assert ours.tokens[: ours.scored_from].tolist() == prompt
    assert ours.row_kinds.tolist() == [RowKind.ANSWER] * (len(ours.row_kinds) - 1) + [RowKind.STOP]


def test_a_call_may_follow_reasoning():
    chat = chat_of(TOOLS)
    ours = encode({"messages": [ASK, calls({}, reasoning_content="Add.")], "tools": [ADD]}, chat)
    text = chat.tokenizer.decode(ours.tokens[ours.scored_from :])
    assert text == "<think>\nAdd.\n</think>\n\n<tool_call>add {}</tool_call><|im_end|>"
    assert RowKind.THINK in ours.row_kinds


def test_json_text_is_read_as_the_list_or_object_that_it_is():
    plain = {"messages": [ASK, calls({"a": 1})], "tools": [ADD]}
    turn = plain["messages"][1]
    texts = {
        "messages": [ASK, turn | {"tool_calls": json.dumps(turn["tool_calls"])}],
        "tools": json.dumps([ADD]),
    }
    arguments = {"messages": [ASK, calls('{"a": 1}', content=None)], "tools": [ADD]}
    expected = encode(plain).tokens.tolist()
    assert [encode(record).tokens.tolist() for record in (texts, arguments)] == [expected] * 2


@pytest.mark.parametrize("none", [None, [], "", "[]", "null"])
def test_no_tools_and_no_calls_are_as_if_the_fields_were_absent(none):
    assert parse_example({"messages": [ASK, SO | {"tool_calls": none}], "tools": none}, "f:1", "a") == parse_example(
        {"messages": [ASK, SO]}, "f:1", "a"
    )


def test_each_turn_is_trained_on_as_a_record_of_its_own_and_all_share_one_tree(records_file, tiny_model):
    chat, turns = chat_of(TOOLS), [ASK, calls({"a": 1}), RESULT, calls({"a": 2}, content="Again."), RESULT, SO]
    file = records_file([{"messages": turns, "tools": [ADD]}] * 3)
    data = encode_files([file], chat, DataConfig(pack_tokens=1024, train_on="all"))
    for turn, end in enumerate((2, 4, 6)):
        alone = encode({"messages": turns[:end], "tools": [ADD]}, chat)
        ours = data.sequence(turn)
        assert (ours.tokens.tolist(), ours.scored_from) == (alone.tokens.tolist(), alone.scored_from)
    check_masks(data, chat, read_example_files([file], "all"), TokenLimits(1000))
    (tree,) = data.trees(range(3), 1024)
    assert tree.tokens < sum(len(sequence.tokens) for sequence in tree.sequences)
    options = ModelConfig(name=tiny_model(), method="full")
    # Raises unless packs of trees have the log-probs of the model's own forward.
    check_packs(load_policy(find_model(options), options, torch.device("cpu"), seed=0), data)


def test_the_sides_of_a_pair_may_differ_in_a_call(records_file):
    chat = chat_of(TOOLS)
    record = {"prompt": [ASK], "chosen": [calls({"a": 1})], "rejected": [calls({"a": 2})], "tools": [ADD]}
    for side, ours in zip(
        ("chosen", "rejected"),
        encode_pair_files([records_file([record])], chat, DataConfig()).sequences(0),
        strict=True,
    ):
        theirs = chat.tokenizer.apply_chat_template([ASK, *record[side]], tools=[ADD], tokenize=False)
        assert chat.tokenizer.decode(ours.tokens) + "\n" == theirs
    assert "chosen equals rejected" in refusal(record | {"rejected": record["chosen"]})


@pytest.mark.parametrize(
    ("record", "template", "part"),
    [
        ({"messages": [ASK, SO], "tools": [ADD]}, CHATS["chatml"].tokenizer.chat_template, "tools"),
        ({"messages": [ASK, calls({}), RESULT, SO]}, CHATS["chatml"].tokenizer.chat_template, "tool_calls"),
        ({"messages": [ASK, calls({})]}, CHATS["chatml"].tokenizer.chat_template, "tool_calls"),
        ({"messages": [ASK, calls({}, {})]}, TOOLS.replace("m.tool_calls or []", "(m.tool_calls or [])[:1]"), "tool_calls"),
        ({"messages": [ASK, SO], "tools": [ADD, ADD]}, TOOLS.replace("in tools", "in tools[:1]"), "tools"),
        ({"messages": [ASK, calls({}, content="Let me add."), RESULT, SO]}, DROPS_TEXT, "text beside tool_calls"),
    ],
    ids=["tools", "earlier call", "last call", "second call", "second tool", "text beside an earlier call"],
)  # fmt: skip
def test_what_the_template_leaves_out_is_refused(record, template, part):
    assert f"the model's chat template leaves {part} out; drop the record" in refusal(record, template)


# As gpt-oss', which writes a call right after the role.
AFTER_ROLE = TOOLS.replace(
    "+ '\n' + m['content'] }}", "+ (' to=' if m.tool_calls else '\n') + m['content'] }}"
).replace("{{ '<|im_start|>assistant\n' }}", "{{ '<|im_start|>assistant' }}")


@pytest.mark.parametrize(
    ("turn", "template"),
    [
        (calls({}, content=SECRET), DROPS_TEXT),
        (calls({}, reasoning_content=SECRET), DROPS_TEXT),
        (calls({}, content=SECRET), AFTER_ROLE),
        (calls({}, reasoning_content=SECRET), AFTER_ROLE),
    ],
    ids=["text", "reasoning", "before the text", "before the reasoning"],
)
def test_a_template_that_does_not_write_calls_after_the_text_is_refused(turn, template):
    assert "the chat template does not write tool_calls after the text of their turn" in refusal(
        {"messages": [ASK, turn]}, template
    )


def test_a_call_without_text_is_accepted_if_the_template_writes_no_text_beside_it():
    chat = chat_of(DROPS_TEXT)
    ours = encode({"messages": [ASK, calls({})]}, chat)
    assert chat.tokenizer.decode(ours.tokens[ours.scored_from :]) == "<tool_call>add {}</tool_call><|im_end|>"


def test_white_space_beside_calls_is_no_text():
    blank, none = (encode({"messages": [ASK, calls({}, content=content)]}) for content in (" \n", ""))
    assert blank.tokens.tolist() == none.tokens.tolist()


def test_a_call_follows_a_generation_prompt_that_closes_the_reasoning():
    closed = "<|im_start|>assistant\n<think>\n\n</think>\n\n"
    chat = chat_of(TOOLS.replace("{{ '<|im_start|>assistant\n' }}", repr(closed).join(("{{ ", " }}"))))
    ours = encode({"messages": [ASK, calls({})]}, chat)
    assert chat.tokenizer.decode(ours.tokens).endswith(closed + "<tool_call>add {}</tool_call><|im_end|>")


def test_a_template_that_ends_a_call_without_an_end_token_is_refused_without_its_text():
    template = TOOLS.replace(
        "{{ '<|im_end|>\n' }}{% endfor %}", "{{ '' if m.tool_calls else '<|im_end|>' }}{% endfor %}"
    )
    assert "after tool_calls the chat template writes no token that ends generation" in refusal(
        {"messages": [ASK, calls({"a": SECRET})]}, template
    )


@pytest.mark.parametrize(
    ("template", "arguments"),
    [
        (TOOLS.replace("arguments | tojson", "arguments.a + 1"), {"a": SECRET}),
        (TOOLS.replace("arguments | tojson", "arguments.a | dictsort"), {"a": SECRET}),
        (TOOLS.replace("tojson", "tojson(indent=2)"), {"a": json.loads("[" * 900 + "]" * 900)}),
    ],
    ids=["text as a number", "text as an object", "nested deep"],
)
def test_arguments_that_the_template_fails_on_are_refused_in_one_line(template, arguments):
    record = {"messages": [ASK, calls(arguments), RESULT, SO]}
    assert "the model's chat template fails on this conversation" in refusal(record, template)


@pytest.mark.parametrize(
    ("held", "expected"),
    [
        ("</think>", "tool_calls hold a <think> or </think> tag; remove it"),
        ("<|im_end|>", "tool_calls hold the model's control token '<|im_end|>' as text; remove or rewrite it"),
    ],
)
def test_a_call_that_holds_a_tag_or_a_control_token_is_refused(held, expected):
    assert expected in refusal({"messages": [ASK, calls({"a": f"{SECRET} {held}"})]})


FUNCTION = {"name": "add", "arguments": {}}


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"tools": SECRET}, "tools: broken JSON at column 1"),
        ({"tools": {"a": 1}}, "tools is an object; give a list, or JSON text of one"),
        ({"tools": [{"name": "add"}]}, "tools: tool 1 has no function"),
        ({"tools": [ADD, {"function": {"name": 1}}]}, "tools: tool 2: name is a number"),
        ({"tools": [ADD | {"x": None}]}, "tools: null stands where a table may have added it; give them as JSON text"),
        ({"tools": [{"function": {"name": "a", "x": "\ud800"}}]}, "tools has half of a surrogate pair"),
        ({"calls": [{"function": FUNCTION | {"arguments": None}}]}, "call 1: arguments are null; give an object"),
        ({"calls": [{"function": FUNCTION | {"arguments": "[1]"}}]}, "call 1: arguments are a list; give an object"),
        ({"calls": [{"function": FUNCTION | {"arguments": "{"}}]}, "call 1: arguments: broken JSON at column 2"),
        (
            {"calls": [{"function": FUNCTION | {"arguments": {"a": [None]}}}]},
            "arguments: null stands where a table may",
        ),
        ({"calls": [{"function": FUNCTION, "typ": "function"}]}, 'call 1 has the field "typ"; did you mean type?'),
        ({"calls": [{"function": FUNCTION, "type": "custom"}]}, "call 1 is not of the type function"),
        ({"calls": [{"function": FUNCTION | {"x": 1}}]}, 'call 1 has the field "x"'),
        ({"calls": ["add"]}, "call 1 has no function"),
    ],
)
def test_faulty_tools_and_calls_are_named(fields, expected):
    turn = SO | ({"tool_calls": fields["calls"]} if "calls" in fields else {})
    tools = {name: value for name, value in fields.items() if name == "tools"}
    assert expected in refusal({"messages": [ASK, turn], **tools})


def test_null_in_json_text_is_the_records_own(records_file):
    default = {"function": {"name": "add", "parameters": {"default": None}}}
    assert "null" in chat_of(TOOLS).tokenizer.decode(
        encode({"messages": [ASK, SO], "tools": json.dumps([default])}).tokens
    )


@pytest.mark.parametrize("role", ["user", "tool"])
def test_only_the_assistant_calls(role):
    turns = [ASK, calls({}), RESULT] if role == "tool" else [ASK]
    turns[-1] = turns[-1] | {"tool_calls": [{"function": FUNCTION}]}
    assert 'has the field "tool_calls"' in refusal({"messages": [*turns, SO]})


def test_tools_beside_raw_text_are_refused():
    assert "tools stand beside a prompt of raw text" in refusal({"prompt": "Hi", "completion": " So.", "tools": [ADD]})


def test_tools_of_a_record_and_of_all_records_are_refused():
    message = refusal({"messages": [ASK, SO], "tools": [ADD]}, template_variables={"tools": [ADD]})
    assert "the record has tools, and so has --data.template_variables.tools; remove one of them" in message


def test_a_template_of_its_own_for_tools_is_refused():
    message = refusal(
        {"messages": [ASK, SO], "tools": [ADD]}, {"default": TOOLS, "tool_use": TOOLS}, stop=["<|im_end|>"]
    )
    assert "the model has a chat template of its own for records with tools (tool_use)" in message
