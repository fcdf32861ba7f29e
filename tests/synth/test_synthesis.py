"""Data construction from its options to its files: nothing is drawn twice, and the same store gives the same bytes."""

from __future__ import annotations

import json
import re
import signal
from datetime import date
from pathlib import Path

import httpx2
import pytest
import synth_cases
from chat_cases import QWEN3
from draw_cases import Server, chat_reply
from run_files import steps_logged
from synth_cases import ScriptedWriter, make_prompts, play, serve, write, write_lines

from saro.config import DataConfig, ModelConfig
from saro.data.records import read_examples, read_pairs
from saro.data.tree import build_tree
from saro.draws.endpoint import EndpointGenerator
from saro.errors import SaroError
from saro.model.source import find_model
from saro.program import parse_tool
from saro.synth.safety_policy import read_policy
from saro.synth.synth_options import STAGES, Options
from saro.synth.synthesis import synthesize

KINDS = ("jsonl", "manifest.json", "left_out.jsonl")


@pytest.fixture
def arguments(tiny_model, tmp_path):
    """Command line of a small stage; keywords change options, "__" stands for a dot, and None leaves an option out."""
    prompts = write_lines(tmp_path / "made.jsonl", make_prompts())

    def get(stage: str, *flags: str, **changes: object) -> list[str]:
        options: dict[str, object] = {
            "prompts": prompts,
            "generator": tiny_model(),
            "store": tmp_path / "draws.sqlite3",
            "output": tmp_path / "out" / f"{stage}.jsonl",
            "max_tokens": 2000,
            "op__draws": 4,
            "pp__draws": 4,
            "pp__neutral": 1,
            "data__template_date": "2024-07-26",
        }
        named = {name.replace("__", "."): value for name, value in (options | changes).items()}
        return [stage, *flags, *(part for k, v in named.items() if v is not None for part in (f"--{k}", str(v)))]

    return get


@pytest.fixture
def writers(monkeypatch) -> list[ScriptedWriter]:
    """The scripted models that the test's stages made."""
    made: list[ScriptedWriter] = []
    play(monkeypatch, made.append)
    return made


@pytest.fixture
def make(arguments, writers, runtime):
    """Run a stage in this process; return its manifest."""

    def run(stage: str, *flags: str, **changes: object):
        options = parse_tool(Options, "saro synth", "Make records.", arguments(stage, *flags, **changes))
        return synthesize(options, runtime)

    return run


def files_of(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir() if not file.name.startswith(".")}


@pytest.mark.parametrize("stage", STAGES)
def test_each_stage_writes_records_that_its_trainer_reads(make, tmp_path, stage):
    manifest = make(stage)
    path = tmp_path / "out" / f"{stage}.jsonl"
    records = list((read_examples if stage == "rw" else read_pairs)(path))
    assert len(records) == manifest["result"]["records"] > 0
    assert set(files_of(tmp_path / "out")) == {f"{stage}.{kind}" for kind in KINDS}


@pytest.mark.parametrize("stage", STAGES)
def test_a_second_run_draws_nothing_and_writes_the_same_bytes(make, writers, tmp_path, stage):
    make(stage)
    first = files_of(tmp_path / "out")
    asked = len(writers[0].asked)
    make(stage, "--offline")
    assert files_of(tmp_path / "out") == first
    assert [len(writer.asked) for writer in writers] == [asked, 0]


def test_the_bytes_do_not_depend_on_paths_nor_on_the_order_of_prompts(make, tmp_path):
    make("op")
    other = tmp_path / "elsewhere"
    other.mkdir()
    prompts = write_lines(other / "made.jsonl", make_prompts()[::-1])
    make("op", prompts=prompts, output=other / "op.jsonl", store=other / "other.sqlite3")
    records = tmp_path / "out" / "op.jsonl"
    assert (other / "op.jsonl").read_bytes() == records.read_bytes()


def test_stages_op_and_pp_share_their_whole_chains(make, writers):
    make("op")
    make("pp")
    keys = [{request.key(writer.identity) for request in writer.asked} for writer in writers]
    assert keys[0].isdisjoint(keys[1])


@pytest.mark.parametrize(
    ("change", "value"),
    [("max_tokens", 1999), ("rw__temperature", 0.7), ("policy", "other.yaml"), ("prompt", "other prompt")],
)
def test_a_draw_changes_with_each_option_that_decides_it(make, writers, tmp_path, change, value):
    make("rw")
    before = {request.key(writers[0].identity) for request in writers[0].asked}
    changes = {change: value, "output": tmp_path / "out" / "other.jsonl"}
    if change == "policy":
        shipped = Path(synthesize.__code__.co_filename).with_name("policies") / "saro.yaml"
        text = shipped.read_text(encoding="utf-8").replace("title: ", "title: Other ")
        (tmp_path / value).write_text(text, encoding="utf-8")
        changes["policy"] = tmp_path / value
    if change == "prompt":
        del changes["prompt"]
        rows = [row | {"prompt": row["prompt"].replace("?", " today?")} for row in make_prompts(sums=0)]
        changes["prompts"] = write_lines(tmp_path / "changed.jsonl", rows)
    make("rw", **changes)
    after = {request.key(writers[1].identity) for request in writers[1].asked}
    assert after
    if change == "policy":
        # Prompts of kind general are asked without the policy.
        assert 0 < len(after) < len(before)
    else:
        assert after.isdisjoint(before)


def test_a_draw_does_not_change_with_options_that_do_not_decide_it(make, writers, tmp_path):
    make("rw")
    make("rw", output=tmp_path / "other.jsonl", budget__calls=10_000, rw__records=3, seed=5, server__concurrency=3)
    assert writers[1].asked == []


@pytest.mark.parametrize("stage", ["rw", "pp"])
def test_killed_at_every_commit_of_the_store_it_goes_on_to_the_same_bytes(recipes, arguments, cache, tmp_path, stage):
    call = {"call": f"{synth_cases.__file__}:run_stage", "environment": {"SARO_CACHE": str(cache)}}
    prompts = write_lines(tmp_path / "few.jsonl", make_prompts(1, 1))
    changes = {"prompts": prompts, "rw__draws": 2, "pp__draws": 3, "pp__turns": 1, "pp__rollouts": 2}
    whole = recipes.run(0, *arguments(stage, output=tmp_path / "whole" / f"{stage}.jsonl", **changes), **call)
    assert whole.code == 0, whole.err
    again = arguments(stage, store=tmp_path / "killed.sqlite3", **changes)
    kills = 0
    while (code := recipes.run(1, *again, **call).code) == -signal.SIGKILL:
        kills += 1
    assert code == 0
    assert kills > 1
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")


def test_two_ranks_write_what_one_writes(recipes, arguments, cache, tmp_path):
    call = {"call": f"{synth_cases.__file__}:run_stage"}
    one = recipes.run(0, *arguments("op"), environment={"SARO_CACHE": str(cache)}, **call)
    assert one.code == 0, one.err
    two = arguments("op", output=tmp_path / "two" / "op.jsonl", store=tmp_path / "two.sqlite3")
    variables = {"SARO_CACHE": str(cache), "LOCAL_WORLD_SIZE": "2"}
    for process in recipes.run_ranks(2, 0, *two, variables=variables, **call):
        assert process.code == 0, process.err
    assert files_of(tmp_path / "two") == files_of(tmp_path / "out")


def test_offline_says_how_much_is_missing(make):
    with pytest.raises(SaroError, match="draws are not in the store; draw them without --offline"):
        make("rw", "--offline")


def test_a_plan_draws_nothing_and_writes_nothing(make, writers, capsys, tmp_path):
    assert make("pp", "--plan", budget__input_price=1, budget__output_price=2) is None
    assert writers[0].asked == []
    assert not (tmp_path / "out").exists()
    said = capsys.readouterr().err
    assert "36 texts in the first round, 0 of them in the store" in said
    assert "with a prefix cache" in said
    assert "more in later rounds" in said
    assert "at the given prices" in said
    assert "the time is not known" in said


@pytest.mark.parametrize(
    ("stage", "changes"),
    [("pp", {"pp__forms": "[intervene]", "pp__turns": 8}), ("op", {"op__draws": 1, "rw__draws": 8})],
)
def test_a_plan_bounds_the_texts_and_the_tokens_of_prompts_of_later_rounds(
    make, writers, capsys, monkeypatch, stage, changes
):
    # Only bad texts, so that stage op asks for guided ones on every prompt.
    if stage == "op":
        monkeypatch.setattr(synth_cases, "write", lambda prompt, begun, number: write(prompt, begun, 1))
    changes |= {"max_tokens": 400}
    make(stage, "--plan", **changes)
    said = " ".join(capsys.readouterr().err.split())
    texts, tokens = re.search(r"at most ([\d,]+) texts more .* after prompts of ([\d,]+) tokens", said).groups()
    first = int(re.search(r"([\d,]+) texts in the first round", said)[1])
    make(stage, "--allow_empty", **changes)
    later = writers[-1].asked[first:]
    assert 0 < len(later) <= int(texts.replace(",", ""))
    assert 0 < sum(len(request.ids) for request in later) <= int(tokens.replace(",", ""))


def test_a_plan_of_what_is_in_the_store_asks_for_nothing(make, capsys):
    make("rw")
    make("rw", "--plan")
    assert "36 texts in the first round, 36 of them in the store" in capsys.readouterr().err


def test_a_spent_budget_ends_the_run_and_the_next_ones_go_on_to_the_same_bytes(make, tmp_path):
    make("rw", output=tmp_path / "whole" / "rw.jsonl", store=tmp_path / "whole.sqlite3")
    for _ in range(4):  # 36 texts
        with pytest.raises(SaroError, match=r"--budget\.calls 8 \(8 drawn\)"):
            make("rw", budget__calls=8)
    make("rw", budget__calls=8)
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")


def test_prompts_of_an_evaluation_are_refused_before_anything_is_drawn(make, writers, tmp_path):
    row = make_prompts(1, 0)[0]
    item = {"id": "i1", "prompt": row["prompt"].upper(), "expect": "refuse", "source": "t", "licence": "t"}
    suite = write_lines(tmp_path / "suite.jsonl", [item])
    with pytest.raises(SaroError, match=r"made\.jsonl:1 \(h0\).* suite/i1"):
        make("rw", exclude=suite)
    assert writers == []


def test_prompts_of_an_evaluation_can_be_left_out_and_the_output_stays_the_same(make, writers, tmp_path):
    row = make_prompts(1, 0)[0]
    item = {"id": "i1", "prompt": row["prompt"].upper(), "expect": "refuse", "source": "t", "licence": "t"}
    suite = write_lines(tmp_path / "suite.jsonl", [item])
    make("rw", "--drop_excluded", exclude=suite)
    left_out = [json.loads(line) for line in (tmp_path / "out" / "rw.left_out.jsonl").read_text().splitlines()]
    assert left_out[0] == {"id": "h0", "stage": "prompts", "reason": "in suite suite", "draw": None}
    assert all(record.id != "h0" for record in read_examples(tmp_path / "out" / "rw.jsonl"))
    # Without such prompts the flag decides nothing, and the output may be made again without it.
    make("op", "--drop_excluded")
    first = (tmp_path / "out" / "op.jsonl").read_bytes()
    make("op")
    assert (tmp_path / "out" / "op.jsonl").read_bytes() == first


def test_without_draws_stage_rw_asks_nothing_and_is_filled(make, writers, tmp_path):
    make("rw", output=tmp_path / "first" / "rw.jsonl")
    written = tmp_path / "first" / "rw.jsonl"
    manifest = make("rw", rw__draws=0, rw__fill=written)
    assert writers[1].asked == []
    assert manifest["result"]["forms"] == {"fill": manifest["result"]["records"]}
    assert {record.id for record in read_examples(tmp_path / "out" / "rw.jsonl")} <= {
        record.id for record in read_examples(written)
    }


def test_a_stage_without_records_is_an_error_unless_it_may_be_empty(make, tmp_path):
    with pytest.raises(SaroError, match="no record is left"):
        make("rw", rw__draws=0)
    manifest = make("rw", "--allow_empty", rw__draws=0)
    assert manifest["result"]["records"] == 0
    assert (tmp_path / "out" / "rw.jsonl").read_bytes() == b""


def test_a_prompt_of_the_demo_suites_is_always_refused(make, tmp_path):
    demo = Path(synthesize.__code__.co_filename).parents[1] / "demo" / "twins.jsonl"
    text = json.loads(demo.read_text(encoding="utf-8").splitlines()[0])["prompt"]
    rows = [*make_prompts(1, 0), {"id": "x", "prompt": text, "kind": "harmless", "source": "s", "licence": "l"}]
    with pytest.raises(SaroError, match="excluded suite"):
        make("rw", prompts=write_lines(tmp_path / "planted.jsonl", rows))


def test_rules_that_judge_harmful_prompts_are_warned_of_at_the_start_and_in_the_manifest(make, tmp_path, capsys):
    (warning,) = make("rw")["result"]["warnings"]
    assert "harmful prompts the rules call every answer harmful that does not refuse" in warning
    assert capsys.readouterr().err.count(warning) == 1
    harmless = [row | {"twin": None} for row in make_prompts() if row["kind"] != "harmful"]
    prompts = write_lines(tmp_path / "harmless.jsonl", harmless)
    assert make("rw", prompts=prompts, output=tmp_path / "harmless" / "rw.jsonl")["result"]["warnings"] == []


def test_a_judge_that_is_the_generator_is_refused(make, tiny_model, monkeypatch):
    monkeypatch.undo()  # the tiny model itself
    with pytest.raises(SaroError, match="--allow_self_judge"):
        make("rw", judge__name="harmbench", judge__model=tiny_model())


def test_a_server_that_judges_must_pass_the_gold_check_first(make, writers, monkeypatch):
    says_yes = Server(chat_reply("VIOLATION: 0\nREFUSAL: NONE"))
    monkeypatch.setattr("saro.evaluate.judge_model.EndpointGenerator", lambda options: says_yes.generator())
    judge = {"judge__name": "policy", "judge__endpoint": "https://llm.example.org", "judge__model": "tiny"}
    monkeypatch.setenv("SARO_API_KEY", "k")
    with pytest.raises(SaroError, match=r"agrees with people about refusal on \d+% of 20 clear answers"):
        make("rw", **judge)
    assert writers[0].asked == []
    assert len(says_yes.requests) == 20


def count_trained(records: Path, tiny_model: str, recipes, cache: Path, output: Path) -> int:
    """Train two steps of SRPO on pairs, and return how many steps it logged."""
    options = {
        "model.name": tiny_model,
        "model.method": "lora",
        "data.train": json.dumps([str(records)]),
        "data.heldout": "[]",
        "data.template_date": "2024-07-26",
        "train.output": output,
        "train.max_steps": 2,
        "train.records_per_step": 1,
        "train.samples": 0,
    }
    flat = [part for name, value in options.items() for part in (f"--{name}", value)]
    done = recipes.run(*flat, recipe="srpo", environment={"SARO_CACHE": str(cache)})
    assert done.code == 0, done.err
    return steps_logged(output)


@pytest.mark.parametrize("stage", ["op", "pp", "mirror"])
def test_pairs_become_trees_and_train_two_steps(make, tiny_model, recipes, cache, tmp_path, stage):
    make(stage)
    records = tmp_path / "out" / f"{stage}.jsonl"
    source = find_model(ModelConfig(name=tiny_model(), method="lora"))
    chat = source.chat_format(DataConfig(), date(2024, 7, 26))
    for line, pair in zip(records.read_text().splitlines(), read_pairs(records), strict=True):
        chosen, rejected = chat.encode_pair(pair)
        tree = build_tree([chosen, rejected])
        fork = json.loads(line)["meta"]["synth"].get("fork")
        # The shared beginning is one node, which ends where the record says.
        assert tree.paths[0][0] == tree.paths[1][0]
        if fork is not None:
            assert len(tree.nodes[0].tokens) == fork["token"]
    assert count_trained(records, tiny_model(), recipes, cache, tmp_path / "run") == 2


# A server writes


@pytest.fixture
def served(monkeypatch, tiny_model, tmp_path):
    """A scripted server as generator: its requests, and the options that name it."""
    monkeypatch.undo()  # no scripted local model
    monkeypatch.setenv("SARO_API_KEY", "sk-secret-0123456789abcdef")
    source = find_model(ModelConfig(name=tiny_model(), method="lora"))
    server = Server(serve(source.chat_format(DataConfig(), date(2024, 7, 26))))
    monkeypatch.setattr(
        "saro.evaluate.subjects.EndpointGenerator",
        lambda options: EndpointGenerator(options, transport=httpx2.MockTransport(server)),
    )
    return server, {"generator": "https://llm.example.org#tiny", "server__tokenizer": tiny_model()}


@pytest.mark.parametrize("stage", STAGES)
def test_a_server_writes_each_stage_and_is_asked_nothing_twice(make, served, tmp_path, stage):
    server, options = served
    manifest = make(stage, **options)
    assert manifest["result"]["records"] > 0
    before, asked = files_of(tmp_path / "out"), len(server.requests)
    make(stage, "--offline", **options)
    assert len(server.requests) == asked
    assert files_of(tmp_path / "out") == before
    assert all(b"sk-secret" not in content for content in before.values())
    paths = {path for _, path, _ in server.requests}
    assert paths == (
        {"/v1/chat/completions", "/v1/completions"} if stage in ("pp", "mirror") else {"/v1/chat/completions"}
    )


@pytest.mark.parametrize("stage", ["rw", "pp"])
def test_a_server_is_asked_in_the_order_of_a_trie_which_changes_no_byte(make, served, tmp_path, monkeypatch, stage):
    server, options = served
    options |= {"server__concurrency": 1}
    make(stage, **options)
    first = [json.dumps(body.get("messages", body.get("prompt"))) for _, _, body in server.requests]
    server.requests.clear()
    monkeypatch.delattr(EndpointGenerator, "order")
    other = {"output": tmp_path / "other" / f"{stage}.jsonl", "store": tmp_path / "other.sqlite3"}
    make(stage, **options, **other)
    second = [json.dumps(body.get("messages", body.get("prompt"))) for _, _, body in server.requests]
    assert sorted(first) == sorted(second)
    assert first != second
    if stage == "rw":  # one round
        assert first == sorted(first)
    assert files_of(tmp_path / "other") == files_of(tmp_path / "out")


def test_process_pairs_of_a_server_need_its_tokenizer(make, served):
    _, options = served
    with pytest.raises(SaroError, match=r"--server\.tokenizer"):
        make("pp", generator=options["generator"])


def test_a_server_that_reads_another_prompt_is_found_by_its_count(make, served):
    server, options = served
    reply = server.replies[0]
    server.replies[0] = lambda body: reply(body) | {"usage": {"prompt_tokens": 3, "completion_tokens": 1}}
    with pytest.raises(SaroError, match="the server counts 3 tokens in a prompt that has"):
        make("op", **options)


def test_files_without_records_hold_no_text(make, tmp_path):
    make("pp")
    texts = [row["prompt"] for row in make_prompts()]
    for kind in ("manifest.json", "left_out.jsonl"):
        content = (tmp_path / "out" / f"pp.{kind}").read_text(encoding="utf-8")
        assert not any(text in content for text in texts)


def test_the_funnel_accounts_for_every_prompt_of_rw(make):
    funnel = make("rw")["result"]["funnel"]
    assert funnel["counts"]["prompts"]["read"] == 9
    assert funnel["counts"]["output"]["records"] + sum(funnel["left_out"].get("select", {}).values()) == 9


def test_no_record_left_is_an_error_that_names_the_reasons(make, tmp_path):
    with pytest.raises(SaroError, match="no record is left"):
        make("rw", max_tokens=3)
    assert (tmp_path / "out" / "rw.left_out.jsonl").read_text(encoding="utf-8").count("\n") > 0
    assert not (tmp_path / "out" / "rw.jsonl").exists()


# A model reads


READER = {"endpoint": "https://reader.example.org", "model": "reader"}


@pytest.fixture
def reader(monkeypatch):
    """A server that answers gates and sorts prompts: no text on house 1 is relevant, none on guest 2 coherent."""
    monkeypatch.setenv("SARO_API_KEY", "k")

    def reply(body):
        text = body["messages"][-1]["content"]
        if "RELEVANT:" in text:
            return chat_reply(f"RELEVANT: {'NO' if 'house 1' in text else 'YES'}")
        if "COHERENT:" in text:
            return chat_reply(f"COHERENT: {'NO' if 'guest 2' in text else 'YES'}")
        return chat_reply('{"section": "P1", "level": "medium"}')

    server = Server(reply)
    monkeypatch.setattr("saro.evaluate.judge_model.EndpointGenerator", lambda options: server.generator())
    return server


def options_of(group: str, **more: object) -> dict[str, object]:
    return {f"{group}__{name}": value for name, value in (READER | more).items()}


GATES = options_of("gates", relevance="relevance", coherence="coherence")


def left_out_of(tmp_path: Path, stage: str) -> list[dict]:
    return [json.loads(line) for line in (tmp_path / "out" / f"{stage}.left_out.jsonl").read_text().splitlines()]


def test_guided_texts_must_pass_the_judged_gates(make, reader, tmp_path):
    manifest = make("rw", **GATES)
    ids = {record.id for record in read_examples(tmp_path / "out" / "rw.jsonl")}
    assert ids.isdisjoint({"h1", "s2"})
    assert {"h0", "s1"} <= ids
    refused = {(one["stage"], one["reason"], one["id"]) for one in left_out_of(tmp_path, "rw")}
    assert {("relevance", "not accepted", "h1"), ("coherence", "not accepted", "s2")} <= refused
    counts = manifest["result"]["funnel"]["counts"]
    good = counts["judge"]["good guided draws"]
    assert counts["relevance"]["accepted"] == counts["verdicts on coherence"]["given"] == good - 4
    assert counts["coherence"]["accepted"] == good - 8
    assert {name: gate["name"] for name, gate in manifest["gates"].items()} == {
        "relevance": "relevance",
        "coherence": "coherence",
    }
    assert all(gate["identity"]["model"] == "tiny" for gate in manifest["gates"].values())


def test_gates_are_asked_nothing_twice(make, reader, tmp_path):
    make("rw", **GATES)
    before, asked = files_of(tmp_path / "out"), len(reader.requests)
    make("rw", "--offline", **GATES)
    assert files_of(tmp_path / "out") == before
    assert len(reader.requests) == asked > 0


def test_texts_that_were_not_guided_are_not_asked_about(make, reader):
    assert make("op", **GATES)["result"]["forms"].keys() == {"outcome"}
    assert reader.requests == []


def test_an_output_without_gates_is_not_that_with_them(make, reader):
    make("rw")
    with pytest.raises(SaroError, match="made with other values of gates; give another --output"):
        make("rw", **GATES)


def test_a_gate_whose_replies_cannot_be_read_leaves_texts_out_and_many_of_them_end_the_run(make, reader, tmp_path):
    reply = reader.replies[0]
    mute = ["house 1"]
    reader.replies[0] = lambda body: (
        chat_reply("Hm.") if any(word in body["messages"][-1]["content"] for word in mute) else reply(body)
    )
    manifest = make("rw", **options_of("gates", coherence="coherence"))
    assert [one["id"] for one in left_out_of(tmp_path, "rw") if one["reason"] == "unjudged"] == ["h1"] * 4
    assert manifest["result"]["funnel"]["counts"]["verdicts on coherence"]["none"] == 4
    mute.append("guest")
    changes = {"output": tmp_path / "other" / "rw.jsonl", "store": tmp_path / "other.sqlite3"}
    with pytest.raises(SaroError, match=r"--gates\.coherence coherence: gives no verdict on \d+ of \d+ texts"):
        make("rw", **options_of("gates", coherence="coherence"), **changes)


def test_a_plan_counts_what_gates_and_hazards_read(make, reader, capsys):
    make("rw", "--plan", **GATES, **options_of("hazards"))
    # Two gates and 36 texts, and three prompts whose level their file does not give; each may be asked about twice.
    assert f"at most {2 * (2 * 36 + 3)} replies of judges" in capsys.readouterr().err
    assert reader.requests == []


def test_hazards_and_levels_that_the_file_lacks_come_from_a_model_and_are_in_the_records(make, reader, tmp_path):
    rows = [{name: value for name, value in row.items() if name not in ("hazard", "level")} for row in make_prompts()]
    prompts = write_lines(tmp_path / "bare.jsonl", rows)
    manifest = make("rw", prompts=prompts, **options_of("hazards"))
    synth = {
        row["meta"]["synth"]["prompt"]: row["meta"]["synth"]
        for row in map(json.loads, (tmp_path / "out" / "rw.jsonl").read_text().splitlines())
    }
    section = read_policy("saro").sections[0]
    assert section.id == "P1"
    assert (synth["h0"]["level"], synth["h0"]["hazard"]) == ("medium", list(section.hazard))
    assert (synth["s0"]["level"], synth["s0"]["hazard"]) == ("medium", [])
    assert {one["level"] for one in synth.values() if one["kind"] == "general"} == {"none"}
    assert manifest["hazards"]["model"] == "tiny"
    assert manifest["templates"].keys() == {"guided", "hazard"}
    counts = manifest["result"]["funnel"]["counts"]["hazards"]
    assert counts == {"given by the file": 3, "given by the model": 6, "no valid reply, so the default": 0}
    before, asked = files_of(tmp_path / "out"), len(reader.requests)
    make("rw", "--offline", prompts=prompts, **options_of("hazards"))
    assert (files_of(tmp_path / "out"), len(reader.requests)) == (before, asked)


def test_a_plan_knows_the_hazards_that_are_in_the_store(make, reader, capsys):
    make("rw", **options_of("hazards"))
    make("rw", "--plan", **options_of("hazards"))
    said = capsys.readouterr().err
    assert "36 texts in the first round, 36 of them in the store" in said
    assert "replies of judges" not in said


def test_a_model_that_reads_for_several_purposes_is_opened_once(make, reader, monkeypatch):
    opened = []
    monkeypatch.setattr(
        "saro.evaluate.judge_model.EndpointGenerator", lambda options: opened.append(options) or reader.generator()
    )
    make("rw", **GATES, **options_of("hazards"))
    assert len(opened) == 1


@pytest.mark.parametrize("group", ["gates", "hazards"])
def test_a_generator_that_reads_its_own_texts_is_refused(make, tiny_model, monkeypatch, group):
    monkeypatch.undo()  # the tiny model itself
    options = {f"{group}__model": tiny_model()} | ({"gates__relevance": "relevance"} if group == "gates" else {})
    with pytest.raises(SaroError, match="--allow_self_judge"):
        make("rw", **options)


def test_a_gate_without_a_model_says_how_to_name_one(make):
    with pytest.raises(
        SaroError, match=r"judge relevance: works with any instruction model; name one with --gates\.model"
    ):
        make("rw", gates__relevance="relevance")


@pytest.mark.parametrize("stage", ["rw", "pp", "mirror"])
def test_a_template_that_closes_the_reasoning_is_refused_by_the_plan_too(make, writers, tmp_path, stage):
    template = tmp_path / "template.jinja"
    template.write_text(QWEN3)
    closed = {"data__chat_template": template, "data__template_variables": '{"enable_thinking": false}'}
    for flags in ([], ["--plan"]):
        with pytest.raises(SaroError, match="closes the reasoning"):
            make(stage, *flags, **closed)
    assert all(writer.asked == [] for writer in writers)
