"""Turn the results of the GPU suite into Markdown, and put them between the markers of a document.

    python benchmarks/gpu/gpu_tables.py benchmarks/results/gpu/CARD-DATE/results.json [--into benchmarks/README.md]

Without ``--into``, the tables are printed.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from saro.errors import SaroError
from saro.files import atomic_write

MARKERS = ("<!-- GPU results: begin -->", "<!-- GPU results: end -->")


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table whose first column is text and whose others are numbers."""
    lines = ["| " + " | ".join(header) + " |", "| --- |" + " ---: |" * (len(header) - 1)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)]) + "\n"


def steps_part(found: dict) -> str:
    """Return how each step of the suite ended."""
    rows = []
    for name, end in found.get("steps", {}).items():
        rows.append([name, "passed" if end["code"] == 0 else str(end["code"]), f"{end['seconds']:.0f}"])
    return "### Steps\n\n" + table(["step", "exit code", "s"], rows)


def probe_part(probe: dict) -> str:
    machine, ceilings = probe["machine"], probe.get("ceilings", {})
    packages = ", ".join(f"{name} {v}" for name, v in machine["packages"].items() if v)
    lines = [f"### {machine.get('gpu', 'CPU')}", "", packages + ".", ""]
    for name, value in ceilings.items():
        if isinstance(value, float):
            lines.append(f"- {name}: {value / 1e12:,.2f} T")
    names = ("varlen", "float32 products", "nf4", "head")
    lines += [f"- {name}: `{json.dumps(probe.get(name))[:600]}`" for name in names]
    return "\n".join(lines) + "\n"


def doctor_part(name: str, doctor: dict) -> str:
    checks = doctor["checks"]
    failed = [check for check in checks if check["ok"] is False]
    skipped = sum(check["ok"] is None for check in checks)
    lines = [
        f"### {name}: {'failed' if failed else 'passed'}, {len(checks) - len(failed) - skipped} checks passed, {skipped} skipped",
        "",
    ]
    lines += [f"- FAILED {c['name']}: {c['figure'][:300]} ({c.get('limit')})" for c in failed]
    lines += [f"- {c['name']}: {c['figure'][:200]}" for c in checks if c["ok"]]
    return "\n".join([*lines, *(f"- → {line}" for line in doctor.get("recommendations", []))]) + "\n"


def matrix_part(matrix: dict) -> str:
    """Return the table of training steps, and the kernels that take the most time."""
    rows = []
    for case in matrix["cases"]:
        layers = case["layers"] + (f", {case['attention']}" if case["attention"] else "")
        recomputation = ", recomputation" if case["checkpointing"] else ""
        # Results from before there were the options lack them.
        if case.get("offload"):
            recomputation += ", inputs on the host"
        rows.append(
            [
                f"{layers}, {case['pack_tokens']:,} tokens{recomputation}",
                f"{case['seconds']:.3f}",
                *(f"{case['parts'][part]:.3f}" for part in ("forward", "head", "backward", "optimizer")),
                f"{case['tokens_per_second']:,.0f}",
                f"{case['operations_per_second'] / 1e12:.0f}",
                f"{case['share_of_gemm_rate']:.0%}",
                f"{case['allocated_gib']:.2f}",
                f"{case['reserved_gib']:.2f}",
            ]
        )
    header = [
        f"{matrix.get('task', 'rw').upper()} step",
        "s",
        "forward",
        "head",
        "backward",
        "optimizer",
        "tokens/s",
        "TFLOP/s",
        "of GEMM",
        "GiB",
        "reserved",
    ]
    load = matrix["load_gib"]
    lines = [
        f"### {matrix['model']}, QLoRA: {matrix['device']}",
        "",
        f"{matrix['policy']}. Loaded in {matrix['load_seconds']:.0f} s; peak while loading {load['allocated_gib']:.2f} GiB.",
        "",
        table(header, rows),
    ]
    lines += [f"- left out: {line}" for line in matrix["left_out"]]
    if matrix["profile"] is not None:
        profile = matrix["profile"]
        lines += [
            "",
            f"Kernels of one step ({profile['case']['pack_tokens']:,} tokens, recomputation "
            f"{profile['case']['checkpointing']}): {profile['launches']:,} launches, busy {profile['busy_seconds']:.3f} s.",
            "",
            table(
                ["kernel", "calls", "ms", "share"],
                [
                    [
                        f"`{k['name'][:80]}`".replace("|", "/"),
                        str(k["calls"]),
                        f"{1e3 * k['seconds']:.2f}",
                        f"{k['share']:.1%}",
                    ]
                    for k in profile["kernels"][:16]
                ],
            ),
        ]
    return "\n".join(lines) + "\n"


def heads_part(heads: dict) -> str:
    rows = []
    for name, head in heads["heads"].items():
        for side in head["sides"]:
            cells = []
            for pass_name in ("frozen", "trainable"):
                result = next((r for r in head["results"] if (r["side"], r["pass"]) == (side, pass_name)), None)
                if result is None:
                    cells += [""] * 3
                elif "error" in result:
                    cells += [result["error"][:60].replace("|", "/"), "", ""]
                else:
                    memory = (result["peak_bytes"] or 0) / 2**20
                    cells += [f"{1e3 * result['seconds']:.2f}", f"{result['share_of_gemm_rate']:.0%}", f"{memory:,.0f}"]
            rows.append([f"{name}, {head['rows']:,} rows: {side}", *cells])
    header = ["head", "frozen, ms", "of GEMM", "MiB", "trainable, ms", "of GEMM", "MiB"]
    return "### Loss kernels, forward and backward\n\n" + table(header, rows)


def peers_part(peers: dict) -> str:
    """Return the table of each task, from the results of its rounds: it is right also where a measurement was stopped."""
    parts = []
    for task, entry in peers["tasks"].items():
        rows = []
        for side, rounds in entry["rounds"].items():
            for result in rounds:
                seconds = sum(result["seconds"])
                reference = result["reference_seconds"]
                rows.append(
                    [
                        side,
                        f"{result['records'] / seconds:.2f}",
                        f"{result['tokens'] / seconds:,.0f}",
                        f"{result['read_tokens'] / result['tokens']:.2f}",
                        "" if reference is None else f"{reference:.1f}",
                        f"{result['loaded_gib']:.2f}",
                        f"{result['peak_gib']:.2f}",
                    ]
                )
        header = [task.upper(), "records/s", "tokens/s", "read share", "reference, s", "loaded, GiB", "peak, GiB"]
        errors = entry.get("errors", {})
        lines = [f"\n- {side} failed: {error[:300]}" for side, error in errors.items()]
        unmeasured = [side for side, rounds in entry["rounds"].items() if not rounds and side not in errors]
        lines += [f"\n- {side}: not measured" for side in unmeasured]
        parts.append("### Beside TRL\n\n" + table(header, rows) + "".join(lines) + "\n")
    return "\n".join(parts)


def attention_part(attention: dict) -> str:
    rows = []
    for name, entry in attention.items():
        for backend in ("sdpa", "varlen"):
            if backend in entry:
                figures = entry[backend]
                rows.append(
                    [
                        f"{name}: {backend}",
                        f"{1e3 * figures['forward_seconds']:.2f}",
                        f"{1e3 * figures['both_seconds']:.2f}",
                        f"{figures['operations_per_second'] / 1e12:.0f}",
                    ]
                )
    notes = [
        f"- {name}: varlen differs from sdpa by {max(entry['difference']):.1e}; reproducible: {entry['varlen_is_reproducible']}"
        for name, entry in attention.items()
        if "difference" in entry
    ]
    header = ["attention of one layer", "forward, ms", "and backward, ms", "TFLOP/s"]
    return "### Attention\n\n" + table(header, rows) + "\n" + "\n".join(notes) + "\n"


def lora_part(lora: dict) -> str:
    rows = []
    for name, layer in lora["layers"].items():
        seconds, ratio = layer["seconds"], layer["ratio_to_plain"]
        rows.append([name, f"{1e3 * seconds['plain']:.2f}", f"{ratio['peft']:.2f}", f"{ratio['saro']:.2f}"])
    return "### LoRA on a frozen layer\n\n" + table(["layer", "plain, ms", "PEFT / plain", "saro / plain"], rows)


def summarize(found: dict) -> str:
    """Return all tables of ``found``, {name of the step: its results, "steps": how they ended}. Steps may be missing.

    Results from which no table can be made, such as those of a step that failed early, are named.
    """
    writers = {
        "probe": probe_part,
        "step_matrix": matrix_part,
        "step_matrix_srpo": matrix_part,
        "step_matrix_without_liger": matrix_part,
        "srpo": peers_part,
        "loss_kernels": heads_part,
        "loss_kernels_cut": heads_part,
        "attention": attention_part,
        "lora_linear": lora_part,
    }
    doctors = [name for name in sorted(found) if name.startswith("doctor-")]
    writers |= {name: partial(doctor_part, name) for name in doctors}
    parts = [steps_part(found)]
    for name, write in writers.items():
        if name in found:
            try:
                parts.append(write(found[name]))
            except (KeyError, TypeError, AttributeError) as error:
                parts.append(f"### {name}\n\n- no table: {type(error).__name__}: {error}; see results.json\n")
    return "\n".join(parts)


def insert(document: str, tables: str, markers: tuple[str, str]) -> str:
    """Return the document with ``tables`` between two markers. Raises SaroError if it lacks one of them."""
    begin, end = markers
    if begin not in document or end not in document:
        raise SaroError(f"the document lacks the lines {begin} and {end}; put them where the tables belong")
    head, rest = document.split(begin, 1)
    return f"{head}{begin}\n\n{tables}\n{end}{rest.split(end, 1)[1]}"


def publish(tables: str, into: Path | None, markers: tuple[str, str]) -> None:
    """Put tables between the markers of a document; print them if there is none."""
    if into is None:
        print(tables)
        return
    document = insert(into.read_text(), tables, markers)
    with atomic_write(into) as out:
        out.write(document)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("results", type=Path, help="results.json of a run of the suite.")
    parser.add_argument("--into", type=Path, help="Document whose tables are replaced.")
    options = parser.parse_args()
    publish(summarize(json.loads(options.results.read_text())), options.into, MARKERS)


if __name__ == "__main__":
    main()
