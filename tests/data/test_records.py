"""Tests that every record format is read exactly and that every error says where and what to do."""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from saro.data.messages import RecordMessage
from saro.data.records import Example, Message, Response, read_examples
from saro.errors import SaroError

NATIVE = {"prompt": "Why?", "reasoning": "Because.", "answer": "So."}
SECRET = "do not print me"


def write(path: Path, *records) -> Path:
    """Write records to a JSONL file; bytes and str are written unchanged, as lines."""
    lines = [r if isinstance(r, bytes) else (r if isinstance(r, str) else json.dumps(r)).encode() for r in records]
    path.write_bytes(b"".join(line + b"\n" for line in lines))
    return path


def only(tmp_path: Path, record) -> Example:
    (example,) = read_examples(write(tmp_path / "data.jsonl", record))
    return example


def error(tmp_path: Path, *records) -> str:
    """Return the error for these records, without the folder. It must never contain a record's text."""
    with pytest.raises(SaroError) as caught:
        list(read_examples(write(tmp_path / "data.jsonl", *records)))
    message = str(caught.value)
    assert message.startswith(f"{tmp_path}/data.jsonl:")
    assert "; " in message
    assert "\n" not in message
    assert SECRET not in message
    return message.removeprefix(f"{tmp_path}/")


def chat(*turns: tuple[str, str]) -> list[dict]:
    return [{"role": role, "content": content} for role, content in turns]


# Formats


def test_a_native_record_is_read(tmp_path):
    path = write(tmp_path / "data.jsonl", {**NATIVE, "id": "a-1", "kind": "safety"})
    assert list(read_examples(path)) == [
        Example("a-1", "safety", (Message("user", "Why?"),), Response("Because.", "So."), f"{path}:1")
    ]


def test_the_file_is_named_as_the_user_named_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "data.jsonl", NATIVE)
    assert next(read_examples("data.jsonl")).where == "data.jsonl:1"


def test_reasoning_steps_are_joined_with_line_ends(tmp_path):
    assert only(tmp_path, {**NATIVE, "reasoning": ["one", "two\n", "three"]}).response.reasoning == "one\ntwo\n\nthree"


@pytest.mark.parametrize("record", [{"prompt": "Why?", "answer": "So."}, {**NATIVE, "reasoning": None}])
def test_a_native_record_may_have_no_reasoning(tmp_path, record):
    assert only(tmp_path, record).response == Response(None, "So.")


def test_a_native_prompt_may_be_a_conversation(tmp_path):
    turns = [("system", "Be brief."), ("user", "Hi"), ("assistant", "Hello"), ("user", "Why?")]
    assert only(tmp_path, {**NATIVE, "prompt": chat(*turns)}).prompt == tuple(Message(*turn) for turn in turns)


def test_trl_conversational_prompt_completion_is_read(tmp_path):
    record = {"prompt": chat(("user", "Why?")), "completion": chat(("assistant", "So."))}
    example = only(tmp_path, record)
    assert example.prompt == (Message("user", "Why?"),)
    assert example.response == Response(None, "So.")


def test_trl_string_prompt_completion_stays_raw_text(tmp_path):
    example = only(tmp_path, {"prompt": "The sky is", "completion": " blue."})
    assert example.prompt == "The sky is"
    assert example.response == Response(None, " blue.")


def test_the_last_turn_of_trl_messages_is_the_response(tmp_path):
    record = {"messages": chat(("user", "Hi"), ("assistant", "Hello"), ("user", "Why?"), ("assistant", "So."))}
    example = only(tmp_path, record)
    assert example.prompt == (Message("user", "Hi"), Message("assistant", "Hello"), Message("user", "Why?"))
    assert example.response == Response(None, "So.")


def test_consecutive_turns_of_one_role_are_allowed(tmp_path):
    assert len(only(tmp_path, {**NATIVE, "prompt": chat(("user", "Hi"), ("user", "Why?"))}).prompt) == 2


def test_an_empty_system_turn_is_allowed(tmp_path):
    record = {**NATIVE, "prompt": chat(("system", ""), ("user", "Why?"))}
    assert only(tmp_path, record).prompt[0] == Message("system", "")


def test_meta_may_hold_anything(tmp_path):
    assert only(tmp_path, {**NATIVE, "meta": {"source": ["x", None]}}) == only(tmp_path, NATIVE)


def test_a_whole_number_id_becomes_text(tmp_path):
    assert only(tmp_path, {**NATIVE, "id": 7}).id == "7"


def test_the_default_kind_is_general_and_the_default_id_names_the_line(tmp_path):
    first, second = read_examples(write(tmp_path / "my.data.jsonl", NATIVE, "", "  ", NATIVE))
    assert (first.kind, first.id, second.id) == ("general", "my.data:1", "my.data:4")


def test_fields_that_no_format_knows_are_ignored_and_named(tmp_path):
    example = only(tmp_path, {**NATIVE, "source": SECRET, "idx": 3, SECRET: 1, "label": None, "tools": []})
    assert example.ignored == ("(15 characters of text)", "idx", "source")
    assert example.response == Response("Because.", "So.")


def test_fields_of_other_formats_that_are_null_are_absent(tmp_path):
    """A table has the columns of all of its records."""
    record = {**NATIVE, "completion": None, "messages": None, "chosen": None}
    assert only(tmp_path, record) == only(tmp_path, NATIVE)


@pytest.mark.parametrize("prompt", ["Hi", "Why?"])
def test_a_prompt_beside_messages_repeats_one_of_the_users_turns(tmp_path, prompt):
    """As in UltraChat and No Robots."""
    messages = chat(("user", "Hi"), ("assistant", "Hello"), ("user", "Why?"), ("assistant", "So."))
    alone = only(tmp_path, {"messages": messages})
    assert only(tmp_path, {"messages": messages, "prompt": prompt}) == alone
    assert only(tmp_path, {"messages": messages, "prompt": messages[:3]}) == alone


def test_a_text_prompt_before_a_message_is_the_users_turn(tmp_path):
    example = only(tmp_path, {"prompt": "Why?", "completion": chat(("assistant", "So."))})
    assert (example.prompt, example.response) == ((Message("user", "Why?"),), Response(None, "So."))


@pytest.mark.parametrize("field", ["reasoning_content", "reasoning", "thinking"])
def test_the_reasoning_of_the_last_message_is_the_reasoning_of_the_response(tmp_path, field):
    turn = {"role": "assistant", "content": "So.", field: "Because."}
    for record in ({"messages": [*chat(("user", "Why?")), turn]}, {"prompt": "Why?", "completion": [turn]}):
        assert only(tmp_path, record).response == Response("Because.", "So.")


def test_the_reasoning_of_an_earlier_message_stays_in_the_prompt(tmp_path):
    turns = [
        *chat(("user", "Hi")),
        {"role": "assistant", "content": "Hello", "thinking": "Hm."},
        *chat(("user", "Why?")),
    ]
    prompt = only(tmp_path, {"messages": [*turns, *chat(("assistant", "So."))]}).prompt
    assert prompt == (Message("user", "Hi"), RecordMessage("assistant", "Hello", "Hm."), Message("user", "Why?"))


def test_fields_of_messages_that_are_null_or_empty_are_absent(tmp_path):
    turn = {"role": "assistant", "content": "So.", "reasoning_content": None, "tool_calls": [], "name": None}
    assert only(tmp_path, {"prompt": "Why?", "completion": [turn]}).response == Response(None, "So.")


def test_developer_and_tool_turns_are_read(tmp_path):
    turns = [("system", "Be brief."), ("developer", "Use tools."), ("user", "2 + 2?"), ("assistant", "add 2 2")]
    turns += [("tool", "4"), ("tool", "four")]
    assert only(tmp_path, {**NATIVE, "prompt": chat(*turns)}).prompt == tuple(Message(*turn) for turn in turns)


# Bytes and lines


def test_blank_lines_are_skipped_but_counted(tmp_path):
    path = write(tmp_path / "data.jsonl", "", NATIVE, " \t", NATIVE)
    assert [example.where.rpartition(":")[2] for example in read_examples(path)] == ["2", "4"]


def test_a_byte_order_mark_windows_line_ends_and_a_missing_last_line_end_are_fine(tmp_path):
    line = json.dumps(NATIVE).encode()
    path = tmp_path / "data.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + line + b"\r\n" + line)
    assert len(list(read_examples(path))) == 2


def test_the_file_is_read_line_by_line(tmp_path):
    path = write(tmp_path / "data.jsonl", NATIVE, "broken")
    assert next(read_examples(path)).response.answer == "So."


text = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1).filter(str.strip)


@settings(max_examples=60, deadline=None)
@given(prompt=text, steps=st.lists(text, min_size=1, max_size=3), answer=text, escape=st.booleans())
def test_any_text_survives_exactly(tmp_path_factory, prompt, steps, answer, escape):
    path = tmp_path_factory.mktemp("round") / "data.jsonl"
    line = json.dumps({"prompt": prompt, "reasoning": steps, "answer": answer}, ensure_ascii=escape)
    path.write_bytes(line.encode() + b"\n")
    (example,) = read_examples(path)
    assert example.prompt == (Message("user", prompt),)
    assert example.response == Response("\n".join(steps), answer)


@settings(max_examples=150, deadline=None)
@given(
    record=st.recursive(
        st.none()
        | st.booleans()
        | st.integers(-9, 9)
        | st.sampled_from(["", "user", "assistant", "system", "\0", "a"]),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(st.sampled_from(["role", "content"]), inner, max_size=2)
            | st.dictionaries(
                st.sampled_from(["prompt", "answer", "reasoning", "completion", "messages", "id", "kind", "x"]),
                inner,
                max_size=4,
            )
        ),
        max_leaves=12,
    )
)
def test_any_json_line_gives_an_example_or_a_saro_error(tmp_path_factory, record):
    path = write(tmp_path_factory.mktemp("any") / "data.jsonl", json.dumps(record))
    outcome = ""
    try:
        (example,) = read_examples(path)
    except SaroError as fault:
        outcome = str(fault)
    assert outcome.startswith(f"{path}:1: ") or example.response.answer.strip()


# Faulty files


def test_a_missing_file_names_the_nearest(tmp_path):
    write(tmp_path / "train.jsonl", NATIVE)
    with pytest.raises(SaroError, match=r"trian\.jsonl: there is no such file; did you mean .*/train\.jsonl\?"):
        list(read_examples(tmp_path / "trian.jsonl"))


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(SaroError, match=r"there is no folder .*missing; check the path"):
        list(read_examples(tmp_path / "missing" / "train.jsonl"))


def test_a_folder_in_place_of_a_file_is_an_error(tmp_path):
    with pytest.raises(SaroError, match="is a folder; name one file in it"):
        list(read_examples(tmp_path))


@pytest.mark.parametrize("lines", [[], ["", "  "]])
def test_a_file_without_records_is_an_error(tmp_path, lines):
    assert error(tmp_path, *lines) == "data.jsonl: the file has no records; check how it was written"


def test_a_file_that_is_not_utf8_names_line_and_byte(tmp_path):
    message = error(tmp_path, NATIVE, '{"prompt": "né"}'.encode("latin-1"))
    assert message == "data.jsonl:2: not UTF-8 at byte 14; convert the file to UTF-8"


def test_a_json_array_is_not_taken_for_jsonl(tmp_path):
    message = error(tmp_path, *json.dumps([NATIVE, NATIVE], indent=1).splitlines())
    assert message == "data.jsonl:1: a JSON array begins here; write each of its objects on a line of its own (JSONL)"


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ('{"prompt": "' + SECRET, "broken JSON at column 12 (Unterminated string starting at)"),
        ("{", "broken JSON at column 2 (Expecting property name enclosed in double quotes)"),
        ('{"a": 1} {"b": 2}', "broken JSON at column 10 (Extra data)"),
        ('{"prompt": "a", "prompt": "b"}', 'field "prompt" is given twice; keep one'),
        ("[" * 100_000, "nested too deep"),
        ('{"meta": ' + "1" * 10_000 + "}", "number too long"),
        ('"text"', "the line is a string; write one JSON object on each line"),
        ("[1]", "the line is a list"),
        ("null", "the line is null"),
        ("3.5", "the line is a number"),
        ("true", "the line is true or false"),
    ],
)
def test_a_line_that_is_not_a_json_object_is_an_error(tmp_path, line, expected):
    message = error(tmp_path, NATIVE, line)
    assert message.startswith("data.jsonl:2: ")
    assert expected in message


# Faulty records


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ({"prompt": "Why?"}, 'field "answer" is missing; add it'),
        ({"question": "Why?", "answer": "So."}, 'field "prompt" is missing; rename question to prompt'),
        ({"prompt": "Why?", "response": "So."}, 'field "answer" is missing; rename response to answer'),
        ({"answer": "So."}, 'field "prompt" is missing'),
        ({"completion": "So."}, 'field "prompt" is missing'),
        ({}, 'field "prompt" is missing'),
        (
            {**NATIVE, "anwser": SECRET},
            'unknown field "anwser" (data of your own goes under "meta"); did you mean answer?',
        ),
        ({**NATIVE, "Prompt": SECRET}, "did you mean prompt?"),
        ({**NATIVE, "reasonning": SECRET}, "did you mean reasoning?"),
        ({**NATIVE, "metta": SECRET, "completions": 1}, "did you mean completion?"),
        ({**NATIVE, "open": False}, 'only a side of a pair may be "open"'),
        (
            {**NATIVE, "system": SECRET},
            'field "system" would change the prompt; put it into the messages of the prompt',
        ),
        ({**NATIVE, "audio": SECRET}, 'field "audio" is not text'),
        ({**NATIVE, "chat_template_kwargs": {"x": 1}}, 'field "chat_template_kwargs" would change the prompt'),
        ({**NATIVE, "images": [SECRET]}, 'field "images" is not text'),
        ({**NATIVE, "thinking": SECRET}, 'field "thinking" stands beside the messages'),
        (
            {"prompt": "Why?", "completion": "So.", "label": False},
            'field "label" makes this a labelled response, which may be undesirable; give it to stage 2',
        ),
        (
            {"conversations": [{"from": "human", "value": SECRET}]},
            'field "conversations" is that of another format; convert it: saro convert sharegpt',
        ),
        ({"instruction": "Why?", "output": "So."}, "convert it: saro convert alpaca"),
        (
            {**NATIVE, "completion": "So."},
            "fields of two formats: prompt, reasoning, answer, completion; give those of one",
        ),
        (
            {"messages": chat(("user", "Why?"), ("assistant", "So.")), "prompt": "Who?"},
            "prompt is not that of the conversation beside it; fix it, or remove it",
        ),
        ({"messages": chat(("user", "Why?"), ("assistant", "So.")), "completion": "So."}, "fields of two formats"),
        ({"prompt": "Why?", "chosen": NATIVE}, 'field "chosen" makes this a preference pair'),
    ],
)
def test_the_fields_must_be_those_of_one_format(tmp_path, record, expected):
    assert expected in error(tmp_path, record)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"prompt": None}, "prompt is null; give a string or a list of messages"),
        ({"prompt": {"role": "user"}}, "prompt is an object"),
        ({"prompt": []}, "prompt is an empty list"),
        ({"prompt": " \n"}, "prompt is empty"),
        ({"answer": 3}, "answer is a number; give a string"),
        ({"answer": None}, "answer is null"),
        ({"answer": "\t"}, "answer is empty"),
        ({"reasoning": True}, "reasoning is true or false; give a string or a list of steps"),
        ({"reasoning": ""}, "reasoning is empty; write it, or leave the field out"),
        ({"reasoning": []}, "reasoning has no steps"),
        ({"reasoning": ["one", " "]}, "reasoning step 2 is empty"),
        ({"reasoning": ["one", 2]}, "reasoning step 2 is a number"),
        ({"id": None}, "id is null"),
        ({"id": True}, "id is true or false"),
        ({"id": 1.5}, "id is a number; give a string or a whole number"),
        ({"id": " "}, "id is empty"),
        ({"kind": "safty"}, 'kind is "safty"; did you mean safety?'),
        ({"kind": SECRET}, "kind is (15 characters of text); valid are general, safety"),
        ({"kind": ["safety"]}, "kind is a list"),
        ({"answer": "ab\0c"}, "answer has a NUL character at 3; remove it"),
        ({"answer": "ab\ud800"}, "answer has half of a surrogate pair at character 3"),
        ({"reasoning": ["a", "\udc00"]}, "reasoning step 2 has half of a surrogate pair at character 1"),
    ],
)
def test_a_faulty_value_is_named(tmp_path, change, expected):
    assert expected in error(tmp_path, {**NATIVE, **change})


@pytest.mark.parametrize(
    ("turns", "expected"),
    [
        (["Why?"], "prompt: message 1 is a string"),
        ([{"role": "user"}], "prompt: message 1 has no content"),
        ([{"content": "Why?"}], "prompt: message 1 has no role"),
        ([{"role": "usr", "content": "Why?"}], 'message 1 has the role "usr"; did you mean user?'),
        ([{"role": 1, "content": "Why?"}], "message 1 has a role that is a number"),
        ([{"role": "user", "content": "Why?", "name": SECRET}], 'message 1 has the field "name"; a message has only'),
        ([{"role": "user", "content": [{"type": "text"}]}], "prompt: message 1: content is a list; give a string"),
        (chat(("user", " ")), "prompt: message 1: content is empty"),
        (chat(("user", "a"), ("system", "b"), ("user", "c")), "message 2 is a system turn; only the first may be one"),
        (chat(("user", "a"), ("assistant", "b")), "the last turn is the assistant's; put it into the response"),
        (chat(("system", "a")), "the last turn is the system's; add the user turn to answer"),
        (chat(("developer", "a")), "the last turn is the developer's; add the user turn to answer"),
        (
            chat(("user", "a"), ("developer", "b"), ("user", "c")),
            "message 2 is a developer turn; move it to the beginning",
        ),
        (chat(("tool", "a"), ("user", "c")), "the first turn is a tool's; begin with the user's"),
        (chat(("user", "a"), ("tool", "b")), "message 2 is a tool turn after the user's; add the assistant's call"),
        ([{"role": "user", "content": None}], "message 1: content is null; write the turn's text or drop the record"),
        (
            [{"role": "assistant", "content": None, "tool_calls": [{}]}],
            'message 1: tool_calls: call 1 has no function; give {"type": "function", "function": {"name", ...}}',
        ),
        (
            [{"role": "assistant", "content": "a", "thinking": SECRET, "reasoning_content": SECRET}],
            "message 1 has reasoning_content and thinking; keep one of them",
        ),
        (
            [{"role": "user", "content": "a", "thinking": SECRET}],
            "a user turn has thinking; only the assistant reasons",
        ),
        ([{"role": "assistant", "content": "a", "thinking": " "}], "message 1: thinking is empty; write it, or leave"),
        ([{"role": "assistant", "content": "a", "thinking": ["b"]}], "message 1: thinking is a list; give a string"),
    ],
)
def test_a_faulty_conversation_is_named(tmp_path, turns, expected):
    assert expected in error(tmp_path, {**NATIVE, "prompt": turns})


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ({"prompt": chat(("user", "a")), "completion": "b"}, "prompt is a list and completion is a string; give both"),
        ({"prompt": "a", "completion": 1}, "completion is a number"),
        ({"prompt": "a", "completion": " "}, "completion is empty"),
        ({"prompt": chat(("user", "a")), "completion": chat(("user", "b"))}, "completion is not one assistant turn"),
        (
            {"prompt": chat(("user", "a")), "completion": chat(("assistant", "b"), ("assistant", "c"))},
            "completion is not one assistant turn; put the turns before it into the prompt",
        ),
        ({"messages": "a"}, "messages is a string; give a list of messages"),
        ({"messages": []}, "messages is an empty list"),
        ({"messages": chat(("user", "a"))}, "the last turn of messages is the user's; end with the assistant turn"),
        ({"messages": chat(("assistant", "a"))}, "messages before the last turn: there are none; add the user turn"),
        ({"messages": chat(("user", "a"), ("assistant", ""))}, "messages: message 2: content is empty"),
    ],
)
def test_a_faulty_trl_record_is_named(tmp_path, record, expected):
    assert expected in error(tmp_path, record)


def test_an_id_given_twice_names_both_lines(tmp_path):
    message = error(tmp_path, {**NATIVE, "id": "a"}, "", NATIVE, {**NATIVE, "id": "a"})
    assert message == 'data.jsonl:4: id "a" is already used on line 1; give each record its own id, or none'


def test_a_number_and_its_text_are_the_same_id(tmp_path):
    assert 'id "7" is already used on line 1' in error(tmp_path, {**NATIVE, "id": 7}, {**NATIVE, "id": "7"})


def test_an_id_may_not_be_the_default_of_another_record(tmp_path):
    assert 'id "data:1" is already used on line 1' in error(tmp_path, NATIVE, {**NATIVE, "id": "data:1"})
