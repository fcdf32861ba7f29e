"""Makes the training records of one stage, from its options to its files. Read it from top to bottom."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from saro.data.chat_format import ChatFormat
from saro.data.read_rows import hash_rows
from saro.demo import prompt_files
from saro.distributed.runtime import Runtime
from saro.draws.draw_all import check_one_machine, draw_on_all_ranks
from saro.draws.request import Draw, Request, Sampling
from saro.draws.store import DrawStore, find_store
from saro.errors import SaroError
from saro.evaluate.judge import check_abstentions, check_not_self, judge_answers, read_judge
from saro.evaluate.judge_gold import GOLD, as_answers, measure_agreement, read_gold
from saro.evaluate.judge_model import JudgeModel
from saro.evaluate.judge_spec import JudgeSpec, read_gate
from saro.evaluate.rules import RULES
from saro.evaluate.subjects import find_subjects
from saro.evaluate.suite import read_suite, suite_hash
from saro.program import as_list
from saro.synth import outcome_pairs, process_pairs, rw_examples
from saro.synth.author import Author, Task
from saro.synth.budget import Budget, BudgetedGenerator
from saro.synth.funnel import Funnel
from saro.synth.hazard_judge import sort_prompts
from saro.synth.judgement import Judge, JudgedGate
from saro.synth.pair_lengths import measure_forks, measure_lengths
from saro.synth.prompts import (
    Prompt,
    check_exclusion,
    choose_heldout,
    drop_duplicates,
    drop_excluded,
    excluded_files,
    read_prompts,
)
from saro.synth.reader_models import ReaderModels
from saro.synth.safety_policy import SafetyPolicy, read_policy
from saro.synth.step_judge import StepJudge
from saro.synth.synth_options import GateOptions, Options
from saro.synth.synth_output import SynthOutput, describe_making
from saro.synth.synth_plan import count_tokens, describe_plan, plan_stage
from saro.synth.templates import read_template

# A judge must agree with people on this share of the answers that come with saro. They are clear cases: one that does
# worse reads the form of its prompt wrongly.
_LEAST_AGREEMENT = 0.8


@dataclass(frozen=True)
class Stage:
    """How the records of a stage are made.

    Attributes:
        make: writes, judges and selects texts, and returns records.
        plan_tasks: returns the texts of the first round.
        count_followups: returns the most texts of later rounds.
        check: raises SaroError if the chat format cannot hold what the stage makes, which would show only after all texts
            are paid for.
        group: name of the stage's own options.
        templates: what models are asked with.
        reads_steps: True if a judge of steps works too; ``make`` then takes it after the judge.
        guided: texts that are written with the policy in view: all, those of later rounds, or none. If there are some,
            ``make`` takes ``judged_gates``.
        later: the template of the longest prompts of later rounds; None if all are asked in the first one.
    """

    make: Callable[..., list[dict[str, Any]]]
    plan_tasks: Callable[[Sequence[Prompt], SafetyPolicy, Options], list[Task]]
    count_followups: Callable[[Sequence[Prompt], Options], int]
    check: Callable[[Sequence[Prompt], ChatFormat | None], None] | None
    group: str
    templates: tuple[str, ...]
    reads_steps: bool = False
    guided: Literal["all", "later", "none"] = "none"
    later: str | None = None


_PROCESS = Stage(
    make=process_pairs.make_process_pairs,
    plan_tasks=process_pairs.plan_tasks,
    count_followups=process_pairs.count_followups,
    check=process_pairs.check_template,
    group="pp",
    templates=("turn", "neutral", "steps"),
    reads_steps=True,
    later="turn",
)
STAGE_TABLE = {
    "rw": Stage(
        make=rw_examples.make_examples,
        plan_tasks=rw_examples.plan_tasks,
        count_followups=rw_examples.count_followups,
        check=rw_examples.check_template,
        group="rw",
        templates=("guided",),
        guided="all",
    ),
    "op": Stage(
        make=outcome_pairs.make_outcome_pairs,
        plan_tasks=outcome_pairs.plan_tasks,
        count_followups=outcome_pairs.count_followups,
        check=None,
        group="op",
        templates=("guided",),
        guided="later",
        later="guided",
    ),
    "pp": _PROCESS,
    "mirror": _PROCESS,
}


def synthesize(options: Options, runtime: Runtime) -> dict[str, Any] | None:
    """Make the records of a stage, and write them with their manifest.

    Every text that a model wrote is kept in the store of draws. All else is computed from the store and the files: a run
    that was stopped goes on where it was, and the same store and options give the same bytes.

    Returns:
        The manifest; None if only the plan was asked for.

    Raises:
        SaroError: a prompt, policy, model or judge does not exist or is not sound, prompts are in an excluded suite, the
            budget is spent, another process writes this output, or no record is left.
    """
    # 1. Find what is asked, of whom, and who judges. No weights are read yet, and all that can be wrong is said here.
    check_one_machine(runtime, "data construction")
    stage, funnel = STAGE_TABLE[options.stage], Funnel()
    policy = read_policy(options.policy)
    files = prompt_files(as_list(options.prompts))
    prompts = drop_duplicates(read_prompts(files, options.limit, options.seed), funnel)
    if options.drop_excluded:
        prompts = drop_excluded(prompts, as_list(options.exclude), funnel)
    else:
        check_exclusion(prompts, as_list(options.exclude))
    (subject,) = find_subjects([options.generator], [], options.load, options.server, options.data)
    if stage.check is not None:
        stage.check(prompts, subject.chat)
    budget = Budget.of_rank(options.budget.tokens, options.budget.calls, runtime.rank, runtime.processes)
    generator = BudgetedGenerator(
        subject.generator(options.load, runtime.device, runtime.is_main),
        budget,
        is_server=subject.server is not None,
        chat=subject.chat,
    )
    spec = _read_judge(options.judge.name, policy)
    readers = ReaderModels(budget, runtime.is_main)
    judge_model = readers.find_judge(spec, options.judge)
    gates = _open_gates(options.gates, readers)
    hazard_model = readers.find_reader("hazards", options.hazards)
    warnings = _find_warnings(spec, prompts, options)
    for line in warnings:
        runtime.say(line)
    step_model = readers.find_reader("steps", options.steps) if stage.reads_steps else None
    for model in readers.opened.values():
        check_not_self(model.generator.identity, {subject.name: generator.identity}, options.allow_self_judge)
    output = SynthOutput.open(options.output, options.overwrite, options.allow_empty)

    with DrawStore.open(find_store(options.store)) as store:
        author = Author(subject, generator, store, runtime, options.offline)
        if options.plan:
            judges = (judge_model, step_model)
            for line in _plan(stage, prompts, policy, options, author, judges, len(gates), hazard_model):
                runtime.say(line)
            return None
        templates = (*stage.templates, *(("hazard",) if hazard_model is not None else ()))
        made_from = describe_making(
            options,
            policy={"name": policy.name, "hash": policy.hash},
            templates={name: read_template(name).hash for name in templates},
            prompts=_hash_files(files),
            exclude=_hash_suites(excluded_files(as_list(options.exclude))),
            fill=_hash_files(as_list(options.rw.fill)) if options.stage == "rw" else [],
            generator={"name": subject.name, **subject.describe_format(), "identity": dict(generator.identity)},
            judge=_describe_judge(spec, judge_model),
            gates={name: _describe_judge(gate, model) for name, (gate, model) in gates.items()} or None,
            steps=None if step_model is None else dict(step_model.generator.identity),
            hazards=None if hazard_model is None else dict(hazard_model.generator.identity),
        )
        runtime.on_main(lambda: output.begin(made_from))

        # 2. Make sure that the judge reads as people do, before anything else is paid for.
        gold = {} if judge_model is None else _check_gold(spec, judge_model, author)

        # 3. Draw, judge and select.
        if hazard_model is not None:
            prompts = sort_prompts(prompts, hazard_model, policy, funnel, _draw_all(author, hazard_model))
        judge = Judge(spec, judge_model, store, runtime, options.offline)
        judges = [judge]
        if stage.reads_steps:
            judges.append(StepJudge(step_model, policy, store, runtime, options.offline))
        judged_gates = [
            JudgedGate(name, Judge(gate, model, store, runtime, options.offline, option=f"--gates.{name}"))
            for name, (gate, model) in gates.items()
        ]
        # Only stages with guided texts take gates, and the options refuse them for others.
        gated = {"judged_gates": judged_gates} if judged_gates else {}
        records = stage.make(prompts, author, *judges, policy, options, funnel, **gated)
        judge.finish(funnel)
        for gate in judged_gates:
            gate.finish(funnel)

    # 4. Write.
    more = {
        "lengths": measure_lengths(records, subject.chat),
        "forks": measure_forks(records),
        "gold": gold,
        "warnings": warnings,
    }
    heldout = choose_heldout(prompts, options.heldout, options.seed)
    return runtime.on_main(lambda: output.write(records, made_from, funnel, more, heldout, subject.chat))


def _read_judge(name: str, policy: SafetyPolicy) -> JudgeSpec:
    """Return the judge. The one that comes with saro and reads a policy reads the policy of this run."""
    spec = read_judge(name)
    if name != "policy":
        return spec
    text = policy.for_judge()
    digest = hashlib.sha256(f"{spec.hash}/{text}".encode()).hexdigest()
    return replace(spec, policy=text, hash=digest)


def _find_warnings(spec: JudgeSpec, prompts: Sequence[Prompt], options: Options) -> list[str]:
    """Return what people should know before they train on the records, one line each; the manifest has them too."""
    harmful = sum(prompt.kind == "harmful" for prompt in prompts)
    if spec.form != RULES or not harmful or options.stage == "mirror":
        return []
    return [
        f"--judge {spec.name}: on {harmful:,} harmful prompts the rules call every answer harmful that does not refuse, safe "
        "help and nonsense too; name a judge with a model to tell them apart"
    ]


def _open_gates(options: GateOptions, readers: ReaderModels) -> dict[str, tuple[JudgeSpec, JudgeModel]]:
    """Return the gates that are asked for, by their names, with the models that answer."""
    specs = {name: read_gate(file) for name, file in options.files.items()}
    return {name: (spec, readers.open(spec, options, "--gates.model")) for name, spec in specs.items()}


def _draw_all(author: Author, model: JudgeModel) -> Callable[[Sequence[Request]], list[Draw]]:
    """Return what draws all replies of a model that reads texts."""
    draw_all = partial(draw_on_all_ranks, author.runtime, author.store, model.generator)
    return partial(draw_all, offline=author.offline)


def _find_stored(author: Author, model: JudgeModel) -> Callable[[Sequence[Request]], list[Draw | None]]:
    """Return what finds the replies of a model that the store has, and draws none."""

    def find(requests: Sequence[Request]) -> list[Draw | None]:
        keys = [request.key(model.generator.identity) for request in requests]
        stored = author.store.get(keys)
        return [stored.get(key) for key in keys]

    return find


def _plan(
    stage: Stage,
    prompts: Sequence[Prompt],
    policy: SafetyPolicy,
    options: Options,
    author: Author,
    judges: Sequence[JudgeModel | None],
    gates: int,
    hazard_model: JudgeModel | None,
) -> list[str]:
    """Return the plan as lines.

    Args:
        judges: those that read every text. The first one is also tried on people's gold labels.
        gates: number of judged gates.
        hazard_model: gives prompts their hazards. Prompts about which the store has no reply are planned by their defaults.
    """
    unsorted = 0
    if hazard_model is not None:
        prompts = sort_prompts(prompts, hazard_model, policy, Funnel(), _find_stored(author, hazard_model))
        unsorted = sum(bool(prompt.defaults) for prompt in prompts)
    # The tags are those of the generator's run unless the user gave some.
    options = replace(options, data=replace(options.data, think_tags=author.subject.think_tags))
    sampling = Sampling(options.max_tokens, getattr(options, stage.group).temperature)
    tasks = stage.plan_tasks(prompts, policy, options)
    followups = stage.count_followups(prompts, options)
    guided = {"all": len(tasks), "later": followups, "none": 0}[stage.guided]
    gold = 0 if judges[0] is None else len(read_gold(GOLD))
    plan = plan_stage(
        author.store,
        author.generator.identity,
        author.ask(tasks, sampling),
        followups=followups,
        more_prompt=_count_more(stage, prompts, policy, options, author.subject.chat),
        max_tokens=options.max_tokens,
        judges=sum(model is not None for model in judges),
        more_read=gold + gates * guided + unsorted,
        concurrency=1 if author.subject.server is None else author.subject.server.concurrency,
    )
    return describe_plan(plan, options.budget)


def _count_more(
    stage: Stage, prompts: Sequence[Prompt], policy: SafetyPolicy, options: Options, chat: ChatFormat | None
) -> int:
    """Return the most tokens that prompts of later rounds have beside a bare prompt and a text: template and policy."""
    if stage.later is None:
        return 0
    template = "\n".join(content for _, content in read_template(stage.later).turns)
    policies = {policy.for_writer(prompt) for prompt in prompts}
    longest = max((count_tokens(text, chat) for text in policies), default=0)
    # A turning step is asked for below the reasoning before it, and may be written behind it too.
    reasoning = options.max_tokens if stage.reads_steps else 0
    return count_tokens(template, chat) + longest + reasoning


def _hash_files(files: Sequence[str]) -> list[dict[str, str]]:
    """Return name and sha256 of each file. A list: files in two folders may have one name."""
    hashed = [{"name": Path(file).name, "sha256": hash_rows(file)} for file in files]
    return sorted(hashed, key=lambda entry: (entry["name"], entry["sha256"]))


def _hash_suites(files: Sequence[str]) -> dict[str, str]:
    return {Path(file).stem: suite_hash(read_suite(file)) for file in files}


def _describe_judge(spec: JudgeSpec, model: JudgeModel | None) -> dict[str, Any]:
    identity = None if model is None else dict(model.generator.identity)
    return {"name": spec.name, "hash": spec.hash, "identity": identity}


def _check_gold(spec: JudgeSpec, model: JudgeModel, author: Author) -> dict[str, float]:
    """Let a judge read the answers that come with saro, and return the share on which it agrees with people, by question.

    Raises:
        SaroError: it agrees on too few, or abstains on too many.
    """
    gold = read_gold(GOLD)
    answers, items = as_answers(gold, GOLD.stem)
    verdicts = judge_answers(
        spec,
        answers,
        items,
        _draw_all(author, model),
        chat=model.chat,
        identity=model.generator.identity,
    )
    check_abstentions(verdicts)
    by_key = {verdict.answer: verdict for verdict in verdicts}
    agreement = measure_agreement([(row, by_key.get(a.key)) for row, a in zip(gold, answers, strict=True)])
    shares = {part: groups["all"]["accuracy"]["value"] for part, groups in agreement.items()}
    for part in ("refusal", "harm"):
        if shares.get(part, 1.0) < _LEAST_AGREEMENT:
            raise SaroError(
                f"--judge {spec.name}: agrees with people about {part} on {shares[part]:.0%} of {len(gold)} clear answers, and "
                f"{_LEAST_AGREEMENT:.0%} are wanted; take another judge or model, `saro judge-check` measures them"
            )
    return shares
