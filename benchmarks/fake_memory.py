"""Predict the peak memory of QLoRA steps on a GPU, on a machine that has none.

    PYTHONPATH=benchmarks/gpu python benchmarks/fake_memory.py benchmarks/results/fake_memory.json --into benchmarks/README.md

The predictions are those of `saro plan`: see saro/train/predict_memory.py and saro/model/fake_policy.py.

Predictions that the JSON file has already are kept: delete it after a change of the code. A test compares one with the code.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from gpu_tables import publish, table
from random_model import SHAPES

from saro.config import ModelConfig
from saro.files import atomic_write
from saro.train.predict_memory import Setting, Workload, predict_costs

ROOT = Path(__file__).resolve().parents[1]
MARKERS = ("<!-- memory predictions: begin -->", "<!-- memory predictions: end -->")
MODELS = {"llama-8b": "Llama-3-8B", "qwen3-8b": "Qwen3-8B", "qwen2.5-7b": "Qwen2.5-7B"}
TOKENS = (2048, 4096, 8192, 16384, 24576, 32768)
TASKS = ("rw", "srpo")
# How many layers are recomputed, and in words.
LABELS = {
    "none": "no layer recomputed",
    "half": "half of the layers recomputed",
    "all": "all layers recomputed",
    "offloaded": "all, inputs on the host",
}
WAYS = tuple(LABELS)
# Memory of the card whose limit the tables show, and the size of the pack whose parts they show.
CARD_BYTES, PARTS_AT = 24 * 2**30, 8192
# RW packs are sequences of 512 tokens, SRPO packs are pairs that read 2,048 tokens.
WORKLOADS = {"rw": Workload("rw", 512), "srpo": Workload("srpo", 2048)}
# Results of the GPU suite whose code (commit 6011a4c) recomputed an MLP in one piece. Today's does it in chunks of rows, in other
# memory, so that only steps that recompute nothing can be compared.
WHOLE_MLPS = {"h100-2026-11-27", "h100-2026-11-27-before"}


@dataclass(frozen=True)
class Prediction:
    """Memory of a step, bytes.

    Attributes:
        model: frozen weights.
        trained: adapters and the optimizer's state.
        layers: what the decoder keeps when the head begins.
        head: what the head's forward takes at its peak beside that.
        peak: peak of the whole step, with gradients.
    """

    model: int
    trained: int
    layers: int
    head: int
    peak: int


# By shape, task, way and tokens of the pack.
Found = dict[tuple[str, str, str, int], Prediction]


def predict(shape: str, task: str, tokens: Sequence[int], way: str) -> list[Prediction]:
    """Predict the memory of QLoRA steps of one pack on a GPU.

    Args:
        shape: name of a shape of ``random_model.py``.
        task: one of ``TASKS``.
        tokens: sizes of the pack.
        way: one of ``WAYS``.
    """
    config = SHAPES[shape]()
    recomputed = {"none": False, "half": config.num_hidden_layers // 2, "all": True, "offloaded": True}[way]
    options = ModelConfig(gradient_checkpointing=recomputed, activation_offloading=way == "offloaded")
    setting = Setting(config, options, torch.bfloat16, is_gpu=True, holds_gradients=False)
    return [
        Prediction(
            model=cost.weights,
            trained=cost.adapters + cost.optimizer,
            layers=cost.layers,
            head=cost.head,
            peak=cost.peak,
        )
        for cost in predict_costs(setting, WORKLOADS[task], tokens)
    ]


# Tables.


def gib(size: float) -> str:
    return f"{size / 2**30:.1f}"


def tokens_at(limit: float, sizes: Sequence[int], peaks: Sequence[float]) -> int:
    """Return at how many tokens a line through the points, extended at both ends, reaches a peak of ``limit``.

    Sizes ascend, and there are at least two.
    """
    above = next((i for i, peak in enumerate(peaks) if peak > limit), len(peaks) - 1)
    left = max(0, above - 1)
    slope = (peaks[left + 1] - peaks[left]) / (sizes[left + 1] - sizes[left])
    return int(sizes[left] + (limit - peaks[left]) / slope)


def peaks_table(found: Found, task: str) -> str:
    """Return the peaks of a task by model, way and size of the pack; cells are empty for sizes that were left out."""
    sizes = sorted({size for _, of_task, _, size in found if of_task == task})
    rows = []
    for shape, way in sorted({(shape, way) for shape, of_task, way, _ in found if of_task == task}, key=_in_order):
        peaks = {size: found[shape, task, way, size].peak for size in sizes if (shape, task, way, size) in found}
        cells = [gib(peaks[size]) if size in peaks else "" for size in sizes]
        reached = f"{tokens_at(CARD_BYTES, list(peaks), list(peaks.values())):,}" if len(peaks) > 1 else ""
        rows.append([f"{MODELS.get(shape, shape)}, {LABELS[way]}", *cells, reached])
    return table([task.upper(), *(f"{size:,}" for size in sizes), "tokens at 24 GiB"], rows)


def _in_order(case: tuple[str, str]) -> tuple[int, int]:
    """Order models and ways as they are listed above; other models come first."""
    shape, way = case
    return list(MODELS).index(shape) if shape in MODELS else -1, WAYS.index(way)


def parts_table(found: Found, size: int) -> str:
    """Return the parts of the peaks of RW steps on packs of one size."""
    rows = []
    for shape, way in sorted({(shape, way) for shape, task, way, _ in found if task == "rw"}, key=_in_order):
        p = found.get((shape, "rw", way, size))
        if p is not None:
            parts = (p.model, p.trained, p.layers, p.head, p.peak)
            rows.append([f"{MODELS.get(shape, shape)}, {LABELS[way]}", *map(gib, parts)])
    header = [f"{size:,} tokens", "model", "adapters, optimizer", "kept by the layers", "head", "peak"]
    return table(header, rows)


@dataclass(frozen=True)
class Comparison:
    """A prediction, and what a GPU measured; bytes.

    Attributes:
        is_same_code: this code still computes the step as it was computed there.
    """

    description: str
    predicted: int
    measured: float
    is_same_code: bool

    @property
    def difference(self) -> float:
        """How much more is predicted than was measured, as a share of that."""
        return self.predicted / self.measured - 1


def compare(found: Found, results: Sequence[Path]) -> list[Comparison]:
    """Compare predictions with what the GPU suite measured: ``results.json`` of its runs."""
    comparisons = []
    for file in results:
        matrix = json.loads(file.read_text()).get("step_matrix")
        for case in () if matrix is None else matrix["cases"]:
            way = "offloaded" if case.get("offload") else "all" if case["checkpointing"] else "none"
            key = (matrix["model"], "rw", way, case["pack_tokens"])
            # PEFT's layers, and one call of attention per segment, take other memory.
            is_ours = case["layers"] == "saro" and case["attention"] is None
            if is_ours and key in found and "liger" in matrix["policy"]:
                comparisons.append(
                    Comparison(
                        f"{MODELS[key[0]]}, {case['pack_tokens']:,} tokens, {LABELS[way]}: {matrix['device']}",
                        predicted=found[key].peak,
                        measured=case["allocated_gib"] * 2**30,
                        is_same_code=way == "none" or file.parent.name not in WHOLE_MLPS,
                    )
                )
    return comparisons


def measured_table(comparisons: Sequence[Comparison]) -> str:
    rows = [
        [
            c.description,
            f"{c.predicted / 2**30:.2f}",
            f"{c.measured / 2**30:.2f}",
            f"{c.difference:+.1%}",
            "" if c.is_same_code else "older: MLP in one piece",
        ]
        for c in comparisons
    ]
    return table(["RW", "predicted GiB", "measured GiB", "difference", "measured code"], rows)


def render(found: Found, results: Sequence[Path]) -> str:
    """Return all tables as Markdown."""
    size = min({size for *_, size in found}, key=lambda size: abs(size - PARTS_AT))
    parts = [peaks_table(found, task) for task in TASKS if any(task == of_task for _, of_task, _, _ in found)]
    return "\n".join([*parts, parts_table(found, size), measured_table(compare(found, results))])


def read_found(file: Path) -> Found:
    if not file.exists():
        return {}
    return {
        (entry.pop("model_shape"), entry.pop("task"), entry.pop("way"), entry.pop("tokens")): Prediction(**entry)
        for entry in json.loads(file.read_text())
    }


def write_found(file: Path, found: Found) -> None:
    names = ("model_shape", "task", "way", "tokens")
    entries = [dict(zip(names, key, strict=True)) | vars(found[key]) for key in sorted(found)]
    with atomic_write(file) as out:
        out.write(json.dumps(entries, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("file", type=Path, help="JSON file of the predictions; those that it lacks are added.")
    parser.add_argument("--models", nargs="+", choices=sorted(SHAPES), default=list(MODELS), help="Shapes of models.")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS), help="rw, srpo or both.")
    parser.add_argument("--tokens", type=int, nargs="+", default=list(TOKENS), help="Sizes of the packs.")
    parser.add_argument("--into", type=Path, help="Document whose tables are replaced; without it they are printed.")
    options = parser.parse_args()
    found = read_found(options.file)
    for shape in options.models:
        for task in options.tasks:
            for way in WAYS:
                missing = [size for size in options.tokens if (shape, task, way, size) not in found]
                predictions = predict(shape, task, missing, way) if missing else []
                found |= {(shape, task, way, size): p for size, p in zip(missing, predictions, strict=True)}
                write_found(options.file, found)
    tables = render(found, sorted((ROOT / "benchmarks/results/gpu").glob("*/results.json")))
    publish(tables, options.into, MARKERS)


if __name__ == "__main__":
    main()
