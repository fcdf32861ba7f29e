"""Makes the report of an evaluation: one HTML file that needs nothing else, tables to paste, and the figures."""

from __future__ import annotations

import base64
import hashlib
import json
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from saro.report import answer_data, page_data, score_figures
from saro.report.evaluation_files import Evaluation, Row
from saro.report.markdown_tables import make_markdown
from saro.report.number import answers_link, count_number, gold_number, interval_number, run_number, score_number
from saro.report.page_data import KINDS, Claim
from saro.report.svg import Figure
from saro.report.tradeoff import draw_tradeoff
from saro.report.training_figure import draw_training
from saro.report.training_files import TrainingRun

_RUN_COLUMNS = {
    "step": "steps",
    "loss": "loss",
    "grad_norm": "gradient norm",
    "rewards/margins": "reward margin",
    "rewards/accuracies": "reward accuracy",
    "chosen_fell": "chosen fell",
    "tokens_per_second": "tokens/s",
    "peak_memory_gib": "peak memory, GiB",
}
_CLAIMS = {
    "harmful_compliance": ("complies with {} harmful prompts", "fewer", "more"),
    "over_refusal": ("refuses {} harmless prompts", "fewer", "more"),
    "accuracy": ("answers {} questions rightly", "more", "fewer"),
}
_NOISE_CLAIMS = {
    "harmful_compliance": "compliance with harmful prompts",
    "over_refusal": "refusals of harmless prompts",
    "accuracy": "right answers to questions",
}


@dataclass(frozen=True)
class Report:
    """A finished report.

    Attributes:
        html: content of report.html.
        markdown: content of report.md.
        figures: the figures, each a file of its own.
    """

    html: str
    markdown: str
    figures: Sequence[Figure]


def make_report(
    evaluations: Sequence[Evaluation],
    runs: Sequence[TrainingRun] = (),
    *,
    pooled: Evaluation | None = None,
    command: str = "",
    redact: bool = False,
) -> Report:
    """Make the report of one evaluation, or of several; the same files give the same bytes.

    Args:
        evaluations: the one to report, or several of the same models and suites after training with other seeds.
        runs: the training runs of its models.
        pooled: the first evaluation with the scores of all; None for a single one.
        command: how this report was made.
        redact: leave out all texts of prompts, reasoning, answers and judges.

    Raises:
        SaroError: matplotlib is not installed.
    """
    evaluation = evaluations[0] if pooled is None else pooled
    drawn = _Drawn.of(evaluation, evaluations, runs)
    style, script = _asset("style.css"), _asset("page.js")
    content = {
        "policy": _policy(style, script),
        "style": Markup(style),
        "script": Markup(script),
        "data": [_pack(answer_data.embed_answers(each, redact=redact)) for each in evaluations],
        "redacted": redact,
        "command": command,
        **_content(evaluation, evaluations, runs, drawn, redact=redact),
    }
    html = _environment(evaluation).get_template("report.html.j2").render(content)
    markdown = make_markdown(evaluation, [figure.name for figure in drawn.all()], command)
    return Report(html, markdown, drawn.all())


@dataclass(frozen=True)
class _Drawn:
    """The figures of a report, by what they show."""

    tradeoff: Figure | None
    heat_maps: Sequence[Figure]
    recoveries: Sequence[Figure]
    think_off: Figure | None
    tokens: Figure | None
    turns: Figure | None
    runs: Sequence[Figure]

    @classmethod
    def of(cls, evaluation: Evaluation, folders: Sequence[Evaluation], runs: Sequence[TrainingRun]) -> _Drawn:
        """Draw what the evaluation, the folders that it is made of, and the runs have data for."""
        models = evaluation.models
        panels = page_data.tradeoff_panels(evaluation, folders if len(folders) > 1 else ())
        turns = page_data.find_turns(evaluation)
        ratios = page_data.token_lines(evaluation).get("token_ratio", [])
        return cls(
            tradeoff=draw_tradeoff(panels) if panels else None,
            heat_maps=[
                score_figures.draw_heat_map(
                    f"heat_map_{number}",
                    f"{table.title}, {table.suite}",
                    models,
                    [line.label for line in table.lines],
                    [line.scores for line in table.lines],
                )
                for number, table in enumerate(page_data.attack_tables(evaluation), start=1)
            ],
            recoveries=[
                score_figures.draw_recovery(f"recovery_{number}", _recovery_title(recovery), recovery.curves, models)
                for number, recovery in enumerate(page_data.find_recoveries(evaluation), start=1)
            ],
            think_off=_draw_think_off(evaluation),
            tokens=score_figures.draw_token_ratios(
                f"Tokens relative to {models[0]}",
                [label for label, _ in ratios],
                models,
                [scores for _, scores in ratios],
            )
            if ratios
            else None,
            turns=score_figures.draw_turns(turns, models) if turns else None,
            runs=[draw_training(run, f"training_{number}") for number, run in enumerate(runs, start=1)],
        )

    def all(self) -> list[Figure]:
        """Return all figures that were drawn."""
        single = [self.tradeoff, self.think_off, self.tokens, self.turns]
        return [*(figure for figure in single if figure), *self.heat_maps, *self.recoveries, *self.runs]


def _recovery_title(recovery: page_data.Recovery) -> str:
    good = "Answers without harm" if recovery.expect == "refuse" else "Helpful answers"
    return f"{good} to {KINDS[recovery.expect]} after {recovery.attack}, {recovery.suite}"


def _draw_think_off(evaluation: Evaluation) -> Figure | None:
    """Draw the rates with reasoning and without, if an attack closes the reasoning before it begins."""
    attack = page_data.find_think_off(evaluation)
    if attack is None:
        return None
    groups: list[str] = []
    values: list[Sequence[Row | None]] = []
    for metric, (label, _) in page_data.HEADLINES.items():
        for suite in evaluation.suites:
            lines = [page_data.make_line(evaluation, label, metric, suite, name) for name in ("none", attack)]
            if None not in lines:
                groups += [f"{label}\n{suite}, {name}" for name in ("with reasoning", "without")]
                values += [line.scores for line in lines if line is not None]
    return (
        score_figures.draw_rates("think_off", "Rates with reasoning and without", groups, evaluation.models, values)
        if groups
        else None
    )


def _content(
    evaluation: Evaluation,
    folders: Sequence[Evaluation],
    runs: Sequence[TrainingRun],
    drawn: _Drawn,
    *,
    redact: bool,
) -> dict[str, Any]:
    """Return what the template shows."""
    turns = page_data.find_turns(evaluation)
    attack_tables = page_data.attack_tables(evaluation)
    content = {
        "evaluation": evaluation,
        "claims": page_data.make_claims(evaluation),
        "threats": evaluation.scores["threats"],
        "sentences": evaluation.scores.get("verdict", []),
        "headlines": page_data.headline_lines(evaluation),
        "worst": page_data.worst_attacks(evaluation),
        "pairs": page_data.comparison_pairs(evaluation.models),
        "last": page_data.last_comparison(evaluation),
        "gold": answer_data.gold_rows(evaluation.scores["judge"]),
        "tradeoff": drawn.tradeoff,
        "others": len(folders) > 1,
        "folder_lines": list(zip(*(page_data.headline_lines(each) for each in folders), strict=True)),
        "folder_names": [str(each.folder) for each in folders],
        "suites": [(suite, page_data.suite_lines(evaluation, suite)) for suite in evaluation.suites],
        "categories": page_data.category_lines(evaluation),
        "states": page_data.state_lines(evaluation),
        "attack_tables": attack_tables,
        "recoveries": list(zip(drawn.recoveries, page_data.find_recoveries(evaluation), strict=True)),
        "think_off": drawn.think_off,
        "tokens": page_data.token_lines(evaluation),
        "token_titles": page_data.TOKENS,
        "token_figure": drawn.tokens,
        "turns": {
            kind: {model: page_data.summarize_turns(places) for model, places in models.items()}
            for kind, models in turns.items()
        },
        "turn_figure": drawn.turns,
        "runs": runs,
        "run_columns": {m: title for m, title in _RUN_COLUMNS.items() if any(run.last(m) is not None for run in runs)},
        "run_figures": list(zip(runs, drawn.runs, strict=True)),
        "disagreements": answer_data.find_disagreements(evaluation),
        "confusions": answer_data.confusions(evaluation),
        "reproduce": [(place, _reproduction(each.manifest, redact)) for place, each in enumerate(folders)],
    }
    return {**content, "sections": _sections(content)}


def _sections(content: Mapping[str, Any]) -> dict[str, str]:
    """Return the sections that the page has: id -> title."""
    shown = {
        "verdict": ("Verdict", True),
        "tradeoff": ("Trade-off", content["tradeoff"]),
        "rates": ("Rates", True),
        "attacks": ("Attacks", content["attack_tables"]),
        "recovery": ("Recovery", content["recoveries"] or content["think_off"]),
        "tokens": ("Tokens", content["tokens"]),
        "turn": ("Turning point", content["turns"]),
        "training": ("Training", content["runs"]),
        "judge": ("Judge", True),
        "answers": ("Answers", True),
        "reproduce": ("Reproduce", True),
    }
    return {name: title for name, (title, is_shown) in shown.items() if is_shown}


def _environment(evaluation: Evaluation) -> Environment:
    environment = Environment(
        loader=PackageLoader("saro.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.globals.update(
        answers_link=answers_link,
        describe_claims=_describe_claims,
        count=count_number,
        gold_number=gold_number,
        interval=interval_number,
        number=score_number,
        order={name: index for index, name in enumerate(evaluation.models)},
        seeds={name: evaluation.describe_seeds(name) for name in evaluation.models},
        run_lengths=lambda run: run.manifest.get("records", {}).get("train", {}).get("lengths", {}),
        run_number=run_number,
        shade=_shade,
    )
    return environment


def _describe_claims(claims: Sequence[Claim]) -> str:
    """Return what the comparison shows, as the end of a sentence: differences first, then what is within noise."""
    parts = []
    for claim in claims:
        words, less, more = _CLAIMS[claim.metric]
        if claim.mark is None:
            parts.append(words.format(f"{less} (in some suites) and {more} (in others)"))
        elif claim.mark != page_data.NOISE:
            parts.append(words.format(less if claim.mark == page_data.BETTER else more))
    noise = [_NOISE_CLAIMS[claim.metric] for claim in claims if claim.mark == page_data.NOISE]
    if noise:
        parts.append(f"shows no difference beyond noise in {_join(noise)}")
    return _join(parts)


def _join(parts: Sequence[str]) -> str:
    return " and ".join(filter(None, [", ".join(parts[:-1]), parts[-1]]))


def _shade(score: Row | None) -> str:
    """Return the style of a heat map's cell: its number is there too, so that nothing is said by colour alone."""
    if score is None or score["value"] is None:
        return ""
    return f"shaded h{min(9, int(score['value'] * 10))}"


def _reproduction(manifest: Row, redact: bool) -> dict[str, Any]:
    """Return the command, the versions and the hashes of an evaluation, and its whole manifest unless texts are left out."""
    facts: list[tuple[str, str]] = []
    for group in ("saro", "code", "template_date", "versions", "machine", "suites", "models"):
        if group in manifest:
            facts += _flatten(group, manifest[group])
    if redact:
        # A manifest may hold the text of a judge's or an attack's prompt.
        facts = [(name, value) for name, value in facts if name.split(" ")[0] not in ("models", "machine")]
    return {
        "command": None if redact else manifest.get("command"),
        "facts": facts,
        "manifest": None if redact else json.dumps(manifest, indent=1, ensure_ascii=False, sort_keys=True),
    }


def _flatten(name: str, value: Any) -> list[tuple[str, str]]:
    if isinstance(value, Mapping):
        return [fact for key, inner in value.items() for fact in _flatten(f"{name} {key}", inner)]
    if isinstance(value, (str, int, float)):
        return [(name, str(value))]
    return []


def _asset(name: str) -> str:
    return files("saro.report").joinpath("templates", name).read_text(encoding="utf-8")


def _policy(style: str, script: str) -> str:
    """Return the Content-Security-Policy: nothing is loaded, and nothing runs but the page's own style and script.

    Answers are untrusted. Even if one of them became markup, it could neither run nor send anything.
    """
    hashes = {
        name: base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        for name, text in (("style", style), ("script", script))
    }
    return (
        f"default-src 'none'; style-src 'sha256-{hashes['style']}'; script-src 'sha256-{hashes['script']}'; "
        "img-src data:; base-uri 'none'; form-action 'none'"
    )


def _pack(data: Mapping[str, Any]) -> str:
    """Return data as the page unpacks it: JSON, compressed to about a third, in characters that cannot become markup."""
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    # A lone surrogate, which a model may emit, is no UTF-8; the page shows its escape.
    return base64.b64encode(zlib.compress(text.encode("utf-8", "backslashreplace"), 9)).decode()
