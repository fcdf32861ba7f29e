"""`saro plan`: memory, largest pack, time and disk of a run, before anything but the model's config is there."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import date
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from huggingface_hub.errors import StrictDataclassError
from rich.console import Console
from rich.table import Table
from transformers import AutoConfig, PretrainedConfig

from saro.config import (
    DataConfig,
    ModelConfig,
    PreferenceConfig,
    RWConfig,
    SRPOConfig,
    TrainConfig,
    check_at_least,
    check_numbers,
)
from saro.data.dataset import PairSet
from saro.data.encode_files import encode_files, encode_pair_files
from saro.data.read_rows import is_hub
from saro.data.steps import Schedule, count_steps
from saro.data.unpaired_set import UnpairedSet, encode_unpaired_files
from saro.demo import data_files, find_demo
from saro.errors import SaroError
from saro.evaluate.plan import describe_time
from saro.model.adapter import find_adapter
from saro.model.architectures import check_supported, is_mixture, text_config
from saro.model.load import check_method, dtype_name
from saro.model.source import first_line, read_source
from saro.model.training_dtype import decide_dtype
from saro.tools.plan_run.cards import CPU_SHARE, GPU_SHARE, NETWORK, Card, find_card
from saro.tools.plan_run.layouts import Layout, Records, checkpoint_bytes, plan_layouts
from saro.train.predict_memory import Ranks, Setting, Workload

# Steps of the run that are planned; their averages stand for all.
_SAMPLED_STEPS = 32
_GIB = 2**30


@dataclass(frozen=True)
class Options:
    """Options of `saro plan`.

    Attributes:
        stage: The stage that the config is for.
        gpus: Number of cards, or of processes on a CPU.
        per_machine: Cards of a machine.
        card: The card (b200, h200, h100, a100-80, a100-40, l40s, rtx4090, rtx4080, rtx4060ti-16gb, rtx3090, a10 or l4), or
            cpu for this machine. For another one, name the card most like it, with memory and rate.
        memory: Memory of the card in GB; default that of its data sheet.
        rate: Floating-point operations per second that training reaches on a card, in TFLOP/s; default a share of the data
            sheet's, measured on an H100.
        network: Bandwidth between machines for each card, in GB/s and direction.
        tokens: Tokens of a record, on average; default measured on the files of data.train. A pair reads its shared part once.
        records: Number of records; only with tokens. Without it the time of the run is known only if train.max_steps is given.
        json: Print JSON instead of a table.
        model: The model and how it is trained.
        data: The records and how they become tokens.
        preference: The loss on pairs and its reference.
        train: Steps, optimizer and output.
    """

    stage: Literal["rw", "srpo"] = "rw"
    gpus: int = 1
    per_machine: int = 8
    card: str = "h100"
    memory: float | None = None
    rate: float | None = None
    network: float = NETWORK / 1e9
    tokens: int | None = None
    records: int | None = None
    json: bool = False
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    preference: PreferenceConfig = field(default_factory=PreferenceConfig)
    train: TrainConfig = field(default_factory=TrainConfig)

    def __post_init__(self) -> None:
        object.__setattr__(self, "card", self.card.lower())
        check_at_least(self, "--", 1, "gpus", "per_machine", "tokens", "records")
        check_numbers(self, "--", ("memory", "rate", "network"), lambda value: value > 0, "above 0")
        if self.records is not None and self.tokens is None:
            raise SaroError("--records needs --tokens, the length of a record; or leave both out to read data.train")
        if self.tokens is not None and self.tokens > self.data.pack_tokens:
            raise SaroError(
                f"--tokens is {self.tokens}, and a pack holds {self.data.pack_tokens}; raise --data.pack_tokens"
            )
        # Refuse what the recipe would refuse.
        if self.stage == "rw":
            if self.preference != PreferenceConfig():
                raise SaroError("--preference is for pairs, and the plan for RW; add --stage srpo, or leave it out")
            RWConfig(self.model, self.data, self.train)
        else:
            SRPOConfig(self.model, self.data, self.preference, self.train)


def run(options: Options, console: Console) -> int:
    """Predict a run: peak memory by part, the largest pack, time and disk, on one card, by DDP and by FSDP2.

    Raises:
        SaroError: for whatever the recipe would refuse, an unknown card, or records whose length is not known.
    """
    path, config, model = _read_config(options.model)
    is_cpu = options.card == "cpu"
    dtype = (
        decide_dtype(model.dtype, config, torch.device("cpu")) if is_cpu else model.dtype.replace("auto", "bfloat16")
    )
    setting = Setting(config, model, getattr(torch, dtype), not is_cpu, options.train.optimizer)
    records = _known_records(options) if options.tokens else _read_records(path, config, options)
    card = find_card(options.card, options.gpus, setting.dtype)
    if options.memory is not None:
        card = replace(card, memory=options.memory * 1e9)
    try:
        layouts = plan_layouts(
            setting,
            records,
            card,
            Ranks("none", options.gpus, options.per_machine),
            options.data.pack_tokens,
            rate=None if options.rate is None else options.rate * 1e12,
            network=options.network * 1e9,
        )
    except ValueError as error:
        raise SaroError(str(error)) from error
    if options.json:
        console.out(json.dumps(_as_json(options, card, records, layouts), indent=1), highlight=False)
    else:
        _show(options, setting, card, records, layouts, console)
    return 0


def _read_config(options: ModelConfig) -> tuple[str, PretrainedConfig, ModelConfig]:
    """Return the name of the base model, its config, and the options, in which a continued adapter's shape is filled in.

    Raises:
        SaroError: there is no config, or a model of its type cannot be trained.
    """
    options = replace(options, name=find_demo(options.name))
    adapter = find_adapter(options.name)
    path = options.name if adapter is None else adapter.base
    if Path(path).expanduser().is_dir():
        path = str(Path(path).expanduser())
    if adapter is not None:
        trained = json.loads((Path(adapter.folder).expanduser() / "adapter_config.json").read_text(encoding="utf-8"))
        targets = trained["target_modules"]
        options = replace(options, lora_rank=trained["r"], lora_targets=targets if isinstance(targets, list) else None)
    try:
        config = AutoConfig.from_pretrained(
            path, revision=options.revision, trust_remote_code=options.trust_remote_code
        )
        check_supported(config)
        if is_mixture(config) and _is_partly_dense(text_config(config)):
            raise ValueError(
                "some of its layers have no experts, and a plan needs layers that are alike; use saro doctor"
            )
    except (OSError, ValueError, StrictDataclassError) as error:
        raise SaroError(f"{options.name}: {first_line(error)}") from error
    check_method(config, options, is_shared=False)
    return path, config, options


def _is_partly_dense(config: PretrainedConfig) -> bool:
    """Return True if some layers of a mixture of experts have a dense MLP instead."""
    return bool(getattr(config, "mlp_only_layers", None)) or getattr(config, "decoder_sparse_step", 1) != 1


def _has_all_rows(preference: PreferenceConfig) -> bool:
    return bool(preference.nll_weight) or preference.is_length_normalized


def _kind(options: Options) -> str:
    """Return the kind of workload: the stage, or "kto" for labelled responses."""
    return "kto" if options.stage == "srpo" and options.preference.is_unpaired else options.stage


def _known_records(options: Options) -> Records:
    """Return records of one length, as the user gave it."""
    train = options.train
    total, most_tokens = train.max_steps, math.inf
    if options.records is not None:
        total = count_steps(train, -(-options.records // train.records_per_step))
        most_tokens = train.epochs * options.records * options.tokens
    kind = _kind(options)
    workload = Workload(kind, options.tokens, all_rows=_has_all_rows(options.preference))
    steps = [[options.tokens] * train.records_per_step]
    read_only = steps if kind == "kto" else ()
    return Records(workload, steps, total, options.records, read_only, most_tokens)


def _read_records(path: str, config: PretrainedConfig, options: Options) -> Records:
    """Encode the files of data.train, and sample the run's steps.

    Raises:
        SaroError: a file or the tokenizer is not there, or a record is wrong.
    """
    instead = "or give the average length of a record with --tokens"
    files = data_files(options.data.train, f"{options.stage}_train")
    for file in files:
        if not is_hub(file) and not Path(file).is_file():
            raise SaroError(f"data.train: {file} is not there; name another file, {instead}")
    model = options.model
    try:
        source = read_source(path, config, find_adapter(find_demo(model.name)), model)
    except SaroError as error:
        raise SaroError(f"{model.name}: its tokenizer is needed to read data.train; fetch it, {instead}") from error
    known = source.continue_chat(options.data)
    day = known.template_date
    chat = source.chat_format(known, date.fromisoformat(day) if day else date.today())
    kind = _kind(options)
    encode = {"rw": encode_files, "srpo": encode_pair_files, "kto": encode_unpaired_files}[kind]
    data = encode(files, chat, options.data, progress=not options.json)
    schedule = Schedule.of(data, options.data, options.train)
    total = schedule.num_steps(options.train)
    numbers = np.unique(np.linspace(0, total - 1, _SAMPLED_STEPS).astype(int)).tolist()
    pack_tokens = options.data.pack_tokens
    records = [schedule.records(n).tolist() for n in numbers]
    steps = [[tree.tokens for tree in data.trees(step, pack_tokens)] for step in records]
    read_only = []
    if isinstance(data, UnpairedSet):
        read_only = [[tree.tokens for tree in data.mismatched_trees(step, pack_tokens)] for step in records]
    share = 0.0 if isinstance(data, PairSet) else float(data.scored_tokens.sum() / data.lengths.sum())
    workload = Workload(kind, max(2, round(float(data.lengths.mean()))), share, _has_all_rows(options.preference))
    return Records(workload, steps, total, len(data), read_only)


def _as_json(options: Options, card: Card, records: Records, layouts: Sequence[Layout]) -> dict[str, Any]:
    return {
        "stage": options.stage,
        "card": {"name": options.card, **asdict(card)},
        "pack_tokens": options.data.pack_tokens,
        "records": records.number,
        "record_tokens": records.workload.record_tokens,
        "step_tokens": records.step_tokens,
        "total_steps": records.total_steps,
        "checkpoint_bytes": checkpoint_bytes(layouts[0].cost, options.train),
        "layouts": [
            asdict(layout)
            | {
                "peak": layout.cost.peak,
                "working": layout.cost.working,
                "fits": layout.fits,
                "run_seconds": layout.run_seconds,
            }
            | {"tokens_per_second": records.step_tokens / layout.step_seconds}
            for layout in layouts
        ],
    }


def _show(
    options: Options, setting: Setting, card: Card, records: Records, layouts: Sequence[Layout], console: Console
) -> None:
    """Print the table of layouts, and lines that say what it rests on."""
    cards = "1 process" if options.card == "cpu" else f"1 {options.card}"
    if options.gpus > 1:
        cards = f"{options.gpus} " + ("processes" if options.card == "cpu" else options.card)
    model, dtype = options.model, dtype_name(setting.dtype)
    table = Table(
        title=f"{options.stage.upper()} of {model.name}, {model.method}, {dtype}, "
        f"packs of {options.data.pack_tokens:,} tokens, {cards}"
    )
    table.add_column("on each of them", no_wrap=True)
    for layout in layouts:
        table.add_column(layout.name, justify="right", no_wrap=True)
    for name, cells in _rows(layouts, records):
        table.add_row(name, *cells)
    console.print(table)
    for line in _notes(options, setting, card, records, layouts):
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def _rows(layouts: Sequence[Layout], records: Records) -> list[tuple[str, list[str]]]:
    """Return the rows of the table: a name, and a cell for each layout. Parts of the memory that no layout needs have none."""
    costs = [layout.cost for layout in layouts]
    memory = {
        "weights": [cost.weights for cost in costs],
        "adapters": [cost.adapters for cost in costs],
        "gradients": [cost.gradients for cost in costs],
        "optimizer": [cost.optimizer for cost in costs],
        "activations": [cost.layers for cost in costs],
        "head": [cost.head for cost in costs],
        "backward beyond": [cost.working - cost.layers - cost.head - cost.gathered for cost in costs],
        "gathered": [cost.gathered for cost in costs],
        "freed and kept": [cost.gaps for cost in costs],
        "peak": [cost.peak for cost in costs],
    }
    return [
        *((f"{part}, GiB", [f"{n / _GIB:.2f}" for n in values]) for part, values in memory.items() if any(values)),
        ("fits", ["yes" if layout.fits else "no" for layout in layouts]),
        ("largest pack", [f"{layout.largest_pack:,}" if layout.largest_pack else "none" for layout in layouts]),
        ("layers recomputed", [str(layout.recomputed) for layout in layouts]),
        ("s/step", [f"{layout.step_seconds:.3g}" for layout in layouts]),
        ("tokens/s, all", [f"{records.step_tokens / layout.step_seconds:,.0f}" for layout in layouts]),
        ("waiting for ranks", [f"{layout.idle:.1%}" for layout in layouts]),
        ("run", [_describe_run(layout.run_seconds) for layout in layouts]),
    ]


def _describe_run(seconds: float | None) -> str:
    return "steps not known" if seconds is None else describe_time(seconds)


def _notes(options: Options, setting: Setting, card: Card, records: Records, layouts: Sequence[Layout]) -> list[str]:
    """Return lines that say what the plan rests on."""
    noun = "pairs" if records.workload.stage == "srpo" else "records"
    number = "" if records.number is None else f"{records.number:,} {noun}, "
    steps = "" if records.total_steps is None else f"{records.total_steps:,} steps, "
    tokens = "" if records.all_tokens is None else f"; {records.all_tokens:,.0f} in all"
    disk = checkpoint_bytes(layouts[0].cost, options.train)
    lines = [
        f"tensors can have {layouts[0].limit / _GIB:.1f} GiB of {card.memory / 1e9:.0f} GB",
        f"{number}{steps}{records.step_tokens:,.0f} tokens in a step{tokens}",
        f"checkpoints: up to {disk / 1e9:.2f} GB of disk ({options.train.keep_checkpoints} kept and one that is written)",
    ]
    if options.rate is not None:
        lines.append(f"rate: {options.rate:g} TFLOP/s, as given")
    elif card.is_gpu:
        lines.append(
            f"rate: {GPU_SHARE:.0%} of {card.operations / 1e12:,.0f} TFLOP/s ({card.source}), the share that was measured on an H100"
        )
    else:
        lines.append(
            f"rate: {CPU_SHARE:.0%} of {card.operations / 1e9:,.0f} GFLOP/s, that of a GEMM measured now; "
            "memory: what is free now. The C library keeps freed memory between the tensors: a share that was measured"
        )
    if options.rate is None and is_mixture(setting.config):
        lines.append("the share was measured on a dense model; products with experts may reach less")
    if len(layouts) > 1:
        lines.append("times of exchanges between cards are computed from bandwidths, and have not been measured")
    if options.train.optimizer != "adamw" and options.gpus > 1:
        lines.append(f"FSDP2 is left out: train.optimizer {options.train.optimizer} works on whole parameters")
    return lines
