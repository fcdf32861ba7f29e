"""Make the model card of an export: its sources and the figures of its run, but no text of records."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from saro.manifest import read_manifest
from saro.runs.finished import FinishedRun
from saro.train.best import find_best
from saro.train.checkpoint import list_checkpoints

# Held-out metrics of the card; after.json has all of them.
_METRICS = ("loss", "mean_token_accuracy", "entropy", "rewards/margins", "rewards/accuracies", "kl", "chosen_fell")


def make_card(run: FinishedRun, title: str, holds: str, off: str, loader: str) -> str:
    """Return the README.md of an export, with the metadata that the hub reads.

    Args:
        title: name of the model.
        holds: what was written, such as "adapter".
        off: how far the export is from the trained model, in words.
        loader: the Python call that loads it.
    """
    about: dict[str, Any] = {"library_name": "peft" if holds == "adapter" else "transformers"}
    if run.manifest["model"].get("commit"):
        about["base_model"] = run.manifest["model"]["name"]
    about |= {"pipeline_tag": "text-generation", "tags": ["saro"]}
    lines = [
        "---",
        yaml.safe_dump(about, sort_keys=False) + "---",
        "",
        f"# {title}",
        "",
        *_training_lines(run),
        f"- this is the {holds}, off by {off}",
        "",
        *_metric_lines(run.folder),
        "```python",
        loader,
        "```",
    ]
    return "\n".join(lines) + "\n"


def _training_lines(run: FinishedRun) -> Iterator[str]:
    """Yield list items: the model before training, the stage and its options, the records and the steps."""
    config, base = run.manifest["config"], run.manifest["model"]
    name = f"{base['name']}, commit {base['commit']}" if base.get("commit") else _folder_name(base["name"])
    yield f"- trained from {name}, with saro {run.manifest['saro']}"
    start = run.manifest.get("start", base["name"])
    earlier = read_manifest(Path(start).parent)
    stage = "" if earlier is None else f", which a run had trained before: {_describe_stage(earlier['config'])}"
    if base.get("adapter"):
        yield f"- continues the adapter {_folder_name(start)}{stage}"
    elif earlier is not None:
        yield f"- continues the model {_folder_name(start)}{stage}"
    yield f"- {_describe_stage(config)}"
    counts = run.manifest["records"]["train"]["records"]
    yield "- records: " + ", ".join(f"{number:,} {kind}" for kind, number in counts.items())
    train = config["train"]
    lines = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    logged = [line for line in lines if "grad_norm" in line]
    # A step is logged only every train.log_every steps.
    loss = f"; training loss of step {logged[-1]['step']} {logged[-1]['loss']:.4g}" if logged else ""
    made = [step for step, _ in list_checkpoints(run.folder / "checkpoints")] + [line["step"] for line in lines]
    yield (
        f"- method {config['model']['method']}; {max(made, default=0)} steps of at most {train['records_per_step']} "
        f"records; learning rate {train['lr']:g}, {train['schedule']}{loss}"
    )
    metric = train.get("keep_best")
    evaluations = [line for line in lines if metric in line]
    if evaluations:
        best = find_best(metric, evaluations)
        yield f"- the model is that of step {best['step']}, the best of the run: held-out {metric} {best[metric]:.4g}"


def _describe_stage(config: Mapping[str, Any]) -> str:
    if "preference" not in config:
        return "RW, supervised fine-tuning"
    return f"SRPO, preference optimization: loss {config['preference']['loss']}, beta {config['preference']['beta']}"


def _folder_name(path: str) -> str:
    """Return the name of a model's folder, with that of its run: the whole path means nothing on another machine."""
    folder = Path(path)
    return f"{folder.parent.name}/final" if folder.name == "final" else folder.name


def _metric_lines(folder: Path) -> Iterator[str]:
    """Yield a table of held-out metrics before and after training; nothing if no records were held out."""
    before, after = (
        json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))["metrics"] for name in ("before", "after")
    )
    rows = [name for name in _METRICS if f"eval/{name}" in before and f"eval/{name}" in after]
    if not rows:
        return
    yield from ("| held-out metric | before | after |", "| --- | ---: | ---: |")
    for name in rows:
        yield f"| {name} | {before[f'eval/{name}']:.4g} | {after[f'eval/{name}']:.4g} |"
    yield ""
