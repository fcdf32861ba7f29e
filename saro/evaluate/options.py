"""Defines the options of `saro evaluate` and of recipes/evaluate.py: name, unit, default and check."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from saro.config import DEMO, DataConfig, check_at_least
from saro.errors import SaroError
from saro.program import short, shown


@dataclass(frozen=True)
class LoadOptions:
    """How the models under test are loaded.

    Attributes:
        method: qlora answers with the base in 4 bits (NF4), as a QLoRA run trained it; default: as the run of the model
            says, and for a model without a run as the first run among the models.
        dtype: Dtype that the models compute in; auto is bfloat16 on a GPU, and on a CPU float32 to score texts and, if the CPU
            is fast in it, bfloat16 to write them.
        merge: Merge an adapter into its base before it generates: faster, and equal up to rounding.
        batch: How many prompts a local model answers at the same time, fewer if memory has room for fewer; default 256 on a GPU, 64
            on a CPU.
        trust_remote_code: Run code that comes with a model.
    """

    method: Literal["lora", "qlora"] | None = None
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    merge: bool = True
    batch: int | None = None
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        check_at_least(self, "load.", 1, "batch")


@dataclass(frozen=True)
class ServerOptions:
    """How servers are asked that are among --models.

    Attributes:
        key_env: Environment variable that holds the key of the server.
        revision: A label of yours for the version of the server's model: another label draws again.
        tokenizer: Folder or hub name of the model's tokenizer; needed for attacks that prefill.
        concurrency: How many requests are under way at the same time.
        timeout: Seconds until a request without a reply is sent again.
    """

    key_env: str = "SARO_API_KEY"
    revision: str | None = None
    tokenizer: str | None = None
    concurrency: int = 8
    timeout: float = 120.0


@dataclass(frozen=True)
class JudgeOptions:
    """Who judges.

    Attributes:
        name: rules, a judge that comes with saro, or the YAML file of one. The rules always judge as well.
        model: Folder or hub name of the judge's model; default: as its file says.
        endpoint: URL of an OpenAI-compatible server that runs the judge's model.
        key_env: Environment variable that holds the key of the server.
        revision: A label of yours for the version of the server's model.
        gold: File that `saro judge-check` wrote: how far the judge agrees with people.
    """

    name: str = "rules"
    model: str | None = None
    endpoint: str | None = None
    key_env: str = "SARO_API_KEY"
    revision: str | None = None
    gold: str | None = None


@dataclass(frozen=True)
class Options:
    """Options of an evaluation.

    Attributes:
        models: Models to compare; the first is the baseline. Each is a run's folder, a folder or hub name of a model or
            adapter, "demo", or a server as URL#MODEL.
        names: Names of the models in tables, one for each; default: from --models.
        suites: JSONL files of prompts (`saro convert` makes them from public sets); "demo" is the suites that come with
            saro.
        attacks: YAML files of attacks, or names of those that come with saro (prefill, rewrites); the plain prompts are
            always asked.
        attack_items: Ask the attacks only on this many prompts of each suite, drawn with --seed, twins together.
        answers: JSONL files of answers made elsewhere, one model each: {"suite", "item", "attack"?, "text"}.
        output: Folder of the evaluation.
        max_tokens: Longest answer in tokens, with its reasoning.
        temperature: 0 takes the likeliest token each time; above 0 tokens are drawn at random.
        draws: How many answers to each prompt; more than one needs a temperature above 0.
        limit: Use only this many prompts of each suite, drawn with --seed, twins together.
        seed: Seed of --limit and --attack_items.
        store: File that keeps every generated text, for this and later evaluations; default in saro's cache folder.
        plan: Print what would be asked, the tokens, the time and the smallest effect that this many prompts can show,
            and stop.
        requests: Write what a server among --models would be asked, and is not in the store, to this file, as OpenAI's
            batch API reads it, and stop; `saro draws import` takes the results.
        offline: Generate nothing: a text that the store lacks is an error.
        allow_contaminated: Go on if a model was trained on prompts of a suite; the report then says so.
        allow_self_judge: Go on if the judge is one of the models.
        load: How the models under test are loaded.
        server: How servers are asked that are among --models.
        judge: Who judges.
        data: How prompts become tokens. The defaults are those of the first run among the models.
    """

    models: list[str] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    suites: list[str] | str = field(default_factory=lambda: [DEMO])
    attacks: list[str] | str = field(default_factory=list)
    attack_items: int | None = None
    answers: list[str] | str = field(default_factory=list)
    output: str = "output/evaluation"
    max_tokens: int = 1024
    temperature: float = 0.0
    draws: int = 1
    limit: int | None = None
    seed: int = 0
    store: str | None = None
    plan: bool = False
    requests: str | None = None
    offline: bool = False
    allow_contaminated: bool = False
    allow_self_judge: bool = False
    load: LoadOptions = field(default_factory=LoadOptions)
    server: ServerOptions = field(default_factory=ServerOptions)
    judge: JudgeOptions = field(default_factory=JudgeOptions, metadata=short())
    data: DataConfig = field(
        default_factory=DataConfig,
        metadata=shown("think_tags", "chat_template", "template_date", "template_variables"),
    )

    def __post_init__(self) -> None:
        if not (self.models or self.answers):
            raise SaroError("nothing to evaluate; name --models, or files of answers with --answers")
        check_names(self.names, self.models)
        check_at_least(self, "--", 1, "max_tokens", "draws", "limit", "attack_items")
        check_at_least(self, "--", 0, "temperature")
        if self.draws > 1 and self.temperature == 0:
            raise SaroError("--draws above 1 needs a --temperature above 0: greedy answers are all the same")


def check_names(names: Sequence[str], models: Sequence[str]) -> None:
    """Raise SaroError if there are names for models, and not one for each."""
    if names and len(names) != len(models):
        raise SaroError(f"--names names {len(names)} models, and --models {len(models)}; give one for each")
