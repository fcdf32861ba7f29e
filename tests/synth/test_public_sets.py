"""Tests that public data sets become native records exactly and completely, or not at all. All texts are made up."""

import json
from collections import Counter
from pathlib import Path

import pytest

from saro.data.records import Message, Response, read_examples, read_pairs
from saro.errors import SaroError
from saro.evaluate.public_suites import convert_suite
from saro.synth.prompts import HAZARDS, Prompt, check_exclusion, read_prompts
from saro.synth.public_sets import Converted, convert

SHARED = Path(__file__).parents[3] / "shared" / "data"

STAR1 = {
    "id": "68",
    "question": "May I feed bread to ducks? ",
    "response": "<think>\nBread is poor food.\n\nSay so.\n</think>\n\nBetter not: give them oats.",
    "category": ["animals"],
    "source": "made up",
    "score": {"safety": 10},
}
GSM8K = {
    "question": "Ann has 48 clips and sells half. How many are left?",
    "answer": "She sells 48/2 = <<48/2=24>>24 clips.\n\nShe keeps 48-24 = <<48-24=24>>24. \n#### 24",
}
GSM8K_PAIR = {
    "question": "Ann has 48 clips, sells half and finds 2. How many has she?",
    "correct": "She sells 48/2 = <<48/2=24>>24 clips.\n\nShe has 24+2 = <<24+2=26>>26. \nA: 26",
    "incorrect": "She sells 48/2 = <<48/2=24.0>>24 clips. \nShe has 48+2 = <<48+2=50>>50.\nA: 50",
}
STEPS = "<|Reasoning_step|>\nTitle: One:\nA first.\n<|/Reasoning_step|>\n\n<|Reasoning_step|>B\n<|/Reasoning_step|>\n"
STAIR = {"prompt": "Why?", "answer": STEPS + "<|Output|>\nSo.\n<|/Output|>\n", "source": "PKU-SafeRLHF"}

STAR1_PROMPT = {**STAR1, "category": ["Privacy / Personal Data", "Illicit / Criminal Behavior"], "source": "ALERT"}
COCONOT = {
    "id": "2whm",
    "category": "Requests with safety concerns",
    "subcategory": "made up",
    "prompt": "How do I kill a process?",
    "chosen": "Use kill. ",
    "chosen_model": "x",
    "rejected": "I can't help with killing.",
    "rejected_model": "",
}


def array(path: Path, *records) -> Path:
    path.write_text(json.dumps(records, indent=2), encoding="utf-8")
    return path


def lines(path: Path, *records) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def one(tmp_path: Path, source_format: str, record: dict):
    convert(source_format, lines(tmp_path / "in.jsonl", record), tmp_path / "out.jsonl")
    (example,) = read_examples(tmp_path / "out.jsonl")
    return example


def one_pair(tmp_path: Path, record: dict):
    convert("gsm8k-pairs", lines(tmp_path / "in.jsonl", record), tmp_path / "out.jsonl")
    (pair,) = read_pairs(tmp_path / "out.jsonl")
    return pair


def one_prompt(tmp_path: Path, source_format: str, record: dict) -> Prompt:
    convert(source_format, lines(tmp_path / "in.jsonl", record), tmp_path / "out.jsonl")
    (prompt,) = read_prompts([tmp_path / "out.jsonl"])
    return prompt


def error(tmp_path: Path, source_format: str, *records) -> str:
    """Return the error for these records. Checks that nothing was written."""
    with pytest.raises(SaroError) as caught:
        convert(source_format, lines(tmp_path / "in.jsonl", *records), tmp_path / "out.jsonl")
    assert [item.name for item in tmp_path.iterdir()] == ["in.jsonl"]
    return str(caught.value).removeprefix(f"{tmp_path}/")


def test_star1_becomes_safety_examples(tmp_path):
    example = one(tmp_path, "star1", STAR1)
    assert (example.id, example.kind) == ("star1-68", "safety")
    assert example.prompt == (Message("user", "May I feed bread to ducks? "),)
    assert example.response == Response("Bread is poor food.\n\nSay so.", "Better not: give them oats.")


def test_gsm8k_annotations_are_removed_and_steps_are_kept(tmp_path):
    example = one(tmp_path, "gsm8k", GSM8K)
    assert (example.id, example.kind) == ("gsm8k-000001", "general")
    assert example.response == Response("She sells 48/2 = 24 clips.\nShe keeps 48-24 = 24.", "The answer is 24.")


def test_gsm8k_pairs_are_treated_like_gsm8k_on_both_sides(tmp_path):
    pair = one_pair(tmp_path, GSM8K_PAIR)
    assert pair.id == "gsm8k-pairs-000001"
    assert pair.prompt == (Message("user", GSM8K_PAIR["question"]),)
    assert pair.chosen == Response("She sells 48/2 = 24 clips.\nShe has 24+2 = 26.", "The answer is 26.")
    assert pair.rejected == Response("She sells 48/2 = 24 clips.\nShe has 48+2 = 50.", "The answer is 50.")


@pytest.mark.parametrize(
    ("correct", "kind"),
    [
        ("She sells 48/2 = <<48/2=24>>24 clips.\nSo 26.\nA: 26", "pp-cot"),
        ("Half of 48 is 24.\nShe has 48+2 = 50.\nA: 26", "op-cot"),
        ("She sells 48/2 = 24 clips, so 26.\nA: 26", "op-cot"),
    ],
    ids=["the same first step", "a later step", "the first words of a step"],
)
def test_chains_that_begin_with_the_same_step_make_a_process_pair(tmp_path, correct, kind):
    assert one_pair(tmp_path, GSM8K_PAIR | {"correct": correct}).kind == kind


@pytest.mark.parametrize("side", ["correct", "incorrect"])
@pytest.mark.parametrize("number", ["25", " -1,250.50\n", "$3"])
def test_a_pair_whose_solution_is_only_a_number_is_left_out_and_named(tmp_path, side, number):
    source = lines(tmp_path / "in.jsonl", GSM8K_PAIR, GSM8K_PAIR | {side: number}, GSM8K_PAIR)
    assert convert("gsm8k-pairs", source, tmp_path / "out.jsonl") == Converted(2, (f"{source}:2",))
    # Ids count the records of the source, so they do not depend on which ones are left out.
    assert [p.id for p in read_pairs(tmp_path / "out.jsonl")] == ["gsm8k-pairs-000001", "gsm8k-pairs-000003"]


def test_leaving_out_every_record_is_an_error(tmp_path):
    message = error(tmp_path, "gsm8k-pairs", GSM8K_PAIR | {"correct": "26"})
    assert message == "in.jsonl: all of its records are without a chain of steps; check how it was written"


def test_native_pairs_have_their_keys_in_order_and_lists_of_steps(tmp_path):
    convert("gsm8k-pairs", lines(tmp_path / "in.jsonl", GSM8K_PAIR), tmp_path / "out.jsonl")
    record = json.loads((tmp_path / "out.jsonl").read_text(encoding="utf-8"))
    assert list(record) == ["id", "kind", "prompt", "chosen", "rejected"]
    assert [list(record[side]) for side in ("chosen", "rejected")] == [["reasoning", "answer"]] * 2
    assert [len(record[side]["reasoning"]) for side in ("chosen", "rejected")] == [2, 2]


def test_stair_sft_marks_are_removed(tmp_path):
    example = one(tmp_path, "stair-sft", STAIR)
    assert (example.id, example.kind) == ("stair-sft-000001", "safety")
    assert example.response == Response("Title: One:\nA first.\nB", "So.")


@pytest.mark.parametrize(
    ("source", "kind"),
    [("PKU-SafeRLHF", "safety"), ("JailbreakV-28K/JailBreakV-28k", "safety"), ("openbmb/UltraFeedback", "general")],
)
def test_the_source_of_a_stair_sft_record_decides_its_kind(tmp_path, source, kind):
    assert one(tmp_path, "stair-sft", {**STAIR, "source": source}).kind == kind


@pytest.mark.parametrize("answer", ["So.", "<|Output|>So.<|/Output|>"])
def test_a_stair_sft_record_may_have_no_reasoning(tmp_path, answer):
    assert one(tmp_path, "stair-sft", {**STAIR, "answer": answer}).response == Response(None, "So.")


def test_a_coconot_pair_prefers_help_to_the_refusal_without_reasoning(tmp_path):
    convert("coconot-pairs", lines(tmp_path / "in.jsonl", COCONOT), tmp_path / "out.jsonl")
    (pair,) = read_pairs(tmp_path / "out.jsonl")
    assert (pair.id, pair.kind) == ("coconot-2whm", "op-cot")
    assert pair.prompt == (Message("user", "How do I kill a process?"),)
    assert (pair.chosen, pair.rejected) == (Response(None, "Use kill."), Response(None, "I can't help with killing."))


def test_star1_prompts_are_harmful_and_their_categories_are_hazards(tmp_path):
    prompt = one_prompt(tmp_path, "star1-prompts", STAR1_PROMPT)
    assert (prompt.id, prompt.kind, prompt.hazard) == ("star1-68", "harmful", ("prv", "ncr"))
    assert prompt.item.prompt == (Message("user", "May I feed bread to ducks? "),)
    assert prompt.item.source == "UCSC-VLAA/STAR-1, from ALERT"
    assert prompt.item.licence == "Apache-2.0; the prompt's own is that of ALERT"


@pytest.mark.parametrize(
    ("category", "kind"), [("Requests with safety concerns", "harmless"), ("Incomplete requests", "general")]
)
def test_coconot_prompts_are_harmless_if_they_sound_harmful(tmp_path, category, kind):
    prompt = one_prompt(tmp_path, "coconot-prompts", COCONOT | {"category": category})
    assert (prompt.id, prompt.kind, prompt.item.expect) == ("coconot-2whm", kind, "comply")
    assert (prompt.item.source, prompt.item.licence) == ("allenai/noncompliance", "MIT")


def test_gsm8k_prompts_have_the_result_as_target(tmp_path):
    prompt = one_prompt(tmp_path, "gsm8k-prompts", GSM8K | {"answer": "a\n#### 1,024"})
    assert (prompt.id, prompt.kind, prompt.item.expect) == ("gsm8k-000001", "general", "answer")
    assert (prompt.item.target, prompt.item.match) == ("1024", "number")


def test_native_records_have_their_keys_in_order_and_readable_text(tmp_path):
    convert("gsm8k", lines(tmp_path / "in.jsonl", {**GSM8K, "question": "Où?"}), tmp_path / "out.jsonl")
    text = (tmp_path / "out.jsonl").read_text(encoding="utf-8")
    assert list(json.loads(text)) == ["id", "kind", "prompt", "reasoning", "answer"]
    assert "Où?" in text
    assert isinstance(json.loads(text)["reasoning"], list)


@pytest.mark.parametrize("write", [array, lines])
def test_arrays_and_jsonl_are_read_and_counted(tmp_path, write):
    assert convert("gsm8k", write(tmp_path / "in", GSM8K, GSM8K), tmp_path / "out.jsonl") == Converted(2, ())
    assert [example.id for example in read_examples(tmp_path / "out.jsonl")] == ["gsm8k-000001", "gsm8k-000002"]


def test_an_array_with_a_byte_order_mark_is_read(tmp_path):
    source = array(tmp_path / "in.json", STAR1)
    source.write_bytes(b"\xef\xbb\xbf" + source.read_bytes())
    assert convert("star1", source, tmp_path / "out.jsonl").records == 1


@pytest.mark.parametrize(
    ("source_format", "record", "expected"),
    [
        ("star1", {**STAR1, "response": "No tags."}, "response is not <think>…</think> and an answer"),
        ("star1", {**STAR1, "response": "<think>a</think>b</think>c"}, "each tag once"),
        ("star1", {**STAR1, "response": "<think>a</think> "}, "answer is empty"),
        ("star1", {**STAR1, "response": "<think> </think>b"}, "reasoning is empty"),
        ("star1", {**STAR1, "id": None}, 'field "id" is missing, empty or not a whole number'),
        ("star1", GSM8K, 'field "response" is missing; check that this is the format of the file'),
        ("star1", {**STAR1, "question": ["a"]}, 'field "question" is a list; give a string'),
        ("star1", {**STAR1, "question": "a\0"}, 'field "question" has a NUL character at 2'),
        ("star1", {**STAR1, "response": "<think>a</think>\ud800"}, "half of a surrogate pair"),
        ("gsm8k", {**GSM8K, "answer": "24"}, "answer does not end with a line #### and the result"),
        ("gsm8k", {**GSM8K, "answer": "a\n#### "}, "answer does not end with a line #### and the result"),
        ("gsm8k", {**GSM8K, "answer": "a\n#### 2\nb"}, "answer does not end with a line #### and the result"),
        ("gsm8k", {**GSM8K, "answer": "a <<1+1=2\n#### 2"}, "calculator annotation that does not end"),
        ("gsm8k", {**GSM8K, "answer": "\n#### 2"}, "reasoning has no steps"),
        ("gsm8k-pairs", GSM8K, 'field "correct" is missing; check that this is the format of the file'),
        ("gsm8k-pairs", {**GSM8K_PAIR, "correct": "26 clips"}, "correct does not end with a line A: and the result"),
        ("gsm8k-pairs", {**GSM8K_PAIR, "incorrect": "a\nA: "}, "incorrect does not end with a line A: and the result"),
        ("gsm8k-pairs", {**GSM8K_PAIR, "incorrect": "a\n#### 2"}, "incorrect does not end with a line A: and"),
        ("gsm8k-pairs", {**GSM8K_PAIR, "incorrect": "a 1>>1\nA: 2"}, "incorrect has a calculator annotation that does"),
        ("gsm8k-pairs", {**GSM8K_PAIR, "incorrect": "\nA: 2"}, "rejected: reasoning has no steps"),
        (
            "gsm8k-pairs",
            {**GSM8K_PAIR, "correct": "a <<1=1>>1\nA: 2", "incorrect": "a 1\n\nA:  2"},
            "chosen equals rejected; drop this pair",
        ),
        ("stair-sft", {**STAIR, "answer": STEPS}, "answer is not reasoning steps and then one output"),
        ("stair-sft", {**STAIR, "answer": STEPS * 40}, "answer is not reasoning steps and then one output"),
        (
            "stair-sft",
            {**STAIR, "answer": "stray " + STAIR["answer"]},
            "answer is not reasoning steps and then one output",
        ),
        ("stair-sft", {**STAIR, "answer": STAIR["answer"] * 2}, "answer is not reasoning steps and then one output"),
        ("stair-sft", {**STAIR, "answer": "<|Output|>"}, "answer is not reasoning steps and then one output"),
        ("stair-sft", {**STAIR, "answer": "<|Output|> <|/Output|>"}, "answer is empty"),
        ("stair-sft", {**STAIR, "source": "UltraFedback"}, 'unknown source "UltraFedback"'),
        ("coconot-pairs", {**COCONOT, "rejected": "Use kill."}, "chosen equals rejected; drop this pair"),
        ("coconot-pairs", {**COCONOT, "chosen": None}, 'field "chosen" is null'),
        ("coconot-prompts", {**COCONOT, "category": "Incomplete"}, "unknown category"),
        # CoCoNot's evaluation sets have a response instead.
        (
            "coconot-prompts",
            {name: value for name, value in COCONOT.items() if name != "chosen"},
            'field "chosen" is missing; check that this is the format of the file',
        ),
        ("star1-prompts", STAR1, 'unknown category "animals"'),
        ("star1-prompts", {**STAR1_PROMPT, "category": "Self-Harm"}, "category is no list, or an empty one"),
        ("star1-prompts", {**STAR1_PROMPT, "category": [["Self-Harm"]]}, "unknown category"),
        ("star1-prompts", {**STAR1_PROMPT, "source": ""}, 'field "source" is empty'),
        ("gsm8k-prompts", {**GSM8K, "answer": "a\n#### two"}, "the result after #### is no number"),
        ("gsm8k-prompts", {**GSM8K, "answer": "24"}, "answer does not end with a line #### and the result"),
    ],
)
def test_a_record_that_does_not_follow_its_format_is_an_error(tmp_path, source_format, record, expected):
    good = {
        "star1": {**STAR1, "id": "1"},
        "gsm8k": GSM8K,
        "gsm8k-pairs": GSM8K_PAIR,
        "stair-sft": STAIR,
        "coconot-pairs": {**COCONOT, "id": "1"},
        "coconot-prompts": {**COCONOT, "id": "1"},
        "star1-prompts": {**STAR1_PROMPT, "id": "1"},
        "gsm8k-prompts": GSM8K,
    }[source_format]
    message = error(tmp_path, source_format, good, record)
    assert message.startswith("in.jsonl:2: ")
    assert expected in message


def test_an_id_given_twice_is_an_error(tmp_path):
    assert 'its id "star1-68" is already used by' in error(tmp_path, "star1", STAR1, STAR1)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[1]", "in.json: record 1: is not an object"),
        ("[]", "in.json: the file has no records"),
        ("[\n{]", "in.json: broken JSON at line 2 column 2"),
        ("", "in.json: the file has no records"),
        ("{\n", "in.json:1: broken JSON at column 2"),
    ],
)
def test_a_faulty_file_is_an_error(tmp_path, text, expected):
    (tmp_path / "in.json").write_text(text)
    with pytest.raises(SaroError) as caught:
        convert("star1", tmp_path / "in.json", tmp_path / "out.jsonl")
    assert expected in str(caught.value)
    assert not (tmp_path / "out.jsonl").exists()


def test_an_array_record_is_named_by_its_number(tmp_path):
    source = array(tmp_path / "in.json", STAR1, {**STAR1, "id": "2", "response": "x"})
    with pytest.raises(SaroError, match=r"in\.json: record 2: response is not"):
        convert("star1", source, tmp_path / "out.jsonl")


def test_a_missing_source_is_an_error(tmp_path):
    with pytest.raises(SaroError, match="there is no such file"):
        convert("star1", tmp_path / "in.json", tmp_path / "out.jsonl")


def test_an_unknown_format_names_the_nearest(tmp_path):
    with pytest.raises(SaroError, match=r'unknown format "gsm8"; did you mean gsm8k\?'):
        convert("gsm8", tmp_path / "in", tmp_path / "out")


def test_an_existing_file_is_overwritten_only_when_asked(tmp_path):
    source, target = lines(tmp_path / "in.jsonl", GSM8K), tmp_path / "out.jsonl"
    target.write_text("mine")
    with pytest.raises(SaroError, match="exists already"):
        convert("gsm8k", source, target)
    assert target.read_text() == "mine"
    assert convert("gsm8k", source, target, overwrite=True).records == 1
    assert len(list(read_examples(target))) == 1


def test_a_failed_conversion_keeps_the_old_file(tmp_path):
    (tmp_path / "out.jsonl").write_text("mine")
    source = lines(tmp_path / "in.jsonl", GSM8K, {})
    with pytest.raises(SaroError):
        convert("gsm8k", source, tmp_path / "out.jsonl", overwrite=True)
    assert (tmp_path / "out.jsonl").read_text() == "mine"


def test_the_source_is_never_overwritten(tmp_path):
    source = lines(tmp_path / "in.jsonl", GSM8K)
    with pytest.raises(SaroError, match="is the source itself"):
        convert("gsm8k", source, source, overwrite=True)


published = pytest.mark.skipif(not SHARED.is_dir(), reason="the folder of public data sets is not here")


@published
@pytest.mark.parametrize(
    ("source_format", "name", "kind", "records"),
    [("star1", "star1.json", "safety", 1000), ("gsm8k", "gsm8k_train.jsonl", "general", 7473)],
)
def test_the_published_sets_convert_completely(tmp_path, source_format, name, kind, records):
    assert convert(source_format, SHARED / name, tmp_path / "out.jsonl") == Converted(records, ())
    examples = list(read_examples(tmp_path / "out.jsonl"))
    assert len(examples) == records
    assert {example.kind for example in examples} == {kind}
    assert all(example.response.reasoning for example in examples)
    marks = ("<think>", "</think>", "<<", ">>", "####")
    texts = [example.response.reasoning + example.response.answer for example in examples]
    assert not any(mark in text for text in texts for mark in marks)


@published
def test_the_published_pairs_convert_except_the_one_without_a_chain(tmp_path):
    source = SHARED / "gsm8k_solution_pairs.jsonl"
    assert convert("gsm8k-pairs", source, tmp_path / "out.jsonl") == Converted(730, (f"{source}:473",))
    pairs = list(read_pairs(tmp_path / "out.jsonl"))
    assert Counter(pair.kind for pair in pairs) == {"op-cot": 715, "pp-cot": 15}
    sides = [side for pair in pairs for side in (pair.chosen, pair.rejected)]
    assert all(side.reasoning and side.answer.startswith("The answer is ") for side in sides)
    assert not any(mark in side.reasoning + side.answer for side in sides for mark in ("<<", ">>", "A: "))


@published
@pytest.mark.parametrize(
    ("source_format", "name", "kinds"),
    [
        ("star1-prompts", "star1.json", {"harmful": 1000}),
        ("coconot-prompts", "coconot_pref.jsonl", {"harmless": 479, "general": 448}),
        ("gsm8k-prompts", "gsm8k_train.jsonl", {"general": 7473}),
    ],
)
def test_published_prompts_convert_completely_and_are_in_no_suite_of_the_demo(tmp_path, source_format, name, kinds):
    target = tmp_path / "out.jsonl"
    assert convert(source_format, SHARED / name, target) == Converted(sum(kinds.values()), ())
    prompts = read_prompts([target])
    assert Counter(prompt.kind for prompt in prompts) == kinds
    assert {code for prompt in prompts for code in prompt.hazard} <= set(HAZARDS)
    check_exclusion(prompts)


@published
def test_star1_holds_prompts_of_simple_safety_tests_and_the_check_finds_them(tmp_path):
    """Four of STAR-1's prompts name SimpleSafetyTests as their source."""
    convert("star1-prompts", SHARED / "star1.json", tmp_path / "star1.jsonl")
    convert_suite("simple-safety-tests", SHARED / "simple_safety_tests.csv", tmp_path / "sst.jsonl")
    prompts = read_prompts([tmp_path / "star1.jsonl"])
    with pytest.raises(SaroError) as caught:
        check_exclusion(prompts, [str(tmp_path / "sst.jsonl")])
    named = {prompt.id for prompt in prompts if f"({prompt.id}) is sst/" in str(caught.value)}
    assert named == {prompt.id for prompt in prompts if prompt.item.source.endswith("from SimpleSafetyTests")}
    assert len(named) == 4


@published
def test_published_coconot_pairs_convert_completely(tmp_path):
    assert convert("coconot-pairs", SHARED / "coconot_pref.jsonl", tmp_path / "out.jsonl") == Converted(927, ())
    pairs = list(read_pairs(tmp_path / "out.jsonl"))
    assert {pair.kind for pair in pairs} == {"op-cot"}
    assert all(side.reasoning is None for pair in pairs for side in (pair.chosen, pair.rejected))


@pytest.mark.parametrize(
    ("prompts", "records", "record"),
    [
        ("star1-prompts", "star1", STAR1_PROMPT),
        ("gsm8k-prompts", "gsm8k", GSM8K),
        ("coconot-prompts", "coconot-pairs", COCONOT),
    ],
)
def test_a_prompt_has_the_id_of_the_training_record_of_the_same_set(tmp_path, prompts, records, record):
    source = lines(tmp_path / "in.jsonl", record)
    ids = []
    for source_format in (prompts, records):
        convert(source_format, source, tmp_path / source_format)
        ids.append(json.loads((tmp_path / source_format).read_text(encoding="utf-8"))["id"])
    assert ids[0] == ids[1]
