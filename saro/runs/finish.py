"""Measure a run before and after its training, write final/, and say how the run ended."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from saro.data.chat_format import ChatFormat
from saro.data.records import Message
from saro.distributed.runtime import Runtime
from saro.distributed.shard import whole
from saro.files import atomic_folder, follow_umask, remove_temps
from saro.model.architectures import text_config
from saro.model.generate import answer_prompts
from saro.model.policy import Policy
from saro.runs.folder import RunFolder
from saro.train.engine import Outcome


@dataclass(frozen=True)
class BeforeAfter:
    """Measures a model before its training and after it: held-out metrics, and answers to held-out prompts.

    Attributes:
        runtime, run, policy, chat: the run, its model and the model's chat format.
        prompts: prompts that rank 0 answers; if the ranks share the weights, all of them do, as they must.
        max_tokens: longest answer, in tokens.
        heldout_metrics: returns the held-out metrics, given the number of finished steps.
        tracked: (id, text) of each prompt, if the answers go to the trackers too; else empty.
    """

    runtime: Runtime
    run: RunFolder
    policy: Policy
    chat: ChatFormat
    prompts: Sequence[Sequence[Message] | str]
    max_tokens: int
    heldout_metrics: Callable[[int], dict[str, float]]
    tracked: Sequence[tuple[str, str | None]] = ()

    def measure(self, file: str, step: int) -> dict[str, Any]:
        """Return metrics and answers after ``step`` steps, and write them to a JSON file in the run's folder.

        A resumed run that already has the file reads it instead.
        """
        return self.run.once(self.runtime, file, lambda: self._measure(step))

    def _measure(self, step: int) -> dict[str, Any]:
        metrics = self.heldout_metrics(step)
        answers = []
        if self.runtime.is_main or self.runtime.mesh is not None:
            answers = answer_prompts(self.policy, self.chat, self.prompts, self.max_tokens)
        if self.tracked and answers:
            samples = [(id, text or "", answer) for (id, text), answer in zip(self.tracked, answers, strict=True)]
            self.runtime.log_samples(samples, step)
        return {"metrics": metrics, "answers": answers}


def save_final(
    folder: Path,
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    original_options: Mapping[str, Any] | None = None,
    weights: Mapping[str, torch.Tensor] | None = None,
) -> None:
    """Write the model that other programs load: a PEFT adapter or a full model, with its tokenizer.

    Args:
        folder: complete or absent.
        original_options: written into the config of a full model: options that only training changed, such as its dropout.
        weights: those of ``gather_weights``; default the model's own.
    """
    if not isinstance(model, PeftModel):
        for name, value in (original_options or {}).items():
            setattr(text_config(model.config), name, value)
    remove_temps(folder)
    with atomic_folder(folder, replace=True) as temp:
        # By default, "auto", peft would ask the hub whether the vocabulary was changed. It never is here.
        options = {"save_embedding_layers": False} if isinstance(model, PeftModel) else {}
        model.save_pretrained(temp, state_dict=weights, **options)
        tokenizer.save_pretrained(temp)
        follow_umask(temp)


def gather_weights(runtime: Runtime, model: PreTrainedModel | PeftModel) -> dict[str, torch.Tensor] | None:
    """Return the weights that ``save_final`` writes, whole and on the CPU, on rank 0; nothing on the others.

    None if each rank holds whole weights. All ranks must call this.
    """
    if runtime.mesh is None:
        return None
    gathered: dict[str, torch.Tensor] = {}
    by_source: dict[int, torch.Tensor] = {}  # a tied weight has several names, and is written once
    for name, tensor in model.state_dict(keep_vars=True).items():
        if isinstance(model, PeftModel) and not tensor.requires_grad:
            continue
        if id(tensor) not in by_source:
            by_source[id(tensor)] = _keep_on_main(runtime, whole(tensor.detach()))
        gathered[name] = by_source[id(tensor)]
    return gathered


def _keep_on_main(runtime: Runtime, tensor: torch.Tensor) -> torch.Tensor:
    """Return the tensor on the CPU; on other ranks than 0 an empty one, so that theirs is freed."""
    return tensor.cpu() if runtime.is_main else tensor.new_empty(0)


def end_run(runtime: Runtime, run: RunFolder, outcome: Outcome) -> int:
    """Say how the run ended, and leave the process group. Returns the exit code: 0, or 128 + the signal that stopped it."""
    if outcome.stopped_by is None:
        code = 0
        which = "" if outcome.best_step is None else f" of step {outcome.best_step}, the best,"
        runtime.say(
            f"{outcome.step} steps, {outcome.tokens_per_second:.0f} tokens/s, "
            f"peak memory {outcome.peak_memory_gib:.2f} GiB; model{which} in {run.folder / 'final'}"
        )
    else:
        code = 128 + outcome.stopped_by
        runtime.say(f"stopped after step {outcome.step} of {outcome.total_steps}; continue with --resume")
    runtime.end()
    return code
