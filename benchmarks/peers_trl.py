"""TRL's side of `peers.py`: its trainers as a user would run them on one device. It checks that TRL gets our token ids."""

from __future__ import annotations

import secrets
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import trl.trainer.dpo_trainer as dpo_trainer
from datasets import Dataset, concatenate_datasets
from peers_data import (
    BETA,
    FIRST_METRICS,
    LR,
    MAX_GRAD_NORM,
    Data,
    Request,
    Result,
    loaded_gib,
    measured,
    memory_figures,
    sequences,
    synchronize,
)
from peft import LoraConfig
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel, TrainerCallback
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer, pack_dataset

from saro.data.dataset import ExampleSet, PairSet
from saro.model.adapter import ALPHA, DROPOUT, RANK, linear_layers
from saro.model.source import ModelSource
from saro.program import quiet_libraries


class Stopwatch(TrainerCallback):
    """Measures the seconds of each step from its begin to its end, without collating and logging."""

    def __init__(self, device: str) -> None:
        self.seconds: list[float] = []
        self._device = device

    def on_step_begin(self, *args: Any, **others: Any) -> None:
        synchronize(self._device)
        self._start = time.perf_counter()

    def on_step_end(self, *args: Any, **others: Any) -> None:
        synchronize(self._device)
        self.seconds.append(time.perf_counter() - self._start)


class PairTrainer(DPOTrainer):
    """A DPOTrainer that takes token ids instead of text and times the scoring of the reference pass."""

    reference_seconds = 0.0

    def _prepare_dataset(self, dataset: Dataset, *args: Any) -> Dataset:
        return dataset

    def compute_ref_log_probs(self, *args: Any) -> tuple[torch.Tensor, torch.Tensor]:
        synchronize(self.args.device.type)
        start = time.perf_counter()
        logps = super().compute_ref_log_probs(*args)
        synchronize(self.args.device.type)
        self.reference_seconds += time.perf_counter() - start
        return logps


def pair_rows(data: PairSet, number: int) -> Dataset:
    """Return the first pairs in the format that DPOTrainer has after tokenization."""
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
    """Return the examples of ``batches`` (B, n) in the format that SFTTrainer has after tokenization.

    If ``packed``, TRL packs each batch into one row, so that a step holds the same examples on every side. TRL's collator
    restarts the position ids at each example, and transformers makes from them a mask that separates the examples.
    """
    rows = []
    for sequence in sequences(data, batches.flatten()):
        tokens = sequence.tokens.tolist()
        rows.append({"input_ids": tokens, "labels": [-100] * sequence.scored_from + tokens[sequence.scored_from :]})
    dataset = Dataset.from_list(rows)
    if not packed:
        return dataset
    packed_batches = []
    for batch in batches:
        batch_tokens = sum(len(rows[record]["input_ids"]) for record in batch)
        packed_batches.append(pack_dataset(dataset.select(batch), batch_tokens))
    return concatenate_datasets(packed_batches)


def load_trl_model(request: Request, path: str) -> PreTrainedModel:
    """Load the model as TRL's examples do, quantized as this project does."""
    quantization = None
    if request.method == "qlora":
        quantization = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=request.dtype,
            llm_int8_skip_modules=["lm_head"],
        )
    model = AutoModelForCausalLM.from_pretrained(
        path,
        dtype=request.dtype,
        attn_implementation="sdpa",
        use_safetensors=True,
        device_map={"": request.device},
        quantization_config=quantization,
    )
    for layer in model.modules():
        # Else bitsandbytes repacks weights on some CPUs in the reference pass, and no gradient is right after that.
        if hasattr(layer, "support_avx512bf16_for_cpu"):
            layer.support_avx512bf16_for_cpu = False
    return model


def run_trl(request: Request, source: ModelSource, data: Data, folder: Path) -> Result:
    """Load the model, train it with TRL, and time the steps."""
    quiet_libraries()
    torch.set_num_threads(request.threads)
    model = load_trl_model(request, source.path)
    loaded = loaded_gib(model, request.device)
    # TRL names the cache of its reference pass by a hash, for which it reads every weight on the host: minutes for a large
    # model. No later run can use the cache of a name that nobody knows.
    dpo_trainer.hash_module = lambda module: secrets.token_hex()
    adapter = LoraConfig(
        r=RANK, lora_alpha=ALPHA, lora_dropout=DROPOUT, target_modules=linear_layers(model), task_type="CAUSAL_LM"
    )
    stopwatch = Stopwatch(request.device)
    common = {
        "model": model,
        "processing_class": source.tokenizer,
        "peft_config": adapter,
        "callbacks": [stopwatch],
    }
    packed = request.side == "trl, packed"
    options = {
        "output_dir": str(folder),
        "use_cpu": request.device == "cpu",
        "bf16": request.dtype == torch.bfloat16,
        "gradient_checkpointing": request.gradient_checkpointing,
        "gradient_checkpointing_kwargs": {"use_reentrant": False},
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
    # Check one epoch: in sequential order, every epoch has the same batches.
    batch_read_tokens = []
    for records, batch in zip(batches, trainer.get_train_dataloader(), strict=True):
        tensors = {name: value.cpu() for name, value in batch.items() if isinstance(value, torch.Tensor)}
        check_batch(tensors, data, records)
        batch_read_tokens.append(batch["input_ids"].numel())
    trainer.train()
    step_records = np.arange(request.records).reshape(-1, request.per_step)  # (steps per epoch, records per step)
    step_tokens = [sum(len(s.tokens) for s in sequences(data, records)) for records in step_records]
    step_read_tokens = np.reshape(batch_read_tokens, (len(step_records), -1)).sum(axis=1)
    return Result(
        seconds=stopwatch.seconds[request.warmup :],
        records=request.steps * request.per_step,
        tokens=measured(request, step_tokens),
        read_tokens=measured(request, step_read_tokens.tolist()),
        first={name: trainer.state.log_history[0][name] for name in FIRST_METRICS[request.task]},
        loaded_gib=loaded,
        reference_seconds=getattr(trainer, "reference_seconds", None),
        **memory_figures(request.device),
    )


def check_batch(batch: dict[str, torch.Tensor], data: Data, records: np.ndarray) -> None:
    """Raise ValueError unless a TRL batch has the tokens of these records and scores the same tokens as we do."""
    scored = batch["completion_mask"].bool() if "completion_mask" in batch else batch["labels"] != -100
    theirs = []  # (token ids, scored mask) of each sequence
    if "position_ids" in batch:  # packed: sequences start where the position is 0
        starts = (batch["position_ids"][0] == 0).nonzero().flatten().tolist()
        lengths = np.diff([*starts, batch["input_ids"].shape[1]]).tolist()
        for tokens, mask in zip(batch["input_ids"][0].split(lengths), scored[0].split(lengths), strict=True):
            theirs.append((tokens.tolist(), mask.tolist()))
    else:  # padded
        is_token = batch["attention_mask"].bool()
        for tokens, mask, keep in zip(batch["input_ids"], scored, is_token, strict=True):
            theirs.append((tokens[keep].tolist(), mask[keep].tolist()))
    ours = []
    for sequence in sequences(data, records):
        mask = [i >= sequence.scored_from for i in range(len(sequence.tokens))]
        ours.append((sequence.tokens.tolist(), mask))
    if sorted(theirs) != sorted(ours):
        raise ValueError(f"records {records.tolist()}: TRL reads or scores other tokens than we do; fix its dataset")
