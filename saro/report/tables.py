"""Makes every table that people read, from plain data such as the JSON files of runs hold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from saro.config import KINDS, PAIR_KINDS

# Columns of the table of stage 1: metric -> (heading, format).
_TOKEN_METRICS = {
    "loss": ("loss, nats", ".3f"),
    "entropy": ("entropy, nats", ".3f"),
    "mean_token_accuracy": ("top-1", ".1%"),
}
# Rows of the table of stage 2: metric -> label.
_PAIR_METRICS = {
    "loss": "loss",
    "rewards/accuracies": "accuracy: share of pairs with a margin above 0",
    "rewards/margins": "reward margin",
    "logps/chosen": "log-prob of the chosen response, nats",
    "logps/rejected": "log-prob of the rejected response, nats",
    "entropy/chosen": "entropy in the chosen response, nats per token",
    "mean_token_accuracy/chosen": "top-1 accuracy in the chosen response",
    "chosen_fell": "share of pairs whose chosen log-prob fell",
}
# Rows of that table for each form of pairs, which data construction writes: metric -> label.
_FORM_METRICS = {
    "rewards/accuracies": "accuracy",
    "rewards/margins": "reward margin",
}
# If the mean reward margin is nearer to zero than this, the model is still its own reference: the signs of the pairs'
# margins are rounding, so the accuracy means nothing.
_AT_REFERENCE = 1e-3


def print_lengths(console: Console, title: str, report: Mapping[str, Any]) -> None:
    """Print the lengths of a set of records.

    Args:
        report: the result of ``LengthReport.as_dict``, which a run's manifest.json also has under ``records``.
    """
    kinds = ", ".join(f"{n:,} {name}" for name, n in report["records"].items())
    noun = "pairs" if report["sharing"] else "records"
    line = f"{title}: {sum(report['records'].values()):,} {noun} ({kinds})"
    if report["dropped"]:
        line += f"; {len(report['dropped']):,} dropped as too long"
    if report.get("equal"):
        line += f"; {len(report['equal']):,} left out, whose two sides are the same"
    if report["duplicates"]:
        line += f"; {report['duplicates']:,} exact duplicates of another one"
    if report["open_sides"]:
        line += f"; {report['open_sides']:,} open sides"
    if report["trained_prompts"]:
        line += f"; {report['trained_prompts']:,} with the prompt of a training record"
    console.print(line, markup=False, highlight=False, soft_wrap=True)
    if report["ignored"]:
        line = f"{title}: ignored fields: {', '.join(report['ignored'])}"
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    if report.get("raw"):
        line = (
            f"{title}: {report['raw']:,} {noun} are raw text and get no chat template; for a chat model give messages, or "
            "prompt/answer fields"
        )
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    is_rw = report["records"].keys() <= set(KINDS)
    if is_rw and not report["lengths"]["reasoning"]["most"]:
        line = f"{title}: no record has reasoning; RW is meant for chains"
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    table = Table()
    table.add_column("tokens")
    for column in ("least", "median", "95 %", "most", "total"):
        table.add_column(column, justify="right")
    for label, lengths in report["lengths"].items():
        table.add_row(label, *(f"{n:,}" for n in lengths.values()))
    console.print(table)
    if report["sharing"]:
        console.print(describe_sharing(**report["sharing"]), markup=False, highlight=False, soft_wrap=True)


def describe_sharing(apart: int, by_pair: int, by_prompt: int) -> str:
    """Return a sentence about how many tokens trees save, from the counts of ``Sharing``."""
    text = f"Sharing saves {100 * (1 - by_pair / apart):.1f} % of {apart:,} tokens"
    if by_prompt < by_pair:
        saved = f"{100 * (1 - by_prompt / apart):.1f} %"
        text += f", and up to {saved} if pairs on one prompt come into one step"
    return text


def before_after_tables(
    before: Mapping[str, Any],
    after: Mapping[str, Any],
    prompts: Sequence[tuple[str, str | None]],
    files: Sequence[str],
) -> list[Table]:
    """Return the tables at the end of a run: answers, if there are prompts, and held-out metrics, if there are any.

    Args:
        before, after: contents of a run's before.json and after.json: ``answers`` and ``metrics``.
        prompts: (id, text) of each prompt that was answered; the text is None if it is not to be shown.
        files: the held-out files, as the user named them.
    """
    tables = []
    if prompts:
        tables.append(answer_table(before["answers"], after["answers"], prompts, files))
    if "eval/rewards/margins" in before["metrics"]:
        tables.append(pair_table(before["metrics"], after["metrics"], files))
    elif before["metrics"]:
        tables.append(token_table(before["metrics"], after["metrics"], files))
    return tables


def token_table(before: Mapping[str, float], after: Mapping[str, float], files: Sequence[str]) -> Table:
    """Return the table of means over held-out tokens before and after training, by kind of record and of token."""
    table = Table(title=f"Held-out tokens{_of(files)}, before → after", title_justify="left")
    table.add_column("tokens")
    for heading, _ in _TOKEN_METRICS.values():
        table.add_column(heading, justify="right")
    for name in before:
        if not name.startswith("eval/loss"):
            continue
        suffix = name.removeprefix("eval/loss")  # such as "/safety"; empty for all tokens
        cells = []
        for metric, (_, form) in _TOKEN_METRICS.items():
            key = f"eval/{metric}{suffix}"
            cells.append(f"{before[key]:{form}} → {after[key]:{form}}")
        table.add_row(suffix.removeprefix("/") or "all", *cells)
    return table


def pair_table(before: Mapping[str, float], after: Mapping[str, float], files: Sequence[str]) -> Table:
    """Return the table of held-out preference metrics before and after training, with rows for each form of pairs."""
    table = Table(title=f"Held-out pairs{_of(files)}", title_justify="left")
    table.add_column("metric")
    table.add_column("before", justify="right")
    table.add_column("after", justify="right")
    parts = [("", _PAIR_METRICS), *((f"{form}/", _FORM_METRICS) for form in _find_forms(before))]
    for part, metrics in parts:
        at_reference = abs(before[f"eval/{part}rewards/margins"]) < _AT_REFERENCE
        for metric, label in metrics.items():
            key = f"eval/{part}{metric}"
            if key in before:
                meaningless = metric == "rewards/accuracies" and at_reference
                label = f"{part.removesuffix('/')}: {label}" if part else label
                table.add_row(label, "-" if meaningless else f"{before[key]:.3f}", f"{after[key]:.3f}")
    return table


def _find_forms(metrics: Mapping[str, float]) -> list[str]:
    """Return the forms of pairs that there are metrics of, sorted: names such as eval/FORM/rewards/margins."""
    split = [name.split("/") for name in metrics]
    return sorted(part[1] for part in split if part[2:] == ["rewards", "margins"] and part[1] not in PAIR_KINDS)


def answer_table(
    before: Sequence[str], after: Sequence[str], prompts: Sequence[tuple[str, str | None]], files: Sequence[str]
) -> Table:
    """Return the table of answers before and after training. A prompt is shown by its id, and its text unless None."""
    table = Table(title=f"Answers to held-out prompts{_of(files)}", title_justify="left", show_lines=True)
    for column, ratio in (("prompt", 1), ("before", 2), ("after", 2)):
        table.add_column(column, ratio=ratio)
    # A resumed run may ask for another number of samples than its first part; those that both have are the same.
    for prompt, old, new in zip(prompts, before, after, strict=False):
        table.add_row(_label(*prompt), escape(old.strip()), escape(new.strip()))
    return table


# Rows of the table of `saro compare`: figure -> (label, format).
_COMPARE_ROWS = {
    "loss": ("loss, nats per token", ".3f"),
    "likelier": ("pairs whose chosen response is likelier", ".0%"),
    "margin": ("margin: log p(chosen) - log p(rejected), nats", ".1f"),
    "reasoning_tokens": ("reasoning tokens, mean of {} answers", ".0f"),
}


def compare_table(
    names: Sequence[str],
    figures: Sequence[Mapping[str, Any]],
    prompts: Sequence[tuple[str, str | None]],
    num_prompts: int,
    files: Sequence[str],
) -> Table:
    """Return the table of several models: a row for each figure that all of them have, then answers.

    Args:
        figures: for each model ``loss``, ``likelier``, ``margin``, ``reasoning_tokens`` and ``answers``.
        prompts: (id, text) of the first prompts, whose answers are shown.
        num_prompts: number of all prompts that were answered.
        files: the held-out files, as the user named them.
    """
    table = Table(title=f"Held-out records{_of(files)}", title_justify="left", show_lines=True)
    table.add_column("", ratio=2)
    for name in names:
        table.add_column(escape(name), ratio=3)
    for figure, (label, form) in _COMPARE_ROWS.items():
        values = [model[figure] for model in figures]
        if None not in values:
            table.add_row(label.format(num_prompts), *(f"{value:{form}}" for value in values))
    for i, prompt in enumerate(prompts):
        table.add_row(_label(*prompt), *(escape(model["answers"][i].strip()) for model in figures))
    return table


_RESULTS = {True: "[green]ok[/green]", False: "[bold red]FAILED[/bold red]", None: "skipped"}


def doctor_table(findings: Sequence[Mapping[str, Any]]) -> Table:
    """Return the table of `saro doctor`: a row for each finding, with ``name``, ``ok``, ``figure`` and ``limit``."""
    table = Table(title="saro doctor", title_justify="left")
    table.add_column("check", overflow="fold", ratio=3)
    table.add_column("result", overflow="fold")
    table.add_column("measured", overflow="fold", ratio=5)
    table.add_column("limit", overflow="fold", ratio=2)
    for finding in findings:
        result = _RESULTS[finding["ok"]]
        table.add_row(escape(finding["name"]), result, escape(finding["figure"]), escape(finding["limit"]))
    return table


def _of(files: Sequence[str]) -> str:
    """Return the end of a title that names the files which the figures come from."""
    return f" of {escape(', '.join(files))}"


def _label(name: str, text: str | None) -> str:
    """Return the cell of a prompt: its id, and below it the text if there is one."""
    return f"[bold]{escape(name)}[/bold]" + (f"\n{escape(text)}" if text is not None else "")
