"""Measure log-likelihoods of choices, by lm-eval's own class for transformers models (HFLM) and by saro's.

    python benchmarks/lm_eval_likelihoods.py [--questions 40] [--rounds 3] [--json_file FILE]    # needs saro[lm-eval]

Both score the same requests in float32 and take turns; ratios are medians of the ratios within a round. The questions and
answers are those of the demo data, in three forms:

- letters: a question, four answers in a list, and the choices " A" to " D", as in MMLU
- letters, 5 examples: the same after five examples, the same for all questions
- texts: a question, and four answers as choices, as in ARC or HellaSwag
"""

from __future__ import annotations

import json
import statistics
import time
from pathlib import Path

import torch
from jsonargparse import auto_cli
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from rich.console import Console
from rich.table import Table

from saro.config import DEMO
from saro.data.records import Example, read_examples
from saro.demo import demo_file, find_demo
from saro.evaluate.saro_lm import SaroLM
from saro.evaluate.subjects import find_measured

LETTERS = "ABCD"
FORMS = ("letters", "letters, 5 examples", "texts")


class CountingHFLM(HFLM):
    """HFLM, which counts the tokens that the model reads, with the padding."""

    tokens_read = 0

    def _model_call(self, inps: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
        self.tokens_read += inps.numel()
        return super()._model_call(inps, *args, **kwargs)


def make_requests(form: str, questions: int) -> list[Instance]:
    """Make four requests for each question: the answer to it, and to the three questions after it."""
    records = list(read_examples(demo_file("rw_train")))
    asked = [
        (_question(r), [_answer(records[(i + k) % len(records)]) for k in range(4)]) for i, r in enumerate(records)
    ]
    requests = []
    examples = "".join(_list_answers(*pair) + " A\n\n" for pair in asked[-5:]) if "examples" in form else ""
    for number, (question, answers) in enumerate(asked[:questions]):
        context, choices = f"Question: {question}\nAnswer:", [f" {answer}" for answer in answers]
        if form != "texts":
            context, choices = examples + _list_answers(question, answers), [f" {letter}" for letter in LETTERS]
        requests += [Instance("loglikelihood", {}, (context, c), i, ("demo", number, 1)) for i, c in enumerate(choices)]
    return requests


def _question(record: Example) -> str:
    return record.prompt if isinstance(record.prompt, str) else record.prompt[-1].content


def _answer(record: Example) -> str:
    return record.response.answer.split(". ")[0]


def _list_answers(question: str, answers: list[str]) -> str:
    listed = "".join(f"{letter}. {answer}\n" for letter, answer in zip(LETTERS, answers, strict=True))
    return f"Question: {question}\n{listed}Answer:"


def measure(form: str, hflm: CountingHFLM, lm: SaroLM, questions: int, rounds: int) -> dict[str, object]:
    """Score one form by both, in turns. The first round warms up and is not counted."""
    requests = make_requests(form, questions)
    seconds: dict[str, list[float]] = {"hflm": [], "saro": []}
    for _ in range(rounds + 1):
        hflm.tokens_read = 0
        lm.counts.clear()
        start = time.perf_counter()
        theirs = hflm.loglikelihood(requests, disable_tqdm=True)
        middle = time.perf_counter()
        ours = lm.loglikelihood(requests)
        seconds["hflm"].append(middle - start)
        seconds["saro"].append(time.perf_counter() - middle)
    counted = {side: values[1:] for side, values in seconds.items()}
    return {
        "form": form,
        "requests": len(requests),
        "tokens": {"hflm": hflm.tokens_read, "saro": lm.counts["tokens read"]},
        "seconds": counted,
        "ratio": statistics.median(h / s for h, s in zip(counted["hflm"], counted["saro"], strict=True)),
        "largest difference": max(abs(t[0] - o[0]) for t, o in zip(theirs, ours, strict=True)),
    }


def main(
    model: str = DEMO, questions: int = 40, rounds: int = 3, batch: int = 16, json_file: str | None = None
) -> None:
    """Measure log-likelihoods of choices, by lm-eval's own class for transformers models and by saro's.

    Args:
        model: Folder or hub name of a model.
        questions: Number of questions, with four choices each.
        rounds: Measured rounds; each side runs once per round.
        batch: HFLM's batch size.
        json_file: Also write the figures to this file.
    """
    folder = find_demo(model)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    hflm = CountingHFLM(pretrained=folder, device=device, dtype="float32", batch_size=batch)
    lm = SaroLM.of(find_measured(None, folder))
    table = Table(
        "form", "requests", "HFLM tokens", "saro tokens", "HFLM s", "saro s", "HFLM / saro", "differ by, nats"
    )
    figures = []
    for form in FORMS:
        found = measure(form, hflm, lm, questions, rounds)
        figures.append(found)
        table.add_row(
            form,
            f"{found['requests']:,}",
            *(f"{found['tokens'][side]:,}" for side in ("hflm", "saro")),
            *(f"{statistics.median(found['seconds'][side]):.1f}" for side in ("hflm", "saro")),
            f"{found['ratio']:.2f}",
            f"{found['largest difference']:.0e}",
        )
    Console(width=120).print(table)
    if json_file is not None:
        Path(json_file).write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    auto_cli(main)
