"""Defines the options of `saro synth` and of recipes/synth.py: name, unit, default and check."""

from __future__ import annotations

from dataclasses import dataclass, field

from saro.config import DEMO, DataConfig, check_at_least, check_numbers
from saro.errors import SaroError, nearest
from saro.evaluate.options import JudgeOptions, LoadOptions, ServerOptions
from saro.program import positional, short, shown

STAGES = ("rw", "op", "pp", "mirror")
# Stages whose texts, or some of them, are written with the policy in view.
GUIDED_STAGES = ("rw", "op")
# Forms of process pairs that each stage makes.
FORMS = {"pp": ("intervene", "earlier", "recover", "sibling"), "mirror": ("mirror",)}


def _check_shares(owner: object, prefix: str, *names: str) -> None:
    check_numbers(owner, prefix, names, lambda share: 0 <= share <= 1, "a share, 0 to 1")


def _check_draws(owner: object, prefix: str, least: int = 1) -> None:
    check_at_least(owner, prefix, least, "draws")
    check_at_least(owner, prefix, 0, "temperature")
    if owner.draws > 1 and owner.temperature == 0:
        raise SaroError(f"{prefix}draws above 1 needs a {prefix}temperature above 0: greedy texts are all the same")


@dataclass(frozen=True)
class RWStage:
    """Stage rw: chains for Reasoning-style Warmup, drawn with the policy in view and kept without it.

    Attributes:
        draws: Texts drawn for each prompt; 0 draws none, and all records are from --rw.fill.
        temperature: 0 takes the likeliest token each time.
        fill: JSONL files of RW records, such as converted public chains, that fill up what the model cannot write.
        records: Number of records to keep, balanced over hazard, source, outcome and level; default all accepted ones.
        general: Share of general records among those that are kept, as far as there are enough.
    """

    draws: int = 4
    temperature: float = 0.8
    fill: list[str] | str = field(default_factory=list)
    records: int | None = None
    general: float = 0.25

    def __post_init__(self) -> None:
        _check_draws(self, "rw.", least=0)
        check_at_least(self, "rw.", 1, "records")
        _check_shares(self, "rw.", "general")


@dataclass(frozen=True)
class OutcomeStage:
    """Stage op: pairs of whole texts of the model itself, one with a good outcome and one with a bad one.

    Attributes:
        draws: Texts drawn for each prompt, without the policy.
        temperature: 0 takes the likeliest token each time.
        pairs_per_prompt: Most pairs of one prompt.
        guided: Largest share of pairs whose chosen text was drawn with the policy in view, because all others were bad.
        shorter: Largest share of pairs of two good texts, of which the rejected one is at least 1.5 times as long; only
            for prompts of level none and low.
        balance: Keep as many pairs of harmful as of harmless prompts, first those whose twin has a pair too. A model then
            cannot lower its loss by refusing more, or less, whatever the prompt.
    """

    draws: int = 8
    temperature: float = 1.0
    pairs_per_prompt: int = 2
    guided: float = 0.2
    shorter: float = 0.1
    balance: bool = False

    def __post_init__(self) -> None:
        _check_draws(self, "op.")
        check_at_least(self, "op.", 1, "pairs_per_prompt")
        _check_shares(self, "op.", "guided", "shorter")


@dataclass(frozen=True)
class ProcessStage:
    """Stages pp and mirror: pairs that share the beginning of a chain and part at one step.

    Attributes:
        forms: Forms to make; default all of the stage.
        draws: Whole chains drawn for each prompt, without the policy. The same ones as those of stage op.
        temperature: 0 takes the likeliest token each time.
        turns: Turning steps that the model writes for each fork, with the policy in view.
        borrowed: Turning steps tried at each fork that are taken from good chains of the model on the same prompt.
        rollouts: Continuations drawn to find the value of a step, for form sibling. The step that is found takes twice as
            many again, which measure it at both ends.
        open_tokens: A rejected harmful text ends this many tokens after the step that decides it, or after the beginning of
            a step that does harm itself, so that records hold little of it.
        neutral: Share of forks that are also tried with a neutral step, as a control.
        pairs_per_prompt: Most pairs of one prompt and form.
    """

    forms: list[str] = field(default_factory=list)
    draws: int = 8
    temperature: float = 1.0
    turns: int = 2
    borrowed: int = 1
    rollouts: int = 4
    open_tokens: int = 24
    neutral: float = 0.1
    pairs_per_prompt: int = 1

    def __post_init__(self) -> None:
        _check_draws(self, "pp.")
        check_at_least(self, "pp.", 1, "rollouts", "open_tokens", "pairs_per_prompt")
        check_at_least(self, "pp.", 0, "turns", "borrowed")
        if self.turns + self.borrowed == 0:
            raise SaroError("--pp.turns and --pp.borrowed are 0: no step is left to turn with; give one of them")
        _check_shares(self, "pp.", "neutral")


@dataclass(frozen=True)
class BudgetOptions:
    """Limits of what a run may spend. What was drawn before it stops is stored, and the same command goes on from there.

    Attributes:
        tokens: Stop before more tokens are drawn, by generator and judges together. A model on this machine finishes its
            batches first.
        calls: Stop before more texts are drawn, likewise.
        input_price: Price of a million prompt tokens, for --plan.
        output_price: Price of a million drawn tokens, for --plan.
    """

    tokens: int | None = None
    calls: int | None = None
    input_price: float = 0.0
    output_price: float = 0.0

    def __post_init__(self) -> None:
        check_at_least(self, "budget.", 1, "tokens", "calls")
        check_at_least(self, "budget.", 0, "input_price", "output_price")


@dataclass(frozen=True)
class ReaderOptions:
    """A model that reads texts. Without a model and a server, none is asked.

    Attributes:
        model: Folder or hub name of the model.
        endpoint: URL of an OpenAI-compatible server that runs the model.
        key_env: Environment variable that holds the key of the server.
        revision: A label of yours for the version of the server's model.
    """

    model: str | None = None
    endpoint: str | None = None
    key_env: str = "SARO_API_KEY"
    revision: str | None = None

    @property
    def is_given(self) -> bool:
        """True if a model or a server is named."""
        return bool(self.model or self.endpoint)


@dataclass(frozen=True)
class GateOptions:
    """What guided texts are asked about after the gates that need no model; by default nothing.

    Attributes:
        relevance: "relevance", which comes with saro, or the YAML file of a gate: is the reasoning about the prompt?
        coherence: "coherence", which comes with saro, or the YAML file of a gate: do reasoning and answer belong together?
        model: Folder or hub name of the model that answers both; default: as their files say.
        endpoint: URL of an OpenAI-compatible server that runs the model.
        key_env: Environment variable that holds the key of the server.
        revision: A label of yours for the version of the server's model.
    """

    relevance: str | None = None
    coherence: str | None = None
    model: str | None = None
    endpoint: str | None = None
    key_env: str = "SARO_API_KEY"
    revision: str | None = None

    def __post_init__(self) -> None:
        if (self.model or self.endpoint) and not self.files:
            raise SaroError("gates.model is given and no gate; name one with --gates.relevance or --gates.coherence")

    @property
    def files(self) -> dict[str, str]:
        """Name of each gate that is asked for -> its file, in the order in which they are asked."""
        given = {"relevance": self.relevance, "coherence": self.coherence}
        return {name: file for name, file in given.items() if file is not None}


@dataclass(frozen=True)
class Options:
    """Options of data construction.

    Attributes:
        stage: rw makes reasoning examples; op makes pairs of outcomes; pp makes pairs of processes; mirror makes those of
            harmless prompts, in which the chosen chain comes back from needless caution.
        prompts: JSONL files of prompts (`saro convert` makes them from public sets); "demo" is 98 that come with saro, "twins"
            940 more pairs of a harmless prompt and a harmful one.
        exclude: Suites whose prompts may not be among them; "demo" is always one.
        drop_excluded: Leave such prompts out, and list them in NAME.left_out.jsonl; otherwise they are an error.
        policy: YAML file of the policy; "saro" is the one that comes with saro.
        generator: Model that writes: a run's folder, a model, or a server as URL#MODEL.
        output: File of the records, NAME.jsonl. NAME.manifest.json and NAME.left_out.jsonl are written beside it.
        heldout: Share of the prompts whose records go to NAME.heldout.jsonl instead, drawn with --seed, twins together.
        allow_empty: Write an empty file if no record is left; otherwise that is an error.
        overwrite: Replace an output that was made from other options, prompts, models or by another version.
        max_tokens: Longest text in tokens, with its reasoning.
        limit: Use only this many prompts of each file, drawn with --seed, twins together.
        seed: Seed of --limit and of all that is drawn from sets of records.
        store: File that keeps every generated text; default in saro's cache folder.
        plan: Print what would be asked, the tokens, their price and the time, and stop.
        offline: Generate nothing: a text that the store lacks is an error.
        allow_self_judge: Go on if the judge is the generator.
        rw: Options of stage rw.
        op: Options of stage op.
        pp: Options of stages pp and mirror.
        budget: What the run may spend.
        load: How a local model is loaded.
        server: How a server is asked.
        judge: Who judges outcomes.
        gates: Which judges guided texts must pass too.
        steps: Who says where a chain turns; default: the rules.
        hazards: Who gives prompts the hazard and the level that their file lacks; default: level by kind, no hazard.
        data: How prompts become tokens. The defaults are those of the generator's run.
    """

    stage: str = field(metadata=positional(choices=STAGES))
    prompts: list[str] | str = field(default_factory=lambda: [DEMO])
    exclude: list[str] | str = field(default_factory=list)
    drop_excluded: bool = False
    policy: str = "saro"
    generator: str = DEMO
    output: str = "output/synth/records.jsonl"
    heldout: float = 0.0
    allow_empty: bool = False
    overwrite: bool = False
    max_tokens: int = 1024
    limit: int | None = None
    seed: int = 0
    store: str | None = None
    plan: bool = False
    offline: bool = False
    allow_self_judge: bool = False
    rw: RWStage = field(default_factory=RWStage)
    op: OutcomeStage = field(default_factory=OutcomeStage)
    pp: ProcessStage = field(default_factory=ProcessStage)
    budget: BudgetOptions = field(default_factory=BudgetOptions)
    load: LoadOptions = field(default_factory=LoadOptions)
    server: ServerOptions = field(default_factory=ServerOptions)
    judge: JudgeOptions = field(
        default_factory=JudgeOptions,
        metadata=short() | shown("name", "model", "endpoint", "key_env", "revision"),
    )
    gates: GateOptions = field(default_factory=GateOptions)
    steps: ReaderOptions = field(default_factory=ReaderOptions)
    hazards: ReaderOptions = field(default_factory=ReaderOptions)
    data: DataConfig = field(
        default_factory=DataConfig,
        metadata=shown("think_tags", "chat_template", "template_date", "template_variables"),
    )

    def __post_init__(self) -> None:
        if self.stage not in STAGES:
            raise SaroError(f"stage is {self.stage!r}{nearest(str(self.stage), STAGES)}")
        _check_shares(self, "--", "heldout")
        valid = FORMS.get(self.stage, ())
        for form in self.pp.forms:
            if valid and form not in valid:
                raise SaroError(f"--pp.forms: {form!r} is no form of stage {self.stage}{nearest(str(form), valid)}")
        if self.gates.files and self.stage not in GUIDED_STAGES:
            raise SaroError(f"--gates: stage {self.stage} writes no guided texts; leave them out")
        check_at_least(self, "--", 1, "max_tokens", "limit")
