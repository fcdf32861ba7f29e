"""`saro inspect`: the length report, and records with their scored tokens coloured."""

from __future__ import annotations

import io
import re
from datetime import date
from functools import partial

import pytest
from command import run_saro
from rich.console import Console
from rich.text import Text
from tiny import IM_END, tiny_tokenizer

from saro.config import DataConfig, ModelConfig
from saro.data.chat_format import ChatFormat
from saro.data.records import Example, Message, Pair, Response
from saro.data.tree import RowKind
from saro.errors import SaroError
from saro.tools.inspect_data import HIGHER, LOWER, STYLES, Options, colour, pair_tree, run


@pytest.fixture
def saro(monkeypatch, capsys):
    """Runs `saro inspect` with arguments; returns exit code, stdout and stderr."""
    return partial(run_saro, monkeypatch, capsys, "inspect")


def _inspect(files, model, *, show=1, ids=(), scores=None, width=200, color=True, **data) -> str:
    """Return what the tool prints about files; ``data``: further options of the records."""
    output = io.StringIO()
    console = Console(file=output, width=width, force_terminal=True, color_system="standard" if color else None)
    options = Options(
        model=ModelConfig(name=model), data=DataConfig(train=files, **data), show=show, ids=list(ids), scores=scores
    )
    assert run(options, console) == 0
    return output.getvalue()


def _styled(text: Text) -> list[tuple[str, str]]:
    return [(text.plain[span.start : span.end], span.style) for span in text.spans]


PAIRS = [
    {
        "id": f"pair-{name}",
        "kind": "pp-cot",
        "prompt": "Hi",
        "chosen": {"reasoning": ["Look first.", f"Yes {name}."], "answer": "yes"},
        "rejected": {"reasoning": ["Look first.", f"No {name}."], "answer": "no"},
    }
    for name in "abc"
]


def test_inspect_prints_the_length_report(saro, records_file, examples, tiny_model):
    code, out, err = saro("--data.train", records_file(examples), "--model.name", tiny_model(), "--show", "0")
    assert (code, err) == (0, "")
    assert "24 records (16 general, 8 safety)" in " ".join(out.split())
    assert "whole record" in out
    assert "r0" not in out


def test_labelled_responses_are_inspected_too(records_file, tiny_model):
    labelled = [{"prompt": f"Why {i}?", "completion": " So.", "label": i > 0} for i in range(3)]
    out = " ".join(_inspect([records_file(labelled)], tiny_model(), color=False).split())
    assert "3 records (3 op-cot)" in out
    assert "5 scored" in out


@pytest.mark.parametrize("pairs", [False, True], ids=["examples", "pairs"])
def test_the_report_counts_duplicates(records_file, examples, tiny_model, pairs):
    records = PAIRS[:2] if pairs else examples[:3]
    again = records[0] | {"id": "again"}
    text = _inspect([records_file(records), records_file([again], "more.jsonl")], tiny_model(), show=0, color=False)
    assert "; 1 exact duplicates of another one" in text
    assert "duplicates" not in _inspect([records_file(records)], tiny_model(), show=0, color=False)


def test_the_report_names_the_fields_that_are_ignored_once(records_file, examples, tiny_model):
    text = _inspect(
        [records_file([record | {"source": "x"} for record in examples])], tiny_model(), show=0, color=False
    )
    assert text.count("ignored fields: source") == 1
    assert "ignored" not in _inspect([records_file(examples)], tiny_model(), show=0, color=False)


def test_inspect_shows_each_turn_that_is_trained_on(records_file, tiny_model):
    turns = [("user", "Hi"), ("assistant", "Hello"), ("user", "Why?"), ("assistant", "So.")]
    record = {"id": "talk", "messages": [{"role": role, "content": content} for role, content in turns]}
    text = _inspect([records_file([record])], tiny_model(), show=9, color=False, train_on="all")
    assert "talk:message-2:" in text
    assert "talk:" in text.replace("talk:message-2:", "")


def test_records_are_encoded_as_in_the_run_that_trained_the_model(saro, records_file, examples, finished_run):
    final = finished_run("full") / "final"
    arguments = ("--data.train", records_file(examples), "--model.name", str(final), "--show", "0")
    code, _, err = saro(*arguments)
    assert (code, err) == (0, "")
    code, _, err = saro(*arguments, "--data.template_date", "2020-01-01")
    assert code == 2
    assert "data.template_date is 2020-01-01, and the run that trained" in err


def test_scored_tokens_are_coloured_by_their_kind():
    chat = ChatFormat(tiny_tokenizer(), frozenset([IM_END]), date(2024, 7, 26))
    example = Example("a", "general", (Message("user", "Hi"),), Response("why", "yes ☂"), "f:1")
    text = colour(chat.encode(example), chat.tokenizer)
    # The text itself has no style, or scored tokens would be dim too.
    assert text.style == ""
    assert _styled(text) == [
        ("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n", "dim"),
        ("<think>\nwhy\n</think>", STYLES[RowKind.THINK]),
        ("\n\nyes ☂", STYLES[RowKind.ANSWER]),
        ("<|im_end|>", STYLES[RowKind.STOP]),
    ]


def scored(id: str, side: str, tokens: int, *steps: tuple[int, int, float]) -> dict:
    """Return a line of `saro score --steps`: steps are (first token, number of tokens, reward)."""
    names = ("first", "tokens", "reward")
    return {"id": id, "side": side, "tokens": tokens, "steps": [dict(zip(names, step, strict=True)) for step in steps]}


def test_steps_are_coloured_by_their_reward_which_stands_behind_them():
    chat = ChatFormat(tiny_tokenizer(), frozenset([IM_END]), date(2024, 7, 26))
    sequence = chat.encode(Example("a", "general", (Message("user", "Hi"),), Response("One. Two.", "yes"), "f:1"))
    first = len("<think>\n")
    steps = scored("a", "response", 0, (first, len("One. "), 0.25), (first + len("One. "), len("Two."), -1.5))["steps"]
    text = colour(sequence, chat.tokenizer, steps=steps)
    assert _styled(text)[1:6] == [
        ("<think>\n", STYLES[RowKind.THINK]),
        ("One. ", HIGHER),
        ("[+0.25]", "dim"),
        ("Two.", LOWER),
        ("[-1.50]", "dim"),
    ]
    # In two parts, as in the tree of a pair, a step keeps its style and is marked once.
    place = sequence.scored_from + first + 2
    parts = [colour(sequence, chat.tokenizer, stop=place, steps=steps)]
    parts.append(colour(sequence, chat.tokenizer, start=place, steps=steps))
    assert "".join(part.plain for part in parts) == text.plain


def test_inspect_shows_the_rewards_that_saro_score_has_written(records_file, tiny_model):
    sides = {
        "chosen": "<think>\nLook first.\nYes a.\n</think>\n\nyes",
        "rejected": "<think>\nLook first.\nNo a.\n</think>\n\nno",
    }
    lines = [scored("pair-a", side, len(text) + 1, (8, 12, 0.5), (20, 6, -0.75)) for side, text in sides.items()]
    arguments = [records_file(PAIRS[:1])], tiny_model()
    text = _inspect(*arguments, color=False, scores=records_file(lines, "scores.jsonl"))
    assert "Look first." in text
    assert text.count("[+0.50]") == 1  # the shared step
    assert text.count("[-0.75]") == 2
    assert "[" not in _inspect(*arguments, color=False)


@pytest.mark.parametrize(
    ("lines", "wrong"),
    [
        ([{"id": "pair-a", "side": "chosen", "tokens": 3}], r"scores.jsonl:1: has no rewards of steps"),
        ([scored("pair-b", "chosen", 3)], r"--scores: those of 'pair-a' \(chosen\) are missing"),
        ([scored("pair-a", "chosen", 3)], r"--scores: those of 'pair-a' \(chosen\) are of 3 tokens, and it has \d+"),
    ],
)
def test_scores_of_other_records_are_one_line(records_file, tiny_model, lines, wrong):
    with pytest.raises(SaroError, match=wrong):
        _inspect([records_file(PAIRS[:1])], tiny_model(), scores=records_file(lines, "scores.jsonl"))


def test_inspect_shows_the_records_of_ids(records_file, examples, tiny_model):
    text = _inspect([records_file(examples)], tiny_model(), ids=["r7"])
    assert "r7:" in text
    assert "r0:" not in text


def test_inspect_names_the_nearest_id(records_file, examples, tiny_model):
    with pytest.raises(SaroError, match="--ids: no record has the id 'r77'; did you mean r7"):
        _inspect([records_file(examples)], tiny_model(), ids=["r77"])


def test_inspect_lists_records_that_are_too_long(records_file, tiny_model):
    file = records_file([{"id": "long", "prompt": "x" * 300, "answer": "y"}, {"prompt": "x", "answer": "y"}])
    text = _inspect([file], tiny_model(), pack_tokens=100, show=0)
    assert "1 records are longer than a pack of 100 tokens" in text
    assert "long" in text.splitlines()[-1]


def test_text_that_looks_like_markup_is_shown_as_it_is(records_file, tiny_model):
    file = records_file([{"id": "[bold]", "prompt": "Hi", "answer": "a [red]b[/red]"}])
    assert "[red]" in _inspect([file], tiny_model())


def test_a_part_of_a_sequence_is_coloured_like_the_whole():
    chat = ChatFormat(tiny_tokenizer(), frozenset([IM_END]), date(2024, 7, 26))
    sequence = chat.encode(Example("a", "general", (Message("user", "Hi"),), Response("why", "yes"), "f:1"))
    place = sequence.scored_from + len("<think>\nw")
    parts = [colour(sequence, chat.tokenizer, stop=place), colour(sequence, chat.tokenizer, start=place)]
    assert "".join(part.plain for part in parts) == colour(sequence, chat.tokenizer).plain
    assert _styled(parts[0])[-1] == ("<think>\nw", STYLES[RowKind.THINK])
    assert _styled(parts[1])[0] == ("hy\n</think>", STYLES[RowKind.THINK])


def test_pairs_are_recognised_by_their_fields(saro, records_file, tiny_model):
    code, out, err = saro("--data.train", records_file(PAIRS), "--model.name", tiny_model(), "--show", "0")
    assert (code, err) == (0, "")
    assert "3 pairs (3 pp-cot)" in " ".join(out.split())
    assert "pair, shared part once" in out
    assert "pair-a" not in out


def test_the_report_says_how_much_sharing_saves(records_file, tiny_model):
    text = _inspect([records_file(PAIRS)], tiny_model(), show=0)
    # One token a byte: a prompt of 21 tokens, and both sides begin with "<think>\nLook first.\n".
    sides = [len(f"{step} a.\n</think>\n\n{answer}") + 1 for step, answer in (("Yes", "yes"), ("No", "no"))]
    shared = 21 + len("<think>\nLook first.\n")
    apart, once = 2 * shared + sum(sides), shared + sum(sides)
    assert f"Sharing saves {100 * (1 - once / apart):.1f} % of {3 * apart} tokens, and up to " in text


def test_a_pair_is_shown_as_a_shared_part_and_two_branches(records_file, tiny_model):
    text = _inspect([records_file(PAIRS)], tiny_model(), color=False)
    shown = text[text.index("pair-a: ") :].splitlines()
    shown = [line.rstrip() for line in shown[1:] if not line.startswith("─")]
    assert shown[:-1] == [
        "shared: 41 tokens (21 of the prompt, 20 of the responses)",
        "<|im_start|>user",
        "Hi<|im_end|>",
        "<|im_start|>assistant",
        "<think>",
        "Look first.",
        "",
        "┣━━ chosen: 21 tokens",
        "┃   Yes a.",
        "┃   </think>",
        "┃",
        "┃   yes<|im_end|>",
        "┗━━ rejected: 19 tokens",
        "    No a.",
        "    </think>",
        "",
        "    no<|im_end|>",
    ]
    assert "pair-b: " not in text


def test_the_parts_of_a_pair_are_coloured_by_kind():
    chat = ChatFormat(tiny_tokenizer(), frozenset([IM_END]), date(2024, 7, 26))
    pair = Pair("a", "pp-cot", (Message("user", "Hi"),), Response("x\ny", "yes"), Response("x\nz", "no"), "f:1")
    tree = pair_tree(*chat.encode_pair(pair), chat.tokenizer)
    parts = [part.label.renderables[1] for part in (tree, *tree.children)]
    think, answer, stop = (STYLES[kind] for kind in RowKind)
    assert _styled(parts[0])[1:] == [("<think>\nx\n", think)]
    assert _styled(parts[0])[0][1] == "dim"
    assert _styled(parts[1]) == [("y\n</think>", think), ("\n\nyes", answer), ("<|im_end|>", stop)]
    assert _styled(parts[2]) == [("z\n</think>", think), ("\n\nno", answer), ("<|im_end|>", stop)]


def test_an_open_side_is_marked(records_file, tiny_model):
    cut = PAIRS[0] | {"rejected": {"reasoning": "Look first.\nNo a", "open": True}}
    text = _inspect([records_file([cut])], tiny_model(), color=False)
    assert "chosen: 21 tokens\n" in text
    assert "rejected: 4 tokens, open\n    No a\n" in text


def test_pairs_on_one_prompt_are_shown_one_by_one(records_file, tiny_model):
    text = _inspect([records_file(PAIRS)], tiny_model(), ids=["pair-c", "pair-a"], color=False)
    assert text.index("pair-c: ") < text.index("pair-a: ")
    assert text.count("chosen: 21 tokens") == 2
    assert "pair-b: " not in text


def test_pairs_fit_in_100_columns(records_file, tiny_model):
    long = PAIRS[0] | {"prompt": "so many words " * 30, "rejected": {"answer": "and even more words " * 30}}
    text = _inspect([records_file([long])], tiny_model(), width=100, color=False)
    shown = text[text.index("pair-a: ") :].splitlines()
    assert max(len(line) for line in shown) <= 100
    assert " ".join(shown).count("so") == 30


def test_inspect_lists_pairs_whose_tree_is_too_long(records_file, tiny_model):
    # 41 tokens are shared; 21 and 19 follow.
    text = _inspect([records_file([PAIRS[0], PAIRS[1] | {"prompt": "Hi!"}])], tiny_model(), pack_tokens=81, show=0)
    assert "1 pairs are longer than a pack of 81 tokens: pair-b" in text


def test_inspect_names_the_nearest_id_of_a_pair(records_file, tiny_model):
    with pytest.raises(SaroError, match="--ids: no record has the id 'pair-d'; did you mean pair-"):
        _inspect([records_file(PAIRS)], tiny_model(), ids=["pair-d"])


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["pairs", "examples"], "makes this an example, not a pair; give examples to stage 1 (RW)"),
        (["examples", "pairs"], 'field "chosen" makes this a preference pair; give pairs to stage 2 (SRPO)'),
    ],
)
def test_examples_and_pairs_do_not_go_together(records_file, examples, tiny_model, names, message):
    records = {"pairs": PAIRS, "examples": examples}
    files = [records_file(records[name], f"{name}.jsonl") for name in names]
    with pytest.raises(SaroError) as caught:
        _inspect(files, tiny_model())
    assert str(caught.value).startswith(f"{files[1]}:1: ")
    assert str(caught.value).endswith(message)


def test_the_demo_has_pairs_too(saro, tiny_model):
    code, out, err = saro("--pairs", "--model.name", tiny_model(), "--show", "0")
    assert (code, err) == (0, "")
    assert re.search(r"srpo_train\.jsonl: \d+ pairs", " ".join(out.split()))


def test_an_adapter_is_inspected_with_the_method_that_trained_it(saro, records_file, examples, finished_run):
    adapter = str(finished_run("lora") / "final")
    arguments = ("--data.train", records_file(examples), "--model.name", adapter, "--show", "0")
    code, _, err = saro(*arguments)
    assert code == 2
    assert "set --model.method lora" in err
    code, out, _ = saro(*arguments, "--model.method", "lora")
    assert code == 0
    assert "24 records" in " ".join(out.split())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data.trian", "x"], "unknown option --data.trian; did you mean --data.train?"),
        (["--data.train", "[]"], "--data.train names no file"),
        (["--data.pack_tokens", "1"], "--data.pack_tokens is 1; it must be at least 2"),
        (["--pairs", "--data.train", "my.jsonl"], "--pairs chooses among the demo data; a file of pairs is known"),
        (["--data.train", "absent.jsonl"], "absent.jsonl: there is no such file"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(saro, arguments, message):
    code, _, err = saro(*arguments)
    assert code == 2
    assert err.startswith(f"error: {message}")
    assert err.count("\n") == 1
