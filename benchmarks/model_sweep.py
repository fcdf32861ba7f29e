"""Sweep over the causal LMs of transformers, and wrappers: each is trained exactly in packs, or refused by name.

    python benchmarks/model_sweep.py [--only llama,qwen3] [--output FILE]

For each model type a tiny random model is saved, found and loaded as a run does it. A pack of trees is compared with
the unmodified model on one sequence at a time: log-probs, gradients at the embeddings and gradients of the trained
parameters, under full fine-tuning and under LoRA with the fused layers, in train mode and in float64. The options of
a config that may change attention or logits are tried one by one. Exits with 1 if a model is accepted and wrong.
"""

from __future__ import annotations

import os
import sys
import tempfile
import warnings
from argparse import ArgumentParser
from collections import Counter, defaultdict, deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import date
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from time import monotonic

import torch
import transformers
from sweep_cases import CLASSES, Case, allowed_cases, option_cases
from sweep_judge import EXACT, METHODS, NOT_LOADABLE, REFUSED, TOLERANCE, WRONG, Verdict, judge

from saro.program import quiet_libraries

STATUSES = (EXACT, REFUSED, NOT_LOADABLE, WRONG)
Results = dict[Case, Verdict]


@dataclass
class _Worker:
    """A process that judges the cases of one model type.

    Attributes:
        cases: those that it has not finished; it works on the first.
        stage: what it is doing, from ``judge``.
        deadline: time by which the first case must be finished.
    """

    process: BaseProcess
    cases: deque[Case]
    stage: str
    deadline: float


def _judge_all(cases: Sequence[Case], connection: Connection) -> None:
    """Judge cases in a child process; send the name of each stage, and each verdict."""
    torch.set_num_threads(1)
    quiet_libraries()
    warnings.simplefilter("ignore")
    for case in cases:
        with tempfile.TemporaryDirectory() as folder:
            connection.send(judge(case, Path(folder), connection.send))


def sweep(groups: Iterable[Sequence[Case]], jobs: int, seconds: float) -> Iterator[tuple[Case, Verdict]]:
    """Judge groups of cases in processes of their own, and yield each case with its verdict.

    A case that kills its process, or takes longer than ``seconds``, gets a verdict too, and the others of its group go
    on in a new process.
    """
    # A fork has transformers imported already. This process never computes, so it has no threads that a fork would lose.
    context = get_context("fork")
    pending = deque(deque(group) for group in groups)
    workers: dict[Connection, _Worker] = {}
    while pending or workers:
        while pending and len(workers) < jobs:
            cases = pending.popleft()
            receiver, sender = context.Pipe(duplex=False)
            process = context.Process(target=_judge_all, args=(tuple(cases), sender), daemon=True)
            process.start()
            sender.close()
            workers[receiver] = _Worker(process, cases, "start", monotonic() + seconds)
        ready = wait(list(workers), timeout=1)
        for connection, worker in list(workers.items()):
            ended = ""
            if connection in ready:
                try:
                    message = connection.recv()
                except EOFError:
                    worker.process.join()
                    ended = f"the process ended with {worker.process.exitcode}"
                else:
                    if isinstance(message, Verdict):
                        yield worker.cases.popleft(), message
                        worker.deadline = monotonic() + seconds
                    else:
                        worker.stage = message
            elif monotonic() > worker.deadline:
                worker.process.kill()
                worker.process.join()
                ended = f"no result after {seconds:.0f} seconds"
            if ended:
                if worker.cases:
                    status = WRONG if worker.stage == "saro" else NOT_LOADABLE
                    yield worker.cases.popleft(), Verdict(status, f"{worker.stage}: {ended}")
                if worker.cases:
                    pending.appendleft(worker.cases)
                del workers[connection]
                connection.close()


def run_sweep(model_types: Sequence[str], jobs: int, seconds: float, with_options: bool) -> Results:
    """Judge all model types by their defaults, then their options one by one; print each result."""
    results: Results = {}

    def judge_and_print(groups: Iterable[Sequence[Case]]) -> None:
        for case, verdict in sweep(groups, jobs, seconds):
            results[case] = verdict
            print(f"{case.model_type:<24} {case.option:<36} {verdict.status} {_detail(verdict)}", flush=True)

    judge_and_print([Case(name)] for name in model_types)
    if not with_options:
        return results
    exact = {case.model_type for case, verdict in results.items() if verdict.status == EXACT}
    options = [list(option_cases(name) if name in exact else allowed_cases(name)) for name in model_types]
    judge_and_print(cases for cases in options if cases)
    return results


def _detail(verdict: Verdict) -> str:
    if verdict.status == EXACT:
        return f"{max(verdict.errors.values()):.0e}"
    return _plain_reason(verdict)


def _plain_reason(verdict: Verdict) -> str:
    """Return the reason without the name of the model type, or the differences."""
    reason = verdict.reason.partition("' is not supported: ")[2] or verdict.reason
    if verdict.status == WRONG and verdict.errors:
        reason = (
            ", ".join(f"{method} differs by {error:.1e}" for method, error in verdict.errors.items()) + " " + reason
        )
    return reason.replace("|", "/").strip()


# The table.


def write_tables(results: Results, seconds: float, jobs: int) -> Iterator[str]:
    """Yield the lines of the Markdown tables."""
    order = {name: i for i, name in enumerate(CLASSES)}
    cases = sorted(results, key=lambda case: order[case.model_type])
    defaults = {case: results[case] for case in cases if not case.option}
    options = {case: results[case] for case in cases if case.option}
    yield "# Sweep over the causal language models of transformers"
    yield ""
    yield (
        f"Written by `benchmarks/model_sweep.py` on {date.today():%Y-%m-%d}: transformers {transformers.__version__}, "
        f"torch {torch.__version__}, {seconds / 60:.0f} minutes with --jobs {jobs}."
    )
    yield ""
    yield f"- **Model types, by their defaults:** {_counts(defaults)}"
    yield f"- **Options of these, one by one:** {_counts(options)}"
    yield ""
    yield (
        "*Exact*: packed log-probs and gradients are those of the unmodified model on one sequence at a time, in "
        f"float64. The difference is relative to the greatest value, and at most {TOLERANCE:.0e}. *Refused*: one line "
        "says why, before training. *Not loadable*: transformers cannot make or run such a model here. "
        "*Without isolation* is the difference if the sequences of the pack see each other."
    )
    yield from _section(WRONG, defaults | options)
    yield from _exact_section(defaults)
    yield from _section(REFUSED, defaults)
    yield from _section(NOT_LOADABLE, defaults)
    yield from _options_section(options)


def _counts(results: Results) -> str:
    counts = Counter(verdict.status for verdict in results.values())
    return f"{len(results)}; " + ", ".join(f"{counts[status]} {status}" for status in STATUSES) + "."


def _exact_section(results: Results) -> Iterator[str]:
    yield from ("", "## Exact", "")
    yield "| model type | class | full | LoRA, fused | without isolation | |"
    yield "| --- | --- | ---: | ---: | ---: | --- |"
    for case, verdict in results.items():
        if verdict.status == EXACT:
            errors = [f"{verdict.errors[method]:.0e}" if method in verdict.errors else "" for method in METHODS]
            class_name = CLASSES[case.model_type]
            cells = (case.model_type, class_name, *errors, f"{verdict.leak:.2g}", verdict.reason)
            yield "| " + " | ".join(cells) + " |"


def _section(status: str, results: Results) -> Iterator[str]:
    """Yield the table of one status, with the model types and options of each reason; nothing if there are none."""
    by_reason: dict[str, list[str]] = defaultdict(list)
    for case, verdict in results.items():
        if verdict.status == status:
            by_reason[_plain_reason(verdict)].append(f"{case.model_type} {case.option}".strip())
    if by_reason:
        yield from ("", f"## {status[0].upper()}{status[1:]}", "", "| model types | reason |", "| --- | --- |")
        for reason, names in by_reason.items():
            yield f"| {', '.join(names)} | {reason} |"


def _options_section(results: Results) -> Iterator[str]:
    by_option: dict[str, Results] = defaultdict(dict)
    for case, verdict in results.items():
        by_option[case.option][case] = verdict
    yield from ("", "## Options", "")
    yield "| option | exact | greatest difference | refused | not loadable |"
    yield "| --- | --- | ---: | --- | --- |"
    for option, verdicts in by_option.items():
        errors = [error for v in verdicts.values() if v.status == EXACT for error in v.errors.values()]
        cells = [
            option,
            _names(EXACT, verdicts),
            f"{max(errors):.0e}" if errors else "",
            _names(REFUSED, verdicts),
            _names(NOT_LOADABLE, verdicts),
        ]
        yield "| " + " | ".join(cells) + " |"


def _names(status: str, verdicts: Results) -> str:
    """Return the model types with this status; after those with the same reason, the reason."""
    by_reason: dict[str, list[str]] = defaultdict(list)
    for case, verdict in verdicts.items():
        if verdict.status == status:
            by_reason["" if status == EXACT else _plain_reason(verdict)].append(case.model_type)
    return "; ".join(", ".join(names) + (f": {reason}" if reason else "") for reason, names in by_reason.items())


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the sweep and write its tables; return the exit code."""
    parser = ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", metavar="TYPES", help="Sweep only these model types, such as llama,qwen3.")
    parser.add_argument("--defaults", action="store_true", help="Leave out the options of the models.")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="Number of processes; default all cores.")
    parser.add_argument("--seconds", type=float, default=120.0, help="Time limit of a case; default 120.")
    parser.add_argument("--output", metavar="FILE", help="Also write the tables to this file, in Markdown.")
    options = parser.parse_args(arguments)
    model_types = options.only.split(",") if options.only else list(CLASSES)
    if unknown := sorted(set(model_types) - CLASSES.keys()):
        parser.error(f"--only: transformers {transformers.__version__} has no causal LM of type {unknown[0]}")
    begin = monotonic()
    results = run_sweep(model_types, options.jobs, options.seconds, with_options=not options.defaults)
    lines = list(write_tables(results, monotonic() - begin, options.jobs))
    print("\n".join(line for line in lines if line.startswith("- **")))
    if options.output:
        Path(options.output).write_text("\n".join(lines) + "\n", encoding="utf-8")
    return 1 if any(verdict.status == WRONG for verdict in results.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
