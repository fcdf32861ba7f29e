"""Every option of the recipes: name, unit, default and check. jsonargparse reads the docstrings for --help."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from saro.errors import SaroError, nearest

DEMO = "demo"
# The reference that is the policy at step 0.
START = "start"
KINDS = ("general", "safety")
PAIR_KINDS = ("op-cot", "pp-cot")


def _check(owner: object, group: str, names: tuple[str, ...], valid: Callable[[float], bool], must: str) -> None:
    for name in names:
        value = getattr(owner, name)
        if value is not None and not (math.isfinite(value) and valid(value)):
            raise SaroError(f"{group}.{name} is {value}; it must be {must}")


def _at_least(owner: object, group: str, minimum: int, *names: str) -> None:
    _check(owner, group, names, lambda value: value >= minimum, f"at least {minimum}")


def _check_kinds(weights: dict[str, float], kinds: tuple[str, ...]) -> None:
    for kind in weights:
        if kind not in kinds:
            raise SaroError(f"data.weights: unknown kind {kind!r}{nearest(kind, kinds)}")


def _above_zero(owner: object, group: str, *names: str) -> None:
    _check(owner, group, names, lambda value: value > 0, "above 0")


@dataclass(frozen=True)
class ModelConfig:
    """The model and how it is trained.

    Attributes:
        name: Folder or hub name of a causal LM, or folder of a LoRA adapter to go on with; "demo" is
            SmolLM2-135M-Instruct, fetched once.
        revision: Branch, tag or commit of a hub model.
        method: full trains all weights; lora trains adapters; qlora trains adapters on a base in 4 bits (NF4).
        dtype: Precision of the base model's products; auto is bfloat16 on a GPU and float32 on a CPU.
        attention: sdpa runs anywhere; varlen is for CUDA; auto chooses.
        head: Implementation of the fused log-softmax; auto chooses between the tiled ones, reference makes whole logits.
        lora_rank: Rank r of a new adapter; 16 where not given.
        lora_alpha: A new adapter is scaled by lora_alpha / lora_rank; 32 where not given.
        lora_dropout: Dropout before the adapter, 0 to 1; 0, or that of the adapter that goes on, where not given.
        lora_targets: Names of the linear layers with a new adapter; all but the LM head where not given.
        fused_lora: Compute adapters with saro_kernels where that is exact; false leaves them to PEFT.
        liger: Let liger-kernel compute norms, rotary embedding and gated MLP; for CUDA, where it is installed.
        dropout: Keep the dropout that the model's own config asks for; off otherwise.
        gradient_checkpointing: Recompute activations in the backward pass: less memory, about a third more time.
        trust_remote_code: Run code that comes with the model.
    """

    name: str = DEMO
    revision: str | None = None
    method: Literal["full", "lora", "qlora"] = "qlora"
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    attention: Literal["auto", "sdpa", "varlen"] = "auto"
    head: Literal["auto", "tiled", "tiled-torch", "tiled-triton", "reference"] = "auto"
    lora_rank: int | None = None
    lora_alpha: float | None = None
    lora_dropout: float | None = None
    lora_targets: list[str] | None = None
    fused_lora: bool = True
    liger: bool = False
    dropout: bool = False
    gradient_checkpointing: bool = False
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        _at_least(self, "model", 1, "lora_rank")
        _above_zero(self, "model", "lora_alpha")
        _check(self, "model", ("lora_dropout",), lambda value: 0 <= value < 1, "at least 0 and below 1")


@dataclass(frozen=True)
class DataConfig:
    """The records and how they become tokens.

    Attributes:
        train: JSONL file or files to train on; "demo" is the data that comes with the project.
        heldout: JSONL file or files to evaluate on, never trained on; [] for none.
        pack_tokens: Tokens of one forward pass; no sequence may be longer.
        too_long: What to do with a record of more than pack_tokens tokens; nothing is ever cut.
        weights: Draws of each record in an epoch by kind, such as {general: 1, safety: 2}; 1 where not given.
        group_by_prompt: Draw the pairs on one prompt next to each other, so that those of one step are read as one tree,
            the prompt once; for SRPO.
        think_tags: Opening and closing tag of the reasoning.
        chat_template: File with a Jinja chat template, in place of the model's own.
        template_date: Day that templates see as today, YYYY-MM-DD; the day on which the run starts where not given.
        template_variables: Further variables for the template, such as {enable_thinking: true}.
    """

    train: list[str] | str = field(default_factory=lambda: [DEMO])
    heldout: list[str] | str = field(default_factory=lambda: [DEMO])
    pack_tokens: int = 2048
    too_long: Literal["error", "drop"] = "error"
    weights: dict[str, float] = field(default_factory=dict)
    group_by_prompt: bool = True
    think_tags: tuple[str, str] = ("<think>", "</think>")
    chat_template: str | None = None
    template_date: str | None = None
    template_variables: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _at_least(self, "data", 2, "pack_tokens")
        for name in ("train", "heldout"):
            if isinstance(getattr(self, name), str):
                object.__setattr__(self, name, [getattr(self, name)])
        if not self.train:
            raise SaroError("data.train names no file")
        for kind, weight in self.weights.items():
            if weight < 0:
                raise SaroError(f"data.weights: {kind} is {weight}; it must be at least 0")
        if not all(self.think_tags) or self.think_tags[0] == self.think_tags[1]:
            raise SaroError("data.think_tags must be two different tags")


@dataclass(frozen=True)
class TrainConfig:
    """Steps, optimizer, and what is written.

    Attributes:
        output: Folder of the run: config, metrics, checkpoints and the final model.
        epochs: Passes over the training records.
        max_steps: End after so many optimizer steps, whatever the epochs say.
        records_per_step: Records of one optimizer step, over all processes.
        optimizer: adamw is torch's, fused; the 8-bit ones are bitsandbytes'.
        lr: Peak learning rate.
        schedule: Course of the learning rate after the warm-up.
        warmup: Share of the steps over which the learning rate rises from 0.
        weight_decay: AdamW's, on matrices only.
        betas: AdamW's.
        max_grad_norm: The gradient is scaled down to this norm; 0 turns that off.
        seed: Of the shuffle, the adapters and dropout.
        eval_every: Steps between evaluations on the held-out records; 0 for only at the start and the end.
        save_every: Steps between checkpoints; 0 for only at the end.
        keep_checkpoints: How many of the newest checkpoints are kept.
        log_every: Steps between log lines.
        samples: Held-out prompts to answer before and after training, for the table at the end.
        sample_tokens: Longest answer to them, in tokens.
        trackers: Also report to these, such as tensorboard or wandb.
    """

    output: str = "output/rw"
    epochs: float = 1.0
    max_steps: int | None = None
    records_per_step: int = 16
    optimizer: Literal["adamw", "adamw8bit", "paged_adamw8bit"] = "adamw"
    lr: float = 2e-4
    schedule: Literal["linear", "cosine", "constant"] = "cosine"
    warmup: float = 0.05
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    max_grad_norm: float = 1.0
    seed: int = 0
    eval_every: int = 0
    save_every: int = 100
    keep_checkpoints: int = 2
    log_every: int = 1
    samples: int = 4
    sample_tokens: int = 96
    trackers: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        _above_zero(self, "train", "epochs", "lr")
        _at_least(self, "train", 1, "max_steps", "records_per_step", "keep_checkpoints", "log_every", "sample_tokens")
        _at_least(self, "train", 0, "weight_decay", "max_grad_norm", "seed", "eval_every", "save_every", "samples")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise SaroError(f"train.betas are {list(self.betas)}; both must be at least 0 and below 1")
        _check(self, "train", ("warmup",), lambda value: 0 <= value <= 1, "a share of the steps, 0 to 1")


@dataclass(frozen=True)
class RWConfig:
    """Options of stage 1, Reasoning-style Warmup.

    Attributes:
        model: The model and how it is trained.
        data: The records and how they become tokens.
        train: Steps, optimizer, and what is written.
    """

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)

    def __post_init__(self) -> None:
        _check_kinds(self.data.weights, KINDS)


@dataclass(frozen=True)
class PreferenceConfig:
    """The loss over pairs, and its reference.

    Attributes:
        loss: sigmoid is DPO (with label_smoothing cDPO), robust, hinge and ipo are named as in their papers and in TRL.
        beta: Strength of the pull to the reference; tau of ipo.
        label_smoothing: Share of the labels that is held to be wrong, for sigmoid and robust; 0 to below 0.5.
        nll: Weight of the chosen responses' negative log-likelihood per token, added to the loss (RPO).
        length_normalize: Divide log-probs by the number of tokens first; with ipo this is TRL's form.
        scored: all tokens of the responses, or divergent, only those after the two responses part. Same margins.
        reference: start is the model as it is before the first step; else folder or hub name of another model.
        warn_chosen_fell: Warn once when the chosen log-prob falls in more than this share of the pairs; not where only
            divergent tokens are scored, which do not tell.
    """

    loss: Literal["sigmoid", "robust", "hinge", "ipo"] = "sigmoid"
    beta: float = 0.1
    label_smoothing: float = 0.0
    nll: float = 0.0
    length_normalize: bool = False
    scored: Literal["all", "divergent"] = "all"
    reference: str = START
    warn_chosen_fell: float = 0.5

    def __post_init__(self) -> None:
        _above_zero(self, "preference", "beta")
        _at_least(self, "preference", 0, "nll")
        _check(self, "preference", ("label_smoothing",), lambda value: 0 <= value < 0.5, "at least 0 and below 0.5")
        _check(self, "preference", ("warn_chosen_fell",), lambda value: 0 <= value <= 1, "a share of the pairs, 0 to 1")
        if self.label_smoothing and self.loss not in ("sigmoid", "robust"):
            raise SaroError(f"preference.label_smoothing is for sigmoid and robust, not for {self.loss}; set it to 0")
        if self.scored == "divergent":
            for name in ("nll", "length_normalize"):
                if getattr(self, name):
                    raise SaroError(f"preference.scored divergent skips rows that {name} needs; set one of the two")
        if not self.reference:
            raise SaroError("preference.reference is empty; give start, or the folder of a model")


@dataclass(frozen=True)
class SRPOConfig:
    """Options of stage 2, Safety-oriented Reasoning Process Optimization.

    Attributes:
        model: The model and how it is trained; an adapter that stage 1 trained goes on.
        data: The pairs and how they become tokens.
        preference: The loss over pairs, and its reference.
        train: Steps, optimizer, and what is written.
    """

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    preference: PreferenceConfig = field(default_factory=PreferenceConfig)
    train: TrainConfig = field(default_factory=lambda: TrainConfig(output="output/srpo", lr=5e-5))

    def __post_init__(self) -> None:
        _check_kinds(self.data.weights, PAIR_KINDS)


def as_dict(config: object) -> dict[str, Any]:
    """A config as plain nested dicts and lists, fit for JSON and YAML."""
    return {
        k: as_dict(v) if dataclasses.is_dataclass(v) else list(v) if isinstance(v, tuple) else v
        for k, v in ((f.name, getattr(config, f.name)) for f in dataclasses.fields(config))
    }
