"""Defines every option of the recipes: name, unit, default and check. --help is made from these docstrings."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from saro.errors import SaroError, nearest

# Stands for the demo model in model.name, and for the demo data in data.train and data.heldout.
DEMO = "demo"
# Value of preference.reference for the policy itself, as it is before the first step.
START = "start"
# Tags of the reasoning if neither an option nor the run that trained the model names others.
THINK_TAGS = ("<think>", "</think>")
KINDS = ("general", "safety")
PAIR_KINDS = ("op-cot", "pp-cot")
# Parts of a response that its tokens belong to, in the order of ``saro.data.tree.RowKind``.
PARTS = ("think", "answer", "stop")


def cannot_shard(optimizer: str) -> str:
    """Return the error for an optimizer that cannot work on parts of parameters."""
    return (
        f"train.optimizer {optimizer} works on whole parameters, of which ranks that share them hold parts; "
        "set --train.optimizer adamw, whose state is shared among the ranks too"
    )


def check_numbers(
    owner: object, prefix: str, names: Sequence[str], valid: Callable[[float], bool], requirement: str
) -> None:
    """Check the numbers of options. None is valid, infinity and NaN are not.

    Args:
        owner: dataclass of the options.
        prefix: what stands before a name as the user writes it, such as "--" or "train.".
        names: the options to check.
        valid: tells valid values.
        requirement: what they must be, in words.

    Raises:
        SaroError: one is not valid; it names the first.
    """
    for name in names:
        value = getattr(owner, name)
        if value is not None and not (math.isfinite(value) and valid(value)):
            raise SaroError(f"{prefix}{name} is {value}; it must be {requirement}")


def check_at_least(owner: object, prefix: str, minimum: int, *names: str) -> None:
    """Check that options are at least ``minimum``; see ``check_numbers``."""
    check_numbers(owner, prefix, names, lambda value: value >= minimum, f"at least {minimum}")


def _check_above_zero(owner: object, prefix: str, *names: str) -> None:
    check_numbers(owner, prefix, names, lambda value: value > 0, "above 0")


def _check_kinds(weights: dict[str, float], kinds: tuple[str, ...]) -> None:
    for kind in weights:
        if kind not in kinds:
            raise SaroError(f"data.weights: unknown kind {kind!r}{nearest(kind, kinds)}")


def _check_row_weights(weights: dict[str, float]) -> None:
    """Raise SaroError for a part that does not exist, and for weights that are negative or leave a record without any.

    A step of records without weight would have no loss.
    """
    valid = (*PARTS, *(f"{kind}/{part}" for kind in KINDS for part in PARTS))
    for name, weight in weights.items():
        if name not in valid:
            raise SaroError(f"data.row_weights: unknown part {name!r}{nearest(name, valid)}")
        if not (math.isfinite(weight) and weight >= 0):
            raise SaroError(f"data.row_weights: {name} is {weight}; it must be at least 0")
    for kind in KINDS:
        # Every record has an answer and a stop token, but not every one has reasoning.
        if not any(row_weight(weights, kind, part) for part in ("answer", "stop")):
            raise SaroError(
                f"data.row_weights: {kind} records have no weight on answer and stop, so some may have none at all; "
                f"leave them out with --data.weights {{{kind}: 0}} instead"
            )


def row_weight(weights: Mapping[str, float], kind: str, part: str) -> float:
    """Return the weight of a token in ``data.row_weights``: that of its kind of record and part, else of its part, else 1."""
    return weights.get(f"{kind}/{part}", weights.get(part, 1.0))


@dataclass(frozen=True)
class ModelConfig:
    """The model and how it is trained.

    Attributes:
        name: Folder or hub name of a causal LM, or folder of a LoRA adapter to continue training; "demo" is
            SmolLM2-135M-Instruct, downloaded once.
        revision: Branch, tag or commit of a hub model.
        method: full trains all weights; lora trains adapters; qlora trains adapters on a 4-bit base (NF4).
        dtype: Dtype that the base model computes in; auto is bfloat16 on a GPU, and on a CPU that measures, at the start, that
            it is at least 1.3 times as fast as float32; else float32. A resumed run keeps it.
        attention: sdpa runs anywhere; varlen needs CUDA and bfloat16; auto takes, where both run, the faster one for each
            pack.
        head: Implementation of the fused log-softmax; auto chooses one of the tiled ones, reference computes
            all logits at once.
        lora_rank: Rank r of a new adapter; default 16.
        lora_alpha: A new adapter is scaled by lora_alpha / lora_rank; default 32.
        lora_rslora: Scale a new adapter by lora_alpha / sqrt(lora_rank) instead (rsLoRA, arXiv 2312.03732); default false.
        lora_dropout: Dropout before the adapter, 0 to below 1; default 0, or the value of a continued adapter.
        lora_targets: Names of the linear layers that get a new adapter; default all but the LM head.
        fused_lora: Compute adapters with saro_kernels where that is exact up to rounding in dtype; if false, PEFT computes all
            of them, in float32.
        liger: Let liger-kernel compute norms, rotary embedding and gated MLP; default: on CUDA, where it is installed and
            knows the model's type.
        dropout: Use the dropout that the model's own config sets; if false, the model has none.
        gradient_checkpointing: Recompute activations in the backward pass; saves memory, takes about a third more time. true
            recomputes all layers, a number only that many; auto recomputes as few as the largest pack of the run needs to fit
            into the GPU's memory.
        activation_offloading: Keep the inputs of recomputed layers in the host's memory instead of the GPU's. They are copied
            while the GPU computes.
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
    lora_rslora: bool | None = None
    lora_dropout: float | None = None
    lora_targets: list[str] | None = None
    fused_lora: bool = True
    liger: bool | None = None
    dropout: bool = False
    gradient_checkpointing: Literal["auto"] | bool | int = False
    activation_offloading: bool = False
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        check_at_least(self, "model.", 1, "lora_rank")
        _check_above_zero(self, "model.", "lora_alpha")
        check_numbers(self, "model.", ("lora_dropout",), lambda value: 0 <= value < 1, "at least 0 and below 1")
        if self.gradient_checkpointing != "auto":
            check_at_least(self, "model.", 0, "gradient_checkpointing")
        if self.activation_offloading and not self.gradient_checkpointing:
            raise SaroError(
                "model.activation_offloading is for the inputs of recomputed layers, and none is recomputed; "
                "set --model.gradient_checkpointing true, or leave it out"
            )


@dataclass(frozen=True)
class DataConfig:
    """The records and how they become tokens.

    Attributes:
        train: File or files to train on: JSONL, Parquet (*.parquet), or splits of hub data sets, such as
            hf://ORG/NAME@REVISION/CONFIG:SPLIT; "demo" is the data that comes with the project.
        heldout: File or files, as for train, to evaluate on, never trained on; [] for none. The default is "demo" if train is
            "demo", and none for files of your own.
        train_on: For RW: last trains on the last assistant turn of a conversation, all on each of them, after the prompt that
            the model reads before that turn. Each turn then counts as a record. The turns of a conversation share a
            tree, in which what they have in common is computed once.
        allow_overlap: Allow held-out records whose prompts are also in the training records.
        pack_tokens: Maximum number of tokens in one forward pass; no sequence may be longer.
        too_long: error stops at a record of more than pack_tokens tokens, drop leaves it out; nothing is ever cut.
        equal_sides: For SRPO: error stops at a pair whose two sides are the same, drop leaves it out; the number is printed.
        weights: How often an epoch draws each record, by kind; default 1. For example {general: 1, safety: 2} for RW or
            {op-cot: 1, pp-cot: 2} for SRPO.
        row_weights: For RW: how much a token counts in the loss, by the part that it belongs to (think, answer, stop), or
            by kind and part; default 1. For example {answer: 2, safety/think: 0.5}. The loss is the weighted mean over
            the step; the metric loss is this mean in training, and loss/unweighted is the plain one. Held-out metrics
            have no weights.
        group_by_prompt: For SRPO: draw pairs on the same prompt next to each other. Those in one step then form one
            tree, whose prompt is computed once.
        think_tags: Opening and closing tag of the reasoning; default those of the run that trained the model, else
            <think> and </think>.
        chat_template: File with a Jinja chat template that replaces the model's own.
        template_date: Date that strftime_now gives to templates, YYYY-MM-DD; default that of the run that trained the model,
            else the day on which the run starts. A template that reads date_string has it from template_variables.
        template_variables: More variables for the template, such as {enable_thinking: true}; default those of the run
            that trained the model, else none.
    """

    train: list[str] | str = field(default_factory=lambda: [DEMO])
    heldout: list[str] | str | None = None
    train_on: Literal["last", "all"] = "last"
    allow_overlap: bool = False
    pack_tokens: int = 2048
    too_long: Literal["error", "drop"] = "error"
    equal_sides: Literal["error", "drop"] = "error"
    weights: dict[str, float] = field(default_factory=dict)
    row_weights: dict[str, float] = field(default_factory=dict)
    group_by_prompt: bool = True
    think_tags: tuple[str, str] | None = None
    chat_template: str | None = None
    template_date: str | None = None
    template_variables: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        check_at_least(self, "data.", 2, "pack_tokens")
        for name in ("train", "heldout"):
            if isinstance(getattr(self, name), str):
                object.__setattr__(self, name, [getattr(self, name)])
        if not self.train:
            raise SaroError("data.train names no file; give one or more")
        for kind, weight in self.weights.items():
            if not (math.isfinite(weight) and weight >= 0):
                raise SaroError(f"data.weights: {kind} is {weight}; it must be at least 0, and finite")
        _check_row_weights(self.row_weights)
        if self.think_tags is not None and (not all(self.think_tags) or self.think_tags[0] == self.think_tags[1]):
            raise SaroError("data.think_tags must be two different tags")


def _check_read(model: ModelConfig, train: TrainConfig) -> None:
    """Raise SaroError for an option that is given and that nothing would read."""
    if model.method == "full":
        for name in ("lora_rank", "lora_alpha", "lora_rslora", "lora_dropout", "lora_targets"):
            if getattr(model, name) is not None:
                raise SaroError(f"model.{name} is for adapters, and --model.method is full; leave it out")
    if not train.trackers:
        for name in ("run_name", "track_samples"):
            if getattr(train, name):
                raise SaroError(f"train.{name} is for trackers, and there are none; name one with --train.trackers")


def _check_keep_best(data: DataConfig, train: TrainConfig) -> None:
    if train.keep_best is not None and not data.heldout:
        raise SaroError("train.keep_best needs held-out records; name a file with --data.heldout")


def _with_heldout(data: DataConfig) -> DataConfig:
    """Return the options of a run, in which ``heldout`` has its default if none was given.

    ``DataConfig`` itself cannot do this: its own default would be that of the command line, whatever ``train`` is.
    """
    if data.heldout is not None:
        return data
    # The demo's records would say nothing about a run on other data.
    return replace(data, heldout=[DEMO] if data.train == [DEMO] else [])


@dataclass(frozen=True)
class TrainConfig:
    """Steps, optimizer and output.

    Attributes:
        output: Folder of the run: config, metrics, checkpoints and the final model.
        epochs: Passes over the training records.
        max_steps: Stop after this many optimizer steps, even if epochs asks for more. A resumed run may change both; the
            learning rate then follows the schedule over the new number of steps.
        records_per_step: Most records in one optimizer step, over all ranks. An epoch is spread evenly over its steps: 17
            records at 16 become 8 and 9.
        shard: How the ranks of a run with several processes hold the model: none, each all of it; full, each a part of
            every weight, gradient and optimizer state (FSDP2); hybrid, each machine all of it and its ranks a part each.
        optimizer: adamw is torch's fused AdamW; adamw8bit and paged_adamw8bit are from bitsandbytes.
        lr: Peak learning rate.
        schedule: Shape of the learning rate after the warm-up.
        min_lr: Learning rate at which linear and cosine end, at most lr.
        warmup: Share of the steps over which the learning rate rises to lr.
        warmup_steps: Number of steps over which it rises, in place of warmup.
        weight_decay: Weight decay of AdamW, on matrices only.
        betas: Betas of AdamW.
        max_grad_norm: Clip the gradient to this norm; 0 turns clipping off.
        seed: Seed for shuffling, adapter init and dropout.
        eval_every: Steps between evaluations on the held-out records; 0 evaluates only at the start and the end.
        keep_best: Held-out metric, such as eval/loss, by which final/ gets the weights of the best evaluation instead of the
            last step. The last step is then evaluated too.
        patience: Stop once this many evaluations, one after the other, were not better than the best by keep_best.
        save_every: Steps between checkpoints; 0 saves only at the end.
        keep_checkpoints: Number of newest checkpoints to keep.
        log_every: Steps between log lines. Evaluations, checkpoints and the end of the run have a line too, so that the lines
            cover all steps.
        samples: Number of held-out prompts to answer before and after training, for the table at the end.
        sample_tokens: Maximum length of these answers, in tokens.
        trackers: Also report to these trackers, such as tensorboard or wandb. A resumed run continues its run in W&B.
        run_name: Name of the run in trackers; default the name of the output folder.
        track_samples: Send the prompts and answers of samples to the trackers too.
    """

    output: str = "output/rw"
    epochs: float = 1.0
    max_steps: int | None = None
    records_per_step: int = 16
    shard: Literal["none", "full", "hybrid"] = "none"
    optimizer: Literal["adamw", "adamw8bit", "paged_adamw8bit"] = "adamw"
    lr: float = 2e-4
    schedule: Literal["linear", "cosine", "constant"] = "cosine"
    min_lr: float = 0.0
    warmup: float = 0.05
    warmup_steps: int | None = None
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    max_grad_norm: float = 1.0
    seed: int = 0
    eval_every: int = 0
    keep_best: str | None = None
    patience: int | None = None
    save_every: int = 100
    keep_checkpoints: int = 2
    log_every: int = 1
    samples: int = 4
    sample_tokens: int = 96
    trackers: list[str] = field(default_factory=list)
    run_name: str | None = None
    track_samples: bool = False

    def __post_init__(self) -> None:
        _check_above_zero(self, "train.", "epochs", "lr")
        check_at_least(
            self,
            "train.",
            1,
            "max_steps",
            "records_per_step",
            "keep_checkpoints",
            "log_every",
            "sample_tokens",
            "patience",
        )
        if self.keep_best is not None and not self.eval_every:
            raise SaroError("train.keep_best compares evaluations; set --train.eval_every")
        if self.patience is not None and self.keep_best is None:
            raise SaroError("train.patience counts evaluations without a better train.keep_best; set --train.keep_best")
        at_least_0 = ("weight_decay", "max_grad_norm", "seed", "eval_every", "save_every", "samples", "warmup_steps")
        check_at_least(self, "train.", 0, *at_least_0)
        check_numbers(self, "train.", ("min_lr",), lambda value: 0 <= value <= self.lr, f"0 to train.lr ({self.lr})")
        if self.min_lr and self.schedule == "constant":
            raise SaroError("train.min_lr is where linear and cosine end; leave it out with --train.schedule constant")
        if self.shard != "none" and self.optimizer != "adamw":
            raise SaroError(cannot_shard(self.optimizer))
        if not all(0 <= beta < 1 for beta in self.betas):
            raise SaroError(f"train.betas are {list(self.betas)}; both must be at least 0 and below 1")
        check_numbers(self, "train.", ("warmup",), lambda value: 0 <= value <= 1, "a share of the steps, 0 to 1")


@dataclass(frozen=True)
class RWConfig:
    """Options of stage 1, Reasoning-style Warmup.

    Attributes:
        model: The model and how it is trained.
        data: The records and how they become tokens.
        train: Steps, optimizer and output.
    """

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)

    def __post_init__(self) -> None:
        _check_kinds(self.data.weights, KINDS)
        _check_read(self.model, self.train)
        object.__setattr__(self, "data", _with_heldout(self.data))
        _check_keep_best(self.data, self.train)


@dataclass(frozen=True)
class PreferenceConfig:
    """The loss on pairs, or on unpaired records, and its reference.

    Attributes:
        loss: sigmoid is DPO (cDPO with label_smoothing); robust, hinge and ipo are named as in their papers and TRL. simpo
            and orpo need no reference, and divide log-probs by the number of tokens. kto takes unpaired records (prompt,
            completion, label) or pairs, of which each side is then a record.
        beta: Strength of the pull towards the reference; tau in ipo, lambda in orpo. In simpo it scales the reward; the paper
            takes 2 or more.
        gamma: Target reward margin of simpo; default 0.5, as in TRL.
        label_smoothing: Share of labels assumed to be wrong, for sigmoid, robust and simpo; 0 to below 0.5.
        desirable_weight: Weight of desirable records in kto, lambda_D; default 1.
        undesirable_weight: Weight of undesirable records in kto, lambda_U; default 1.
        nll: Weight of the chosen responses' negative log-likelihood per token, added to the loss (RPO). With scored
            divergent it is that of the tokens after the two responses diverge, which the forms recover, mirror and sibling
            need: they begin with steps that should not be learned. orpo has this term, with weight 1, in any case.
        length_normalize: Divide log-probs by the number of tokens first; with ipo this is TRL's form.
        scored: all scores every token of the responses; divergent scores only those after the two responses diverge.
            The margins are the same.
        reference: start is the model before the first step; otherwise folder or hub name of another model.
        warn_chosen_fell: Warn once when the chosen log-prob falls in more than this share of the pairs; off with scored
            divergent, which does not score whole responses, and for losses without a reference.
    """

    loss: Literal["sigmoid", "robust", "hinge", "ipo", "simpo", "orpo", "kto"] = "sigmoid"
    beta: float = 0.1
    gamma: float = 0.5
    label_smoothing: float = 0.0
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0
    nll: float = 0.0
    length_normalize: bool = False
    scored: Literal["all", "divergent"] = "all"
    reference: str = START
    warn_chosen_fell: float = 0.5

    def __post_init__(self) -> None:
        _check_above_zero(self, "preference.", "beta", "desirable_weight", "undesirable_weight")
        check_at_least(self, "preference.", 0, "nll", "gamma")
        check_numbers(
            self, "preference.", ("label_smoothing",), lambda value: 0 <= value < 0.5, "at least 0 and below 0.5"
        )
        check_numbers(
            self, "preference.", ("warn_chosen_fell",), lambda value: 0 <= value <= 1, "a share of the pairs, 0 to 1"
        )
        if self.label_smoothing and self.loss not in ("sigmoid", "robust", "simpo"):
            raise SaroError(
                f"preference.label_smoothing is for sigmoid, robust and simpo, not for {self.loss}; set it to 0"
            )
        if self.scored == "divergent" and self.length_normalize:
            raise SaroError("preference.scored divergent skips rows that length_normalize needs; set one of the two")
        if self.scored == "divergent" and (self.is_length_normalized or self.is_unpaired):
            raise SaroError(f"preference.scored divergent skips rows that {self.loss} needs; leave it at all")
        if not self.reference:
            raise SaroError("preference.reference is empty; give start, or the folder of a model")
        if self.reference != START and not self.needs_reference:
            raise SaroError(f"preference.loss {self.loss} has no reference; leave out --preference.reference")
        if self.loss == "orpo" and self.nll:
            raise SaroError(
                "preference.loss orpo has the NLL with weight 1; leave out --preference.nll, and change beta"
            )
        if self.is_unpaired and (self.nll or self.length_normalize):
            name = "nll" if self.nll else "length_normalize"
            raise SaroError(f"preference.{name} is for losses on pairs, not for kto; leave it out")
        for name, loss in (("gamma", "simpo"), ("desirable_weight", "kto"), ("undesirable_weight", "kto")):
            if self.loss != loss and getattr(self, name) != getattr(type(self), name):
                raise SaroError(f"preference.{name} is for {loss}, not for {self.loss}; leave it out")

    @property
    def needs_reference(self) -> bool:
        """True if the loss compares the policy with a reference."""
        return self.loss not in ("simpo", "orpo")

    @property
    def nll_weight(self) -> float:
        """Weight of the chosen responses' negative log-likelihood in the loss."""
        return 1.0 if self.loss == "orpo" else self.nll

    @property
    def is_length_normalized(self) -> bool:
        """True if the loss takes the mean of a response's log-probs, not their sum."""
        return self.length_normalize or self.loss in ("simpo", "orpo")

    @property
    def is_unpaired(self) -> bool:
        """True if the loss takes single responses with a label, not pairs."""
        return self.loss == "kto"


@dataclass(frozen=True)
class SRPOConfig:
    """Options of stage 2, Safety-oriented Reasoning Process Optimization.

    Attributes:
        model: The model and how it is trained; an adapter from stage 1 is trained further.
        data: The pairs and how they become tokens.
        preference: The loss on pairs and its reference.
        train: Steps, optimizer and output.
    """

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    preference: PreferenceConfig = field(default_factory=PreferenceConfig)
    train: TrainConfig = field(default_factory=lambda: TrainConfig(output="output/srpo", lr=5e-5))

    def __post_init__(self) -> None:
        _check_kinds(self.data.weights, PAIR_KINDS)
        _check_read(self.model, self.train)
        if self.data.row_weights:
            raise SaroError("data.row_weights is for RW; weigh kinds of pairs with --data.weights")
        if self.data.train_on != "last":
            raise SaroError("data.train_on is for RW; a pair differs only in its last turn")
        object.__setattr__(self, "data", _with_heldout(self.data))
        _check_keep_best(self.data, self.train)


def as_dict(config: object) -> dict[str, Any]:
    """Return a config as plain nested dicts and lists, fit for JSON and YAML."""
    values: dict[str, Any] = {}
    for option in dataclasses.fields(config):
        value = getattr(config, option.name)
        if dataclasses.is_dataclass(value):
            value = as_dict(value)
        elif isinstance(value, tuple):
            value = list(value)
        values[option.name] = value
    return values
