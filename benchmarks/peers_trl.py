"""TRL's side of `peers.py`: its trainers as a user would run them on a CPU, on token ids that are checked to be ours."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset, concatenate_datasets
from peers_data import (
    BETA,
    FIRST,
    LR,
    MAX_GRAD_NORM,
    Data,
    Request,
    Result,
    loaded_gib,
    measured,
    peak_gib,
    sequences,
)
from peft import LoraConfig
from transformers import AutoModelForCausalLM, TrainerCallback
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer, pack_dataset

from saro.data.dataset import ExampleSet, PairSet
from saro.model.adapter import ALPHA, DROPOUT, RANK, linear_layers
from saro.model.load import ModelSource
from saro.program import quiet_libraries


class Stopwatch(TrainerCallback):
    """Seconds of each step, from its begin to its end: collating and logging are outside."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_step_begin(self, *args: Any, **others: Any) -> None:
        self._start = time.perf_counter()

    def on_step_end(self, *args: Any, **others: Any) -> None:
        self.seconds.append(time.perf_counter() - self._start)


class PairTrainer(DPOTrainer):
    """Takes token ids in place of text, and times the scoring of the reference pass."""

    reference_seconds = 0.0

    def _prepare_dataset(self, dataset: Dataset, *args: Any) -> Dataset:
        return dataset

    def compute_ref_log_probs(self, *args: Any) -> tuple[torch.Tensor, torch.Tensor]:
        start = time.perf_counter()
        logps = super().compute_ref_log_probs(*args)
        self.reference_seconds += time.perf_counter() - start
        return logps


def pair_rows(data: PairSet, number: int) -> Dataset:
    """The first pairs, as DPOTrainer has them after tokenization."""
    rows = []
    for record in range(number):
        chosen, rejected = data.sequences(record)
        rows.append(
            {
                "prompt_ids": chosen.tokens[: chosen.scored_from].tolist(),
                "chosen_ids": chosen.tokens[chosen.scored_from :].tolist(),
                "rejected_ids": rejected.tokens[rejected.scored_from :].tolist(),
            }
        )
    return Dataset.from_list(rows)


def example_rows(data: ExampleSet, batches: np.ndarray, packed: bool) -> Dataset:
    """Examples, as SFTTrainer has them after tokenization.

    Packed: TRL packs each batch into one row, so that a step holds the same examples on every side. Its collator gives
    position ids that begin anew with each example, from which transformers makes a mask that keeps them apart.
    """
    rows = []
    for sequence in sequences(data, batches.flatten()):
        tokens = sequence.tokens.tolist()
        rows.append({"input_ids": tokens, "labels": [-100] * sequence.scored_from + tokens[sequence.scored_from :]})
    dataset = Dataset.from_list(rows)
    if not packed:
        return dataset
    tokens = [sum(len(rows[record]["input_ids"]) for record in batch) for batch in batches]
    return concatenate_datasets(
        [pack_dataset(dataset.select(batch), room) for batch, room in zip(batches, tokens, strict=True)]
    )


def run_trl(request: Request, source: ModelSource, data: Data, folder: Path) -> Result:
    """Load, train and time."""
    quiet_libraries()
    torch.set_num_threads(request.threads)
    model = AutoModelForCausalLM.from_pretrained(
        source.path, dtype=torch.float32, attn_implementation="sdpa", use_safetensors=True
    )
    loaded = loaded_gib(model)
    adapter = LoraConfig(
        r=RANK, lora_alpha=ALPHA, lora_dropout=DROPOUT, target_modules=linear_layers(model), task_type="CAUSAL_LM"
    )
    stopwatch = Stopwatch()
    common = {
        "model": model,
        "processing_class": source.tokenizer,
        "peft_config": adapter,
        "callbacks": [stopwatch],
    }
    packed = request.side == "trl, packed"
    options = {
        "output_dir": str(folder),
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "per_device_train_batch_size": 1 if packed else request.trl_batch,
        "gradient_accumulation_steps": request.per_step // request.trl_batch,
        "train_sampling_strategy": "sequential",
        "max_steps": request.all_steps,
        "max_length": None,
        "learning_rate": LR,
        "lr_scheduler_type": "constant",
        "max_grad_norm": MAX_GRAD_NORM,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "seed": request.seed,
    }
    batches = np.arange(request.records).reshape(-1, request.trl_batch)
    if isinstance(data, PairSet):
        trainer = PairTrainer(
            args=DPOConfig(beta=BETA, precompute_ref_log_probs=True, **options),
            train_dataset=pair_rows(data, request.records),
            **common,
        )
    else:
        trainer = SFTTrainer(
            args=SFTConfig(packing=packed, dataset_kwargs={"skip_prepare_dataset": True}, **options),
            train_dataset=example_rows(data, batches, packed),
            **common,
        )
    # In sequential order, every epoch has the batches that are looked at here.
    read = []
    for records, batch in zip(batches, trainer.get_train_dataloader(), strict=True):
        check_batch(batch, data, records)
        read.append(batch["input_ids"].numel())
    trainer.train()
    steps = np.arange(request.records).reshape(-1, request.per_step)
    return Result(
        stopwatch.seconds[request.warmup :],
        request.steps * request.per_step,
        measured(request, [sum(len(s.tokens) for s in sequences(data, records)) for records in steps]),
        measured(request, np.reshape(read, (len(steps), -1)).sum(axis=1).tolist()),
        {name: trainer.state.log_history[0][name] for name in FIRST[request.task]},
        loaded,
        peak_gib(),
        getattr(trainer, "reference_seconds", None),
    )


def check_batch(batch: dict[str, torch.Tensor], data: Data, records: np.ndarray) -> None:
    """Raise ValueError unless a batch of TRL's holds the tokens of these records, and scores the same ones of them."""
    scored = batch["completion_mask"].bool() if "completion_mask" in batch else batch["labels"] != -100
    if "position_ids" in batch:
        starts = (batch["position_ids"][0] == 0).nonzero().flatten().tolist()
        lengths = np.diff([*starts, batch["input_ids"].shape[1]]).tolist()
        found = zip(batch["input_ids"][0].split(lengths), scored[0].split(lengths), strict=True)
    else:
        real = batch["attention_mask"].bool()
        found = ((t[r], s[r]) for t, s, r in zip(batch["input_ids"], scored, real, strict=True))
    theirs = sorted((tokens.tolist(), mask.tolist()) for tokens, mask in found)
    ours = sorted(
        (s.tokens.tolist(), [i >= s.scored_from for i in range(len(s.tokens))]) for s in sequences(data, records)
    )
    if theirs != ours:
        raise ValueError(f"TRL reads or scores other tokens than ours in records {records.tolist()}")
