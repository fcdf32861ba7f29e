"""Collect the results of method.sh: numbers, and no text of a prompt or an answer.

    python benchmarks/gpu/method_results.py --run WORK/output/saro --work WORK --out OUT

OUT gets summary.md, report.md, and results.tar.gz with the redacted report, scores, manifests, metrics and logs.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shutil
import sqlite3
import subprocess
import sys
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from gpu_tables import table

# Files of a run's folder that hold no text of a prompt or an answer: others are left where they are.
NUMBERS = (
    "settings",
    "pairs.check.txt",
    "data/*.manifest.json",
    "**/scores.json",
    "**/config.yaml",
    "**/manifest.json",
    "**/metrics.jsonl",
    "**/margins.jsonl",
)
# Lines of the log of a stage that failed, shown in the summary.
LAST_LINES = 5


@dataclass(frozen=True)
class Stage:
    """A stage that ended.

    Attributes:
        begin, end: seconds since 1970.
        code: its exit code.
        log: file of its messages.
        command: its arguments.
    """

    begin: float
    end: float
    code: int
    log: Path
    command: str

    @property
    def name(self) -> str:
        """The program, what it makes, and the last two parts of where its output is."""
        program, *words = self.command.removeprefix("-m saro ").split()
        named = [word for word in words[:2] if program in ("synth", "convert") and not word.startswith("--")]
        outputs = [after for word, after in pairwise(words) if word in ("--output", "--train.output")]
        return " ".join([program, *named[:1], *("/".join(Path(output).parts[-2:]) for output in outputs[-1:])])


def read_stages(file: Path) -> list[Stage]:
    """Return the stages that timed.sh noted, in the order in which they began."""
    if not file.exists():
        return []
    stages = []
    for line in file.read_text().splitlines():
        # A call that is killed may leave a line without a time, or half of one.
        with contextlib.suppress(ValueError):
            begin, end, code, log, command = line.split("\t", 4)
            stages.append(Stage(float(begin), float(end), int(code), Path(log), command))
    return sorted(stages, key=lambda stage: stage.begin)


def stages_part(stages: Sequence[Stage]) -> str:
    """Return when each stage began, how long it took, and why it failed."""
    if not stages:
        return "No stage has ended.\n"
    first = stages[0].begin
    rows = [[s.name, f"{s.begin - first:.0f}", f"{s.end - s.begin:.0f}", str(s.code)] for s in stages]
    lines = [table(["stage", "began, s", "took, s", "exit code"], rows)]
    for stage in stages:
        if stage.code and stage.log.exists():
            lines += [f"- {stage.name}: `{line[:300]}`" for line in stage.log.read_text().splitlines()[-LAST_LINES:]]
    return "\n".join(lines) + "\n"


def funnels_part(folder: Path) -> str:
    """Return how many records each stage of data construction made, and what became of the others."""
    lines = []
    for file in sorted(folder.glob("*.manifest.json")):
        result = json.loads(file.read_text())["result"]
        name = file.name.partition(".")[0]
        lines.append(
            f"- {name}: {result['records']} records and {result['heldout']['records']} held out, {result['forms']}"
        )
        lines.append(f"  - `{json.dumps(result['funnel'])[:2000]}`")
    return "\n".join(lines) + "\n"


def draws_part(store: Path) -> str:
    """Return how fast each model wrote. Processes that ran at the same time shared the GPU."""
    query = """
        SELECT identity, COUNT(*), SUM(json_extract(draw, '$.usage.completion')), SUM(json_extract(draw, '$.seconds'))
        FROM draws JOIN models ON models.number = draws.model
        WHERE draw IS NOT NULL AND failure IS NULL GROUP BY models.number ORDER BY models.number
    """
    if not store.exists():
        return "No text was drawn.\n"
    connection = sqlite3.connect(store)
    try:
        found = connection.execute(query).fetchall()
    finally:
        connection.close()
    rows = []
    for identity, texts, tokens, seconds in found:
        kind = "adapter" if json.loads(identity).get("adapter") else "whole model"
        rate = tokens / seconds if seconds else 0
        rows.append([kind, f"{texts:,}", f"{tokens:,}", f"{seconds:.0f}", f"{rate:,.0f}"])
    return table(["model", "texts", "tokens", "s", "tokens/s"], rows)


def gpu_part(file: Path) -> str:
    """Return the card's name, how busy it was, and the most memory that was in use."""
    lines = file.read_text().splitlines() if file.exists() else []
    # A machine that does not tell writes [N/A].
    samples = [found.groups() for line in lines if (found := re.fullmatch(r"(.+), (\d+) %, (\d+) MiB", line))]
    if not samples:
        return f"{lines[-1] if lines else 'No GPU was seen'}.\n"
    busy = sum(int(share) for _, share, _ in samples) / len(samples)
    memory = max(int(used) for _, _, used in samples) / 1024
    return f"{samples[-1][0]}: busy {busy:.0f} % of the last call, at most {memory:.1f} GiB in use.\n"


def make_report(run: Path, output: Path) -> None:
    """Write the report of the evaluations that there are, without texts."""
    folders = sorted(path.parent for path in run.glob("ablation/evaluation-*/scores.json"))
    folders = folders or [path.parent for path in run.glob("evaluation/scores.json")]
    if not folders:
        return
    runs = [path.parent for path in (run / "rw/final", run / "srpo/final") if path.is_dir()]
    python = os.environ.get("METHOD_PYTHON", sys.executable)
    command = [python, "-m", "saro", "report", *map(str, folders), "--output", str(output)]
    subprocess.run([*command, "--runs", json.dumps([*map(str, runs)]), "--redact", "--overwrite"], check=False)


def list_numbers(run: Path) -> Iterator[Path]:
    """Yield the files of ``NUMBERS``."""
    for pattern in NUMBERS:
        yield from sorted(path for path in run.glob(pattern) if "checkpoints" not in path.parts)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--run", type=Path, required=True, help="Folder of make saro and make ablation.")
    parser.add_argument("--work", type=Path, required=True, help="WORK of method.sh.")
    parser.add_argument("--out", type=Path, required=True, help="Folder for the results.")
    options = parser.parse_args()
    run, work, out = options.run, options.work, options.out
    out.mkdir(parents=True, exist_ok=True)
    parts = {
        "": gpu_part(work / "gpu.csv"),
        "Stages": stages_part(read_stages(work / "times.tsv")),
        "Records": funnels_part(run / "data"),
        "Texts drawn": draws_part(work / "cache/draws.sqlite3"),
    }
    summary = "\n".join(f"## {title}\n\n{text}" if title else text for title, text in parts.items())
    (out / "summary.md").write_text(summary)
    print(summary, flush=True)
    report = work / "report"
    make_report(run, report)
    with tarfile.open(out / "results.tar.gz", "w:gz") as archive:
        for file in list_numbers(run):
            archive.add(file, f"saro/{file.relative_to(run)}")
        for name in ("make.log", "times.tsv", "gpu.csv", "logs", "report"):
            if (work / name).exists():
                archive.add(work / name, name)
    if (report / "report.md").exists():
        shutil.copy(report / "report.md", out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
