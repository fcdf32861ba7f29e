"""Every option of the tools, `saro export` and others: name, unit, default and check, as in `saro/config.py`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from saro.config import DEMO
from saro.errors import SaroError


@dataclass(frozen=True)
class ExportConfig:
    """Options of `saro export`: what to write, and where.

    Attributes:
        merge: Merge the adapter into its base: a plain model for programs that know nothing of adapters.
        into: What a QLoRA adapter is merged into: dequantized (default), the weights that it was trained on, or
            original, those of the base model before it was quantized. Other runs trained on the original ones.
        allow_shift: Write a merge --into original however far it is from what was trained.
        dtype: Of the weights of a merged or full model; auto is the base model's own.
        output: Folder to write; RUN/export where not given.
        overwrite: Replace the export that is there.
        data: JSONL file or files to verify with; the run's held-out records, or else its training records, where not
            given.
        records: How many records are scored to verify it.
    """

    merge: bool = False
    into: Literal["dequantized", "original"] | None = None
    allow_shift: bool = False
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    output: str | None = None
    overwrite: bool = False
    data: list[str] | str | None = None
    records: int = 16

    def __post_init__(self) -> None:
        if self.allow_shift and self.into != "original":
            raise SaroError("--allow-shift goes with --into original: only there a shift is to be expected")
        if self.records < 1:
            raise SaroError(f"--records is {self.records}; it must be at least 1")


@dataclass(frozen=True)
class ChatConfig:
    """Options of `saro chat`.

    Attributes:
        compare: base lets the model before training answer too, before the trained one; each keeps its own history.
        max_tokens: Longest answer, reasoning included.
        temperature: 0 takes the likeliest token each time; above 0 tokens are drawn.
        think_tags: Opening and closing tag of the reasoning; those of the run where not given.
    """

    compare: Literal["base"] | None = None
    max_tokens: int = 2048
    temperature: float = 0.0
    think_tags: tuple[str, str] | None = None

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise SaroError(f"--max-tokens is {self.max_tokens}; it must be at least 1")
        if not 0 <= self.temperature < float("inf"):
            raise SaroError(f"--temperature is {self.temperature}; it must be at least 0")


@dataclass(frozen=True)
class CompareConfig:
    """Options of `saro compare`.

    Attributes:
        models: Folders or hub names of models, or folders of adapters such as RUN/final, one column each.
        names: Their names in the table; the models' own where not given.
        method: How they are loaded: qlora in 4 bits (NF4), lora and full in the compute dtype; where not given, as the
            first run among them was trained, or else lora.
        examples: JSONL file or files of examples (RW) for the loss; "demo" is the held-out demo data.
        pairs: JSONL file or files of pairs (SRPO) for the preferences; "demo" is the held-out demo data.
        show: Ids of records whose prompts and answers are shown.
        prompts: How many prompts are answered, those shown among them, in one batch.
        max_tokens: Longest answer.
        pack_tokens: Tokens of one forward pass; no record may be longer.
        template_date: Day that templates see as today, YYYY-MM-DD; that of the first run among them, or else today, where
            not given. The tags of the reasoning and the template's variables are those of that run too.
    """

    models: list[str] = field(default_factory=lambda: [DEMO])
    names: list[str] = field(default_factory=list)
    method: Literal["full", "lora", "qlora"] | None = None
    examples: list[str] | str = field(default_factory=lambda: [DEMO])
    pairs: list[str] | str = field(default_factory=lambda: [DEMO])
    show: list[str] = field(default_factory=list)
    prompts: int = 4
    max_tokens: int = 96
    pack_tokens: int = 2048
    template_date: str | None = None

    def __post_init__(self) -> None:
        for name in ("prompts", "max_tokens", "pack_tokens"):
            if getattr(self, name) < (0 if name == "prompts" else 1):
                raise SaroError(f"--{name.replace('_', '-')} is {getattr(self, name)}; it is too small")


@dataclass(frozen=True)
class DoctorConfig:
    """Options of `saro doctor`: the model to check, and how it would be trained.

    Attributes:
        model: Folder or hub name of a causal LM, or folder of a LoRA adapter; "demo" is SmolLM2-135M-Instruct.
        method: full trains all weights; lora trains adapters; qlora trains adapters on a base in 4 bits (NF4).
        dtype: Precision of the base model's products; auto is bfloat16 on a GPU and float32 on a CPU.
        attention: sdpa runs anywhere; varlen is for CUDA; auto chooses.
        liger: Let liger-kernel compute norms, rotary embedding and gated MLP; for CUDA, where it is installed.
        pack_tokens: Tokens of one forward pass; memory is measured on a sixteenth and a quarter of it.
        json: File to write the findings to as well.
    """

    model: str = DEMO
    method: Literal["full", "lora", "qlora"] = "qlora"
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    attention: Literal["auto", "sdpa", "varlen"] = "auto"
    liger: bool = False
    pack_tokens: int = 2048
    json: str | None = None

    def __post_init__(self) -> None:
        if self.pack_tokens < 256:
            raise SaroError(f"--pack-tokens is {self.pack_tokens}; it must be at least 256")
