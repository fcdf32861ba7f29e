"""`saro chat`: a conversation in the terminal with a run's model, and with its base model."""

from __future__ import annotations

import io
import re
import sys
from datetime import date

import pytest
import torch
from command import run_saro
from loaded import load
from rich.console import Console
from tiny import IM_END, tiny_tokenizer

from saro.data.chat_format import ChatFormat
from saro.data.records import Example, Message, Response
from saro.errors import SaroError
from saro.model.attention import PACKED
from saro.model.generate import answer_prompts
from saro.runs.finished import FinishedRun
from saro.tools.chat import Options, Speaker, ThinkSplitter, converse, load_speakers, read_stdin

pytestmark = pytest.mark.usefixtures("one_thread")

OPENS_THINKING = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n' }}{% endif %}"
)
DIM, BOLD, PLAIN = "\x1b[2m", "\x1b[1m", "\x1b[0m"


class Script:
    """Stands for a model's ``generate``: gives scripted replies, and keeps the prompts and options it was called with."""

    def __init__(self, chat: ChatFormat, *replies: str | list) -> None:
        self.chat = chat
        self.replies = list(replies)
        self.prompts: list[str] = []
        self.options: list = []

    def __call__(self, input_ids, attention_mask, generation_config, streamer):
        self.prompts.append(self.chat.tokenizer.decode(input_ids[0]))
        self.options.append(generation_config)
        reply = self.replies.pop(0)
        streamer.put(input_ids)
        said = []
        for part in reply if isinstance(reply, list) else [reply, IM_END]:
            if callable(part):
                part()
                continue
            said += [part] if isinstance(part, int) else self.chat.tokenizer(part, add_special_tokens=False).input_ids
            for token in [part] if isinstance(part, int) else self.chat.tokenizer(part).input_ids:
                streamer.put(torch.tensor([token]))
        streamer.end()
        return torch.cat([input_ids, torch.tensor([said])], 1)


def interrupt() -> None:
    raise KeyboardInterrupt


class Talk:
    """A conversation with scripted models."""

    def __init__(self, folder: str, *scripts: list, template: str | None = None, colour: bool = False, **options):
        tokenizer = tiny_tokenizer() if template is None else tiny_tokenizer(template)
        self.chat = ChatFormat(tokenizer, frozenset([IM_END]), date(2024, 7, 26))
        self.file = io.StringIO()
        self.console = Console(file=self.file, force_terminal=colour, color_system="standard" if colour else None)
        self.options = Options(run=folder, **options)
        self.scripts = [Script(self.chat, *replies) for replies in scripts]
        self.speakers = []
        for name, script in zip(("base", "trained")[-len(scripts) :], self.scripts, strict=True):
            policy = load(folder)
            policy.causal_lm.generate = script
            self.speakers.append(Speaker(name, policy))

    @property
    def shown(self) -> str:
        return self.file.getvalue()

    def say(self, *lines: str) -> Talk:
        rest = iter(lines)
        converse(self.speakers, self.chat, self.options, lambda: next(rest, None), self.console)
        return self


@pytest.fixture
def talk(tiny_model):
    def start(*scripts: list, **options) -> Talk:
        return Talk(tiny_model(), *scripts, **options)

    return start


# Reasoning and answer.

THOUGHT = "<think>\nTwo and two. 2 < 3\n</think>\n\nIt is four, <thinly>."


def joined(pieces: list[tuple[str, bool]]) -> tuple[str, str]:
    return "".join(p for p, thinking in pieces if thinking), "".join(p for p, thinking in pieces if not thinking)


@pytest.mark.parametrize("size", [1, 2, 3, 5, 7, 100])
def test_reasoning_and_answer_are_split_wherever_the_text_is_cut(size):
    splitter = ThinkSplitter(("<think>", "</think>"), thinking=False)
    pieces = [p for i in range(0, len(THOUGHT), size) for p in splitter.feed(THOUGHT[i : i + size])] + splitter.end()
    reasoning, _, answered = THOUGHT.partition("</think>")
    assert joined(pieces) == (reasoning + "</think>", answered)
    assert "".join(p for p, _ in pieces) == THOUGHT


def test_only_a_possible_beginning_of_a_tag_is_held_back():
    splitter = ThinkSplitter(("<think>", "</think>"), thinking=False)
    assert splitter.feed("a <thi") == [("a ", False)]
    assert splitter.feed("s") == [("<this", False)]
    assert splitter.feed("<") == []
    assert splitter.end() == [("<", False)]


def test_reasoning_that_the_template_has_opened_begins_at_once():
    splitter = ThinkSplitter(("<think>", "</think>"), thinking=True)
    assert joined(splitter.feed("why</think>yes")) == ("why</think>", "yes")


def test_reasoning_without_an_end_is_not_an_answer():
    splitter = ThinkSplitter(("<a>", "</a>"), thinking=False)
    assert joined(splitter.feed("<a>on and on") + splitter.end()) == ("<a>on and on", "")


# The output.


def test_reasoning_is_dimmed_and_the_answer_is_not(talk):
    shown = talk(["<think>\nwhy\n</think>\n\nyes"], colour=True).say("Hi").shown
    # Line ends have no style.
    assert "".join(re.findall(r"\x1b\[2m(.*?)\x1b\[0m", shown)) == "<think>why</think>"
    assert re.sub(r"\x1b\[2m.*?\x1b\[0m", "", shown).strip() == "yes"
    assert re.sub(r"\x1b\[\d+m", "", shown) == "<think>\nwhy\n</think>\n\nyes\n"


def test_reasoning_that_the_template_opens_is_dimmed_from_the_start(talk):
    run = talk(["why\n</think>\n\nyes"], colour=True, template=OPENS_THINKING).say("Hi")
    assert run.shown.startswith(DIM)
    assert run.speakers[0].history[-1] == Message("assistant", "yes")


def test_text_that_looks_like_markup_is_shown_unchanged(talk):
    assert talk(["[red]a[/red] [1, 2] :smile:"]).say("Hi").shown == "[red]a[/red] [1, 2] :smile:\n"


def test_special_tokens_are_shown_and_the_stop_token_is_not(talk):
    assert talk([["a", 1, "b", IM_END]]).say("Hi").shown == "a<|im_start|>b\n"


def test_tokens_are_shown_as_they_come(talk):
    seen: list[str] = []
    run = talk([["one ", lambda: seen.append(run.shown), "two", lambda: seen.append(run.shown), IM_END]])
    run.say("Hi")
    assert seen == ["one ", "one two"]


def test_a_character_of_several_tokens_is_shown_when_complete(talk):
    seen: list[str] = []
    first, *others = tiny_tokenizer()("☂").input_ids
    run = talk([["a", first, lambda: seen.append(run.shown), *others, IM_END]])
    assert run.say("Hi").shown == "a☂\n"
    assert seen == ["a"]


def test_an_answer_that_is_cut_says_so(talk):
    assert talk([["half an"]], max_tokens=7).say("Hi").shown == "half an\n[cut after 7 tokens]\n"


# The conversation.


def test_the_history_holds_answers_without_their_reasoning(talk):
    run = talk(["<think>\nwhy\n</think>\n\nfirst", "<think>\nhm\n</think>\n\nsecond"]).say("One", "Two")
    turns = [Message("user", "One"), Message("assistant", "first"), Message("user", "Two")]
    assert run.scripts[0].prompts[1] == run.chat.render_prompt(turns)
    assert "why" not in run.scripts[0].prompts[1]


def test_reset_clears_the_history(talk):
    run = talk(["first", "second"]).say("One", "/reset", "Two")
    assert run.scripts[0].prompts[1] == run.chat.render_prompt([Message("user", "Two")])


def test_empty_lines_are_skipped(talk):
    assert talk(["only"]).say("", "  \n", "Hi\n").shown == "only\n"


def test_exit_ends_before_the_next_line(talk):
    assert talk(["only"]).say("Hi", "/exit", "More").shown == "only\n"


def test_an_unknown_command_is_reported_and_not_sent(talk):
    assert talk([]).say("/rest").shown == "[unknown command /rest; did you mean /reset?]\n"


def test_a_path_is_not_a_command(talk):
    assert talk(["a folder"]).say("/usr/bin is what?").shown == "a folder\n"


def test_a_turn_without_an_answer_is_forgotten(talk):
    run = talk([["<think>\non and on"], "yes"]).say("One", "Two")
    assert "[cut after 17 tokens, before an answer: this turn is forgotten]" in run.shown
    assert run.scripts[0].prompts[1] == run.chat.render_prompt([Message("user", "Two")])


def test_ctrl_c_stops_an_answer_and_not_the_conversation(talk):
    run = talk([["half an", interrupt], "whole"]).say("One", "Two")
    assert run.shown == "half an\n[stopped]\nwhole\n"
    turns = [Message("user", "One"), Message("assistant", "half an"), Message("user", "Two")]
    assert run.scripts[0].prompts[1] == run.chat.render_prompt(turns)
    assert run.speakers[0].policy.causal_lm.config._attn_implementation == PACKED


def test_a_conversation_longer_than_the_model_reads_asks_for_a_reset(talk):
    run = talk(["short"]).say("x" * 600, "/reset", "Hi")
    assert "tokens, more than the model reads; /reset forgets it]" in run.shown
    assert run.shown.endswith("short\n")


def test_an_answer_may_fill_the_remaining_context(talk):
    run = talk(["one", "two"]).say("Hi", "y" * 400)
    first, second = (o.max_new_tokens for o in run.scripts[0].options)
    assert first == 512 - len(run.chat.prompt_ids([Message("user", "Hi")]))
    assert second < 512 - 400


def test_answers_are_greedy_without_a_temperature_and_drawn_with_one(talk):
    (greedy,) = talk(["a"]).say("Hi").scripts[0].options
    (drawn,) = talk(["a"], temperature=0.5).say("Hi").scripts[0].options
    assert (greedy.do_sample, drawn.do_sample, drawn.temperature, drawn.top_p) == (False, True, 0.5, 1.0)


# With the base model.


def test_both_answers_are_shown_one_after_the_other_with_their_names(talk):
    run = talk(["no"], ["yes"], colour=True).say("Hi")
    assert run.shown == f"{BOLD}base:{PLAIN}\nno\n{BOLD}trained:{PLAIN}\nyes\n"


def test_each_keeps_its_own_history(talk):
    run = talk(["no", "never"], ["yes", "always"]).say("One", "Two")
    assert ["no" in s.prompts[1] for s in run.scripts] == [True, False]
    assert ["yes" in s.prompts[1] for s in run.scripts] == [False, True]


@pytest.mark.parametrize("method", ["lora", "qlora", "full"])
def test_the_answers_are_those_of_the_model_before_and_after_training(finished_run, tiny_model, method):
    run = FinishedRun.open(str(finished_run(method)))
    chat = run.chat_format()
    file = io.StringIO()
    speakers = load_speakers(run, "base")
    options = Options(run=str(run.folder), max_tokens=24)
    converse(speakers, chat, options, iter(["Count to 7.??", None]).__next__, Console(file=file))
    example = Example("a", "general", (Message("user", "Count to 7.??"),), Response(None, "x"), "f:1")
    base = load(tiny_model(), method) if method != "full" else load(tiny_model(), "full")
    expected = [
        answer_prompts(policy, chat, [example.prompt], 24)[0] for policy in (base, run.load(torch.device("cpu")))
    ]
    assert expected[0] != expected[1]
    before, _, after = file.getvalue().removeprefix("base:\n").partition("trained:\n")
    for shown, text in ((before, expected[0]), (after, expected[1])):
        # Incomplete characters at the end are not shown.
        assert shown.partition("\n[cut")[0].rstrip("\n") == text.rstrip("\n\ufffd")


def test_the_base_of_an_adapter_is_the_same_model_with_the_adapter_disabled(finished_run):
    base, trained = load_speakers(FinishedRun.open(str(finished_run("qlora"))), "base")
    assert base.policy is trained.policy
    layer = trained.policy.causal_lm.model.layers[0].self_attn.q_proj
    with base.state():
        assert layer.disable_adapters
    assert not layer.disable_adapters


# The command.


def run_chat(monkeypatch, capsys, typed: bytes, *arguments: str) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(typed), encoding="ascii"))
    return run_saro(monkeypatch, capsys, "chat", *arguments)


def test_piped_lines_are_answered_without_a_prompt_or_colours(monkeypatch, capsys, finished_run):
    code, out, err = run_chat(
        monkeypatch, capsys, "Hi\n\nWhy ☂?".encode(), "--run", str(finished_run("qlora")), "--max_tokens", "3"
    )
    assert (code, err) == (0, "")
    assert "\x1b" not in out
    assert "> " not in out
    assert out.count("cut after 3 tokens") == 2


def test_bytes_that_are_not_utf8_do_not_end_the_conversation(monkeypatch, capsys, finished_run):
    code, out, _ = run_chat(monkeypatch, capsys, b"\xff\xfe\n", "--run", str(finished_run()), "--max_tokens", "3")
    assert (code, out.count("cut after 3 tokens")) == (0, 1)


def test_think_tags_are_those_of_the_option_or_else_of_the_run(monkeypatch, capsys, finished_run):
    used_tags: list[tuple[str, str]] = []
    monkeypatch.setattr("saro.tools.chat.converse", lambda speakers, chat, *rest: used_tags.append(chat.think_tags))
    run_chat(monkeypatch, capsys, b"", "--run", str(finished_run()))
    run_chat(monkeypatch, capsys, b"", "--run", str(finished_run()), "--data.think_tags", "[<r>, </r>]")
    assert used_tags == [("<think>", "</think>"), ("<r>", "</r>")]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--run", "absent"], "absent: there is no such folder; give the one that --train.output named"),
        (["--run", "x", "--compare", "bas"], "--compare is bas; it must be base"),
        (["--run", "x", "--max_tokens", "0"], "--max_tokens is 0; it must be at least 1"),
        (["--run", "x", "--temperature", "-1"], "--temperature is -1.0; it must be at least 0"),
        (["--run", "x", "--temprature", "1"], "unknown option --temprature; did you mean --temperature?"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(monkeypatch, capsys, arguments, message):
    code, _, err = run_chat(monkeypatch, capsys, b"", *arguments)
    assert (code, err) == (2, f"error: {message}\n")


def test_an_unfinished_run_is_one_line(monkeypatch, capsys, finished_run, tmp_path):
    (tmp_path / "manifest.json").write_bytes((finished_run() / "manifest.json").read_bytes())
    code, _, err = run_chat(monkeypatch, capsys, b"Hi\n", "--run", str(tmp_path))
    assert (code, err.count("\n")) == (2, 1)
    assert "the run has not finished (no final/); continue it with --resume" in err


def test_a_model_without_a_chat_template_cannot_talk(talk):
    run = talk(["no"])
    run.chat.tokenizer.chat_template = None
    with pytest.raises(SaroError, match="the model has no chat template"):
        run.say("Hi")


# At a terminal.


class Terminal(io.TextIOWrapper):
    """A stdin that a person types at."""

    def __init__(self) -> None:
        super().__init__(io.BytesIO())

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("end", [EOFError, KeyboardInterrupt])
def test_ctrl_d_and_ctrl_c_at_the_prompt_end_the_conversation(monkeypatch, end):
    monkeypatch.setattr(sys, "stdin", Terminal())
    console = Console(file=io.StringIO(), force_terminal=True)
    typed = iter(["Hi"])
    monkeypatch.setattr("builtins.input", lambda *a: next(typed, None) or (_ for _ in ()).throw(end))
    read = read_stdin(console)
    assert (read(), read()) == ("Hi", None)
    shown = console.file.getvalue()
    assert "/reset forgets the conversation" in shown
    assert shown.count("> ") == 2
