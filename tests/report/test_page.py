"""The page of the report: its numbers, its safety, what it leaves out, and its look at work in a browser."""

from __future__ import annotations

import base64
import hashlib
import json
import random
import re
from dataclasses import replace
from types import SimpleNamespace

import pytest
from chromium import CHROMIUM, browser
from evaluations import write_evaluation
from report_pages import read_page, unpack, write_training_run

from saro.evaluate.outcomes import COUNTED
from saro.report.evaluation_files import read_evaluation
from saro.report.number import MINUS, MISSING, TIMES, format_number
from saro.report.page import make_report
from saro.report.page_data import OUTCOMES, tradeoff_panels
from saro.report.training_files import read_training_run
from saro.tools.report_tool import add_opinions

pytest.importorskip("matplotlib")

HOSTILE = "</script><script>document.title='broken'</script><img src=x onerror=\"document.title='broken'\">{{ 7 * 7 }}"
ATTACKS = (
    {"id": "none", "kind": "none"},
    {"id": "neutral-start", "kind": "prefill", "control": True},
    {"id": "think-empty", "kind": "prefill", "think_off": True},
    *({"id": f"steps-{step}", "kind": "prefill", "step": step} for step in (1, 2)),
)


class Rates(SimpleNamespace):
    """Stands in for an evaluation of one model on one suite."""

    suites, models = ("suite",), ("model",)

    def expects(self, suite):
        return {"refuse", "comply"}

    def score(self, metric, model, suite):
        return {"value": getattr(self, metric)}


def test_a_seed_without_a_rate_is_left_out_of_the_scatter():
    seeds = [Rates(over_refusal=0.1, harmful_compliance=0.2), Rates(over_refusal=None, harmful_compliance=0.3)]
    ((point,),) = tradeoff_panels(Rates(over_refusal=0.1, harmful_compliance=0.25), seeds).values()
    assert point.seeds == [(0.1, 0.2)]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two evaluations of the same models that differ in their seed."""
    base = tmp_path_factory.mktemp("evaluations")
    for seed in (0, 1):
        write_evaluation(base / f"seed-{seed}", 3, 24, attacks=ATTACKS, seed=seed)
    return [base / "seed-0", base / "seed-1"]


@pytest.fixture(scope="module")
def evaluations(folders):
    return [add_opinions(read_evaluation(folder)) for folder in folders]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    base = tmp_path_factory.mktemp("runs")
    return [read_training_run(write_training_run(base / name, pairs=pairs)) for name, pairs in (("rw", 0), ("srpo", 4))]


@pytest.fixture(scope="module")
def report(evaluations, runs):
    return make_report(evaluations, runs, command="saro report seed-0 seed-1")


def with_text(evaluation, text: str):
    """Return an evaluation whose every text is this one."""
    items = {key: {**item, "prompt": [{"role": "user", "content": text}]} for key, item in evaluation.items.items()}
    answers = tuple({**answer, "think": text, "answer": text} for answer in evaluation.answers)
    verdicts = {key: {**verdict, "why": text, "raw": text} for key, verdict in evaluation.verdicts.items()}
    return replace(evaluation, items=items, answers=answers, verdicts=verdicts)


# Numbers


def stored_value(text, evaluations, runs):
    """Return the value that a number of the page stands for, from the files."""
    if (score_id := text.attribute("data-score")) is not None:
        scores = evaluations[int(text.attribute("data-folder") or 0)].scores
        (row,) = [row for row in scores["scores"] + scores["differences"] if row["id"] == score_id]
        return row[text.attribute("data-field") or "value"]
    if (path := text.attribute("data-path")) is not None:
        value = evaluations[0].scores
        for key in path.split("/"):
            value = value[key]
        return value
    (run,) = [run for run in runs if run.name == text.attribute("data-run")]
    metric = text.attribute("data-metric")
    if metric.startswith("lengths/"):
        _, part, name = metric.split("/")
        return run.manifest["records"]["train"]["lengths"][part][name]
    return run.lines[-1].get(metric)


def as_number(text: str) -> float:
    return float(re.sub("[^0-9.e-]", "", text.replace(MINUS, "-").replace("<", "")))


def test_every_tagged_number_is_in_the_files(report, evaluations, runs):
    texts, _ = read_page(report.html)
    tagged = [t for t in texts if t.has("data-score") or t.has("data-path") or t.has("data-run")]
    assert len(tagged) > 500
    for text in tagged:
        value = stored_value(text, evaluations, runs)
        if value is None:
            assert text.text == MISSING
            continue
        if text.text.startswith("<"):
            assert value < 0.0005
            continue
        shown = as_number(text.text)
        digits = len(re.sub("[^0-9.]", "", text.text).partition(".")[2])
        # A share is shown in percent or in points.
        assert any(abs(shown - value * scale) <= 0.5001 * 10**-digits + 1e-4 * abs(shown) for scale in (1, 100)), text


def test_no_number_stands_outside_of_a_tag(report, evaluations):
    """What is not a number of ours is a name, an id, a version or a sentence of scores.json, and says so."""
    texts, _ = read_page(report.html)
    tags = ("data-score", "data-path", "data-run", "data-count")
    for text in texts:
        if any(text.has(tag) for tag in tags) or text.within("script", "style", "svg", "title"):
            continue
        if text.of_class("verbatim", "name"):
            continue
        assert not re.search(r"\d", text.text.replace("95 %", "")), text


def test_sentences_and_threats_are_those_of_the_scores(report, evaluations):
    texts = {text.text for text in read_page(report.html)[0]}
    scores = evaluations[0].scores
    assert {*scores["verdict"], *(threat["text"] for threat in scores["threats"])} <= texts


def test_every_score_of_the_headline_is_on_the_page(report, evaluations):
    shown = {text.attribute("data-score") for text in read_page(report.html)[0]}
    wanted = {
        score["id"]
        for score in evaluations[0].scores["scores"]
        if score["metric"] in ("harmful_compliance", "over_refusal", "accuracy", "recovery", "d_prime")
        if score["group"] is None and (score["metric"] != "d_prime" or score["attack"] == "none")
    }
    assert wanted <= shown


def test_counts_of_the_page_are_counts_of_its_answers(report, evaluations):
    texts, _ = read_page(report.html)
    (number,) = [text for text in texts if text.attribute("data-count") == "disagreements"]
    assert int(number.text) == sum(answer["differ"] for answer in unpack(report.html)["answers"])
    confusion = [int(t.text) for t in texts if t.attribute("data-count") == "confusion"]
    assert sum(confusion) == sum(
        evaluations[0].outcome(key) in OUTCOMES[evaluations[0].items[key.split("/")[1], key.split("/")[3]]["expect"]]
        for key, _ in evaluations[0].opinions
    )


def test_the_outcomes_are_those_of_the_scores():
    assert OUTCOMES == COUNTED


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (0.123, "rate", "12.3\u202f%"),
        (-0.1234, "points", f"{MINUS}12.3"),
        (None, "rate", MISSING),
        (float("nan"), "plain", MISSING),
        (1234.5, "tokens", "1,234"),
        (1.375, "ratio", f"1.38{TIMES}"),
        (0.0001, "p", "<0.001"),
        (0.04, "p", "0.040"),
        (0.000123456, "metric", "0.0001235"),
    ],
)
def test_numbers_have_few_digits_and_true_signs(value, unit, text):
    assert format_number(value, unit) == text


def test_a_change_has_a_sign_unless_it_rounds_to_zero():
    assert format_number(0.02, "points", signed=True) == "+2.0"
    assert format_number(-0.0001, "points", signed=True) == "0.0"


# One click


def test_the_link_of_a_rate_selects_the_answers_that_it_counts(report, evaluations):
    """As many answers pass the filters of a link as the rate says."""
    data = unpack(report.html)
    links = [text for text in read_page(report.html)[0] if text.has("href") and text.has("data-score")]
    links = [
        t for t in links if t.attribute("data-score").startswith(("harmful_compliance/", "over_refusal/", "accuracy/"))
    ]
    assert len(links) > 30
    for text in links:
        if text.has("data-folder"):
            continue
        row = evaluations[0].scores_by_id[text.attribute("data-score")]
        filters = dict(pair.split("=") for pair in text.attribute("href").removeprefix("#answers?").split("&"))
        outcomes = filters["outcome"].replace("%2C", ",").split(",")
        chosen = [
            answer
            for answer in data["answers"]
            if (data["models"][answer["model"]], answer["attack"]) == (filters["model"], filters["attack"])
            if data["items"][answer["item"]]["suite"] == filters["suite"]
            if data["items"][answer["item"]]["expect"] == filters["expect"] and answer["outcome"] in outcomes
            if filters.get("category") in (None, data["items"][answer["item"]]["category"])
        ]
        expected = row["n"] if text.attribute("data-field") == "n" else row["n"] * row["value"]
        assert len(chosen) == pytest.approx(expected, abs=0.01), text


# Untrusted texts


def test_texts_of_answers_are_never_markup(evaluations):
    html = make_report([with_text(evaluations[0], HOSTILE)]).html
    assert "document.title='broken'" not in html
    assert unpack(html)["answers"][0]["answer"] == HOSTILE
    _, tags = read_page(html)
    assert not any("onerror" in attributes for _, attributes in tags)
    assert sum(tag == "script" for tag, _ in tags) == 2


def test_names_from_the_files_are_never_markup(folders, evaluations):
    """Names of models, suites and judges, and texts of threats, come from files that others may have written."""
    text = json.dumps(evaluations[0].scores)
    for name in ("srpo", "twins", "made-up-judge"):
        text = text.replace(name, f"<b>{name}</b>")
    scores = json.loads(text)
    scores["threats"].append({"id": "x", "text": HOSTILE})
    verdicts = {(key, f"<b>{judge}</b>"): row for (key, judge), row in evaluations[0].verdicts.items()}

    def marked(row):
        names = {"suite": "<b>twins</b>", "model": "<b>srpo</b>"}
        return {k: names[k] if v in ("twins", "srpo") and k in names else v for k, v in row.items()}

    items = [marked(item) for item in evaluations[0].items.values()]
    answers = tuple(
        {**marked(a), "key": a["key"].replace("srpo", "<b>srpo</b>").replace("twins", "<b>twins</b>")}
        for a in evaluations[0].answers
    )
    evaluation = replace(
        evaluations[0], scores=scores, verdicts=verdicts, answers=answers, labels={}, opinions={},
        items={(item["suite"], item["id"]): item for item in items},
    )  # fmt: skip
    report = make_report([evaluation])
    texts, tags = read_page(report.html)
    assert sum(tag == "b" for tag, _ in tags) == len(scores["threats"]), "only the mark of a threat is bold"
    shown = " ".join(text.text for text in texts)
    assert all(f"<b>{name}</b>" in shown for name in ("srpo", "twins", "made-up-judge"))
    assert HOSTILE in {text.text for text in texts}


def test_the_policy_allows_only_the_style_and_the_script_of_the_page(report):
    (policy,) = re.findall(r'http-equiv="Content-Security-Policy" content="([^"]*)"', report.html)
    policy = policy.replace("&#39;", "'")
    assert policy.startswith("default-src 'none'; ")
    assert "unsafe" not in policy
    for kind, tag in (("style", "<style>"), ("script", "<script>")):
        (content,) = re.findall(rf"{tag}(.*?)</{kind}>", report.html, re.DOTALL)
        assert f"{kind}-src 'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'" in policy


def test_nothing_is_loaded_and_no_style_stands_in_an_attribute(report):
    _, tags = read_page(report.html)
    for tag, attributes in tags:
        assert "style" not in attributes, tag
        assert not any(name.startswith("on") for name in attributes)
        for name in ("src", "href", "xlink:href"):
            assert attributes.get(name, "#").startswith(("#", "data:"))


def test_a_redacted_report_holds_no_text(evaluations, runs):
    secret = "Zanzibar"
    evaluation = with_text(evaluations[0], secret)
    evaluation = replace(evaluation, manifest={**evaluation.manifest, "models": {"judge": {"policy": secret}}})
    report = make_report([evaluation], runs, redact=True)
    assert secret not in report.html
    assert secret not in json.dumps(unpack(report.html))
    assert secret not in report.markdown
    assert not any(secret in figure.file for figure in report.figures)
    ids = {item["id"] for item in unpack(report.html)["items"]}
    assert ids == {item["id"] for item in evaluation.items.values()}
    assert secret in json.dumps(unpack(make_report([evaluation]).html)), "the test must be able to find it"


# The files


def test_the_same_files_give_the_same_bytes(folders, evaluations, runs, report):
    again = make_report(
        [add_opinions(read_evaluation(folder)) for folder in folders], runs, command="saro report seed-0 seed-1"
    )
    assert again == report


def test_three_models_with_700_long_answers_stay_below_5_megabytes(tmp_path):
    rng = random.Random(0)
    words = [f"{a}{b}{c}" for a in "bdfgklmnprst" for b in "aeiou" for c in ("n", "r", "st", "ck", "ly", "ment", "ing")]
    write_evaluation(tmp_path, 3, 350, attacks=ATTACKS[:1])
    evaluation = add_opinions(read_evaluation(tmp_path))
    # About 1,900 characters, in words that compress as badly as text does.
    answers = tuple(
        {**a, "think": " ".join(rng.choices(words, k=300)), "answer": " ".join(rng.choices(words, k=80))}
        for a in evaluation.answers
    )
    assert len(answers) == 3 * 700
    html = make_report([replace(evaluation, answers=answers)]).html
    assert len(html.encode()) < 5e6


def test_the_tables_are_there_to_paste(report, evaluations):
    rows = [line for line in report.markdown.splitlines() if line.startswith("| complies with harmful prompts")]
    assert len(rows) == 1
    score = evaluations[0].score("harmful_compliance", "base", "twins")
    assert f"{100 * score['value']:.1f}" in rows[0]
    widths = {line.count("|") - line.count("\\|") for line in report.markdown.split("\n\n")[4].splitlines()}
    assert len(widths) == 1, "every line of a table has as many cells"


def test_the_figures_are_files_that_stand_alone(report):
    names = {figure.name for figure in report.figures}
    assert {
        "tradeoff",
        "think_off",
        "token_overhead",
        "turning_point",
        "recovery_1",
        "heat_map_1",
        "training_2",
    } <= names
    for figure in report.figures:
        assert figure.file.startswith("<svg")
        assert "var(--" not in figure.file
        assert "#answers" not in figure.file
        assert figure.title in report.html.replace("&#39;", "'")
        assert len(figure.alt) > 20


def test_a_dollar_sign_in_a_name_is_no_formula(evaluations):
    text = json.dumps(evaluations[0].scores).replace("steps-1", "$steps_1$")
    answers = tuple({**a, "attack": a["attack"].replace("steps-1", "$steps_1$")} for a in evaluations[0].answers)
    scores = json.loads(text)
    scores["outcomes"] = evaluations[0].scores["outcomes"]
    report = make_report([replace(evaluations[0], scores=scores, answers=answers)])
    assert any("$steps_1$" in figure.file for figure in report.figures if figure.name.startswith("heat_map"))


def test_ids_of_the_page_are_unique(report):
    ids = [attributes["id"] for _, attributes in read_page(report.html)[1] if "id" in attributes]
    assert len(ids) == len(set(ids))


def test_every_figure_has_a_name_for_people_who_do_not_see_it(report):
    svgs = [
        attributes
        for tag, attributes in read_page(report.html)[1]
        if tag == "svg" and attributes.get("class") == "figure"
    ]
    assert len(svgs) > 5
    assert all(len(attributes["aria-label"]) > 20 for attributes in svgs)


def test_a_single_model_without_attacks_gets_a_report(tmp_path):
    write_evaluation(tmp_path, 1, 10, attacks=ATTACKS[:1], labelled=0)
    html = make_report([add_opinions(read_evaluation(tmp_path))]).html
    texts, _ = read_page(html)
    assert not any(text.text == "Attacks" for text in texts)
    assert any("not measured against gold labels" in text.text for text in texts)


# In a browser

needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")


@pytest.fixture(scope="module")
def page_file(tmp_path_factory, evaluations, runs):
    """A report with hostile texts and names."""
    folder = tmp_path_factory.mktemp("page")
    hostile = [with_text(evaluation, HOSTILE) for evaluation in evaluations]
    (folder / "report.html").write_text(make_report(hostile, runs).html, encoding="utf-8")
    return folder / "report.html"


@pytest.fixture(scope="module")
def chrome(tmp_path_factory):
    with browser(tmp_path_factory.mktemp("profile")) as page:
        yield page


@needs_chromium
@pytest.mark.parametrize(("width", "dark"), [(1280, False), (1280, True), (380, False)])
def test_the_page_runs_without_errors_requests_or_violations(chrome, page_file, width, dark):
    chrome.open(page_file, width=width, dark=dark)
    chrome.evaluate("for (const d of document.querySelectorAll('details')) d.open = true")
    for button in ("#theme", ".group header button", "#pager-top button:last-child"):
        chrome.evaluate(f"document.querySelector({button!r}).click()")
    assert chrome.problems() == []
    assert chrome.evaluate("document.title") != "broken"
    assert chrome.evaluate("document.documentElement.scrollWidth") <= width, "the page itself does not scroll sideways"


@needs_chromium
def test_markup_in_an_answer_is_shown_as_text(chrome, page_file):
    chrome.open(page_file, fragment="#answers?expect=comply")
    assert chrome.evaluate("document.querySelector('.answer').textContent") == HOSTILE
    assert chrome.evaluate("document.querySelectorAll('#list script, #list img').length") == 0


@needs_chromium
def test_a_number_opens_its_answers(chrome, page_file, evaluations):
    chrome.open(page_file)
    score = evaluations[0].score("harmful_compliance", "base", "twins")
    chrome.evaluate(f"document.querySelector('a[data-score=\"{score['id']}\"]').click()")
    chrome.wait_for(
        f"document.querySelector('#pager-top').textContent.includes('of {round(score['n'] * score['value'])} cases')"
    )
    assert chrome.evaluate("document.querySelector('select[name=outcome]').value") == "harmful"
    assert chrome.evaluate(
        "[...document.querySelectorAll('.column:not(.dim) .outcome')].every(e => e.textContent.includes('harm'))"
    )
    assert chrome.problems() == []


@needs_chromium
def test_answers_of_another_folder_can_be_opened(chrome, page_file, evaluations):
    chrome.open(page_file)
    chrome.evaluate("document.querySelector('a[data-folder=\"1\"]').click()")
    chrome.wait_for("document.querySelector('select[name=folder]').value === '1'")


@needs_chromium
def test_harmful_texts_are_hidden_until_asked_for(chrome, page_file):
    chrome.open(page_file, fragment="#answers?expect=refuse")
    hidden = "[...document.querySelector('.group').querySelectorAll('.secret')].map(e => [e.inert, getComputedStyle(e).filter])"
    assert all(inert and style.startswith("blur") for inert, style in chrome.evaluate(hidden))
    chrome.evaluate("document.querySelector('.group header button').click()")
    assert not any(inert or style != "none" for inert, style in chrome.evaluate(hidden))
    chrome.evaluate("location.hash = 'answers?expect=comply'")
    chrome.wait_for("document.querySelector('select[name=expect]').value === 'comply'")
    assert chrome.evaluate("document.querySelectorAll('.blurred').length") == 0


@needs_chromium
def test_the_theme_follows_the_button(chrome, page_file):
    chrome.open(page_file)
    background = "getComputedStyle(document.body).backgroundColor"
    light = chrome.evaluate(background)
    for _ in range(2):
        chrome.evaluate("document.querySelector('#theme').click()")
    assert chrome.evaluate("document.querySelector('#theme').textContent") == "Theme: dark"
    assert chrome.evaluate(background) != light


@needs_chromium
def test_the_check_of_the_browser_notices_what_it_looks_for(chrome, page_file, tmp_path):
    """A page that breaks its policy, throws and loads is refused by the tests above."""
    html = page_file.read_text().replace(
        "<main>", '<main><img src="https://example.org/x.png"><script>throw 1</script><p style="color: red">'
    )
    (tmp_path / "planted.html").write_text(html)
    chrome.open(tmp_path / "planted.html")
    found = " ".join(chrome.problems())
    assert found.count("ContentSecurityPolicyIssue") >= 3
