"""Options of data construction: what is refused, and how an option is spelled in the refusal."""

from __future__ import annotations

import pytest

from saro.errors import SaroError
from saro.program import parse_tool
from saro.synth.synth_options import STAGES, Options


def parse(*arguments: str) -> Options:
    return parse_tool(Options, "saro synth", "Make records.", [*arguments])


@pytest.mark.parametrize("stage", STAGES)
def test_the_stage_is_the_first_argument_or_an_option_of_a_file(stage, tmp_path):
    assert parse(stage).stage == stage
    file = tmp_path / "options.yaml"
    file.write_text(f"stage: {stage}\nop:\n  draws: 3\n")
    options = parse("--config", str(file))
    assert (options.stage, options.op.draws) == (stage, 3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "missing stage"),
        (["pq"], "unknown stage 'pq'; "),
        (["rw", "--rw.draws", "-1"], "--rw.draws is -1; it must be at least 0"),
        (["op", "--op.draws", "0"], "--op.draws is 0; it must be at least 1"),
        (
            ["rw", "--rw.temperature", "0"],
            "--rw.draws above 1 needs a rw.temperature above 0: greedy texts are all the same",
        ),
        (["rw", "--rw.temperature", "-0.5"], "--rw.temperature is -0.5; it must be at least 0"),
        (["rw", "--rw.general", "1.5"], "--rw.general is 1.5; it must be a share, 0 to 1"),
        (["op", "--op.guided", "-0.1"], "--op.guided is -0.1; it must be a share, 0 to 1"),
        (["op", "--op.pairs_per_prompt", "0"], "--op.pairs_per_prompt is 0; it must be at least 1"),
        (
            ["pp", "--pp.turns", "0", "--pp.borrowed", "0"],
            "--pp.turns and --pp.borrowed are 0: no step is left to turn with",
        ),
        (["pp", "--pp.open_tokens", "0"], "--pp.open_tokens is 0; it must be at least 1"),
        (
            ["pp", "--pp.forms", "[intervened]"],
            "--pp.forms: 'intervened' is no form of stage pp; did you mean intervene?",
        ),
        (["mirror", "--pp.forms", "[recover]"], "--pp.forms: 'recover' is no form of stage mirror; valid are mirror"),
        (["rw", "--budget.tokens", "0"], "--budget.tokens is 0; it must be at least 1"),
        (["rw", "--budget.input_price", "-1"], "--budget.input_price is -1.0; it must be at least 0"),
        (["rw", "--max_tokens", "0"], "--max_tokens is 0; it must be at least 1"),
        (["rw", "--limit", "0"], "--limit is 0; it must be at least 1"),
        (["rw", "--gates.model", "m"], "--gates.model is given and no gate; name one with --gates.relevance or"),
        (["pp", "--gates.relevance", "relevance"], "--gates: stage pp writes no guided texts; leave them out"),
        (["rw", "--judge.gold", "gold.json"], "unknown option --judge.gold"),
    ],
)
def test_a_mistake_is_one_line_that_names_the_option(arguments, message):
    with pytest.raises(SaroError) as caught:
        parse(*arguments)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_one_greedy_text_needs_no_temperature():
    assert parse("rw", "--rw.draws", "1", "--rw.temperature", "0").rw.draws == 1


def test_judge_is_short_for_its_name():
    assert parse("rw", "--judge", "harmbench").judge.name == "harmbench"
