"""Opens the models that read texts for data construction, each of them once, however many judges ask it."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from saro.draws.endpoint import EndpointOptions
from saro.evaluate.judge_model import JudgeModel, find_judge_model, open_judge_model
from saro.evaluate.judge_spec import JudgeSpec
from saro.evaluate.options import JudgeOptions
from saro.evaluate.rules import RULES
from saro.synth.budget import Budget, BudgetedGenerator
from saro.synth.synth_options import GateOptions, ReaderOptions


@dataclass(frozen=True)
class ReaderModels:
    """The models that read texts. Two of one name share their weights and the budget.

    Attributes:
        budget: what they may draw, together with the generator.
        progress: show progress bars.
        opened: those that were opened, by what names them.
    """

    budget: Budget
    progress: bool
    opened: dict[tuple[str | None, ...], JudgeModel] = field(default_factory=dict)

    def find_judge(self, spec: JudgeSpec, asked: JudgeOptions) -> JudgeModel | None:
        """Return the model of the judge of outcomes; None for the rules. Raises SaroError as ``find_judge_model`` does."""
        if spec.form == RULES:
            return find_judge_model(spec, asked)
        return self.open(spec, asked, "--judge.model")

    def find_reader(self, name: str, asked: ReaderOptions) -> JudgeModel | None:
        """Return the model that reads for one purpose, named like its options; None if none is given."""
        if not asked.is_given:
            return None
        return self.open(JudgeSpec(name=name, hash="", spec={}), asked, f"--{name}.model")

    def open(self, spec: JudgeSpec, asked: JudgeOptions | GateOptions | ReaderOptions, option: str) -> JudgeModel:
        """Return a judge's model: the one that is asked for, else the one that its file names.

        Raises SaroError as ``open_judge_model`` does.
        """
        name = asked.endpoint or asked.model or spec.model or ""
        key = (name, *((asked.model, asked.key_env, asked.revision) if asked.endpoint else ()))
        if key not in self.opened:
            server = EndpointOptions(model=asked.model, key_env=asked.key_env, revision=asked.revision)
            model = open_judge_model(spec, name, server, option=option, progress=self.progress)
            generator = BudgetedGenerator(model.generator, self.budget, is_server=model.chat is None)
            self.opened[key] = replace(model, generator=generator)
        return self.opened[key]
