"""Runs an evaluation, from its options to scores.json. Read it from top to bottom."""

from __future__ import annotations

import gc
import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from saro.demo import suite_files
from saro.distributed.runtime import Runtime
from saro.draws.draw_all import check_one_machine, draw_on_all_ranks
from saro.draws.handover import write_requests
from saro.draws.request import Draw, Generator, Sampling
from saro.draws.store import DrawStore, find_store
from saro.errors import SaroError
from saro.evaluate.answers import Answer, Verdict
from saro.evaluate.attacks import NO_ATTACK, Attack, describe_attacks
from saro.evaluate.cells import ScoreContext
from saro.evaluate.contamination import (
    TrainingFiles,
    find_contamination,
    find_training_files,
    read_training_prompts,
)
from saro.evaluate.evaluation_folder import EvaluationFolder, make_manifest
from saro.evaluate.foreign_answers import read_foreign_answers
from saro.evaluate.judge import check_abstentions, check_not_self, judge_answers, read_judge
from saro.evaluate.judge_model import JudgeModel, find_judge_model
from saro.evaluate.judge_spec import JudgeSpec
from saro.evaluate.labels import read_labels
from saro.evaluate.options import Options
from saro.evaluate.plan import describe_plan, plan_model
from saro.evaluate.questions import Asked, ask, choose_items, make_questions, read_answer
from saro.evaluate.read_attacks import read_attacks
from saro.evaluate.rules import RULES
from saro.evaluate.scores import make_scores
from saro.evaluate.subjects import Subject, find_subjects
from saro.evaluate.suite import Item, read_suite, suite_hash
from saro.evaluate.training_judges import find_training_judges
from saro.program import as_list


def evaluate(options: Options, runtime: Runtime) -> dict[str, Any] | None:
    """Evaluate models on suites, and write the folder of the evaluation.

    Every generated text is kept in the store of draws. All else is computed from the store and the files: an evaluation
    that was stopped goes on where it was, and another judge generates no answer again.

    Returns:
        The content of scores.json; None if only the plan or the requests were asked for.

    Raises:
        SaroError: a model, suite, attack or judge does not exist or is not sound, a model was trained on a suite, or
            the folder is in use.
    """
    # 1. Find what is asked, of whom, and who judges. No weights are read yet, and all that can be wrong is said here.
    check_one_machine(runtime, "an evaluation")
    whole_suites = _read_suites(as_list(options.suites))
    suites = [choose_items(suite, options.limit, options.seed) for suite in whole_suites]
    items = [item for suite in suites for item in suite]
    by_id = {(item.suite, item.id): item for item in items}
    attacks = _read_attacks(as_list(options.attacks))
    subjects = find_subjects(options.models, options.names, options.load, options.server, options.data)
    generators = {s.name: s.generator(options.load, runtime.device, runtime.is_main) for s in subjects}
    judge = read_judge(options.judge.name)
    judge_model = find_judge_model(judge, options.judge, runtime.is_main)
    if judge_model is not None:
        identities = {name: generator.identity for name, generator in generators.items()}
        check_not_self(judge_model.generator.identity, identities, options.allow_self_judge)
    questions = make_questions(suites, attacks, options.draws, options.attack_items, options.seed)
    sampling = Sampling(options.max_tokens, options.temperature)
    asked = {subject.name: ask(subject, questions, sampling) for subject in subjects}
    names = [subject.name for subject in subjects]
    known = {(item.suite, item.id) for suite in whole_suites for item in suite}
    foreign = read_foreign_answers(as_list(options.answers), by_id, known, attacks, names)
    gold = _read_gold(options.judge.gold, judge, judge_model)
    training = {s.name: find_training_files(s.options.name) for s in subjects if s.source is not None}
    contaminated, threats = _find_contaminated(training, items, options.allow_contaminated)
    threats += _find_own_teacher(training, judge.name)
    folder = EvaluationFolder.open(options, runtime.is_main)

    with DrawStore.open(find_store(options.store)) as store:
        if options.plan:
            for line in _plan(store, subjects, generators, asked, items):
                runtime.say(line)
            return None
        if options.requests is not None:
            _write_requests(options.requests, store, subjects, generators, asked, runtime)
            return None
        manifest = make_manifest(
            options,
            models={subject.name: subject.describe() for subject in subjects},
            suites={suite[0].suite: suite_hash(suite) for suite in suites},
            attacks={attack.id: attack.hash for attack in attacks},
            judge={"name": judge.name, "hash": judge.hash},
            contaminated=contaminated,
        )
        folder.begin(manifest, items)

        # 2. Draw what the store lacks, one model after the other, on all ranks.
        draw_all = partial(draw_on_all_ranks, runtime, store, offline=options.offline)
        answers: list[Answer] = []
        for subject in subjects:
            # Popped, so that the model's weights are freed before the next one's are read.
            answers += _answer(subject, asked[subject.name], generators.pop(subject.name), draw_all)
            gc.collect()
        answers += foreign
        folder.write_rows("answers.jsonl", answers)

        # 3. Judge. The rules always give a second opinion.
        verdicts = judge_answers(read_judge(RULES), answers, by_id)
        if judge_model is not None:
            verdicts += _judge(judge, judge_model, answers, by_id, draw_all)
        folder.write_rows("verdicts.jsonl", verdicts)
        check_abstentions(verdicts, replies="verdicts.jsonl")

    # 4. Count.
    context = ScoreContext(
        models=tuple(dict.fromkeys(answer.model for answer in answers)),
        suites=tuple(suite[0].suite for suite in suites),
        attacks=describe_attacks((NO_ATTACK, *attacks)),
        judge=judge.name,
        gold=gold,
        limits={subject.name: options.max_tokens for subject in subjects},
        templates={s.name: s.describe_format()["template"] for s in subjects if s.chat is not None},
        contaminated=contaminated,
        threats=[*threats, *_find_incomplete(foreign, items)],
    )
    labels = read_labels(folder.path / "labels.jsonl", {answer.key: answer.draw for answer in answers})
    scores = make_scores(items, answers, verdicts, labels, context)
    folder.write_json("scores.json", scores)
    return scores


def _read_suites(names: Sequence[str]) -> list[list[Item]]:
    suites = [read_suite(file) for file in suite_files(names)]
    taken = [suite[0].suite for suite in suites]
    for name in taken:
        if taken.count(name) > 1:
            raise SaroError(f"--suites: two files are called {name}, which names a suite; rename one")
    return suites


def _read_attacks(names: Sequence[str]) -> list[Attack]:
    attacks: dict[str, Attack] = {}
    for name in names:
        for attack in read_attacks(name):
            if attack.id in attacks:
                raise SaroError(f"--attacks: two attacks are called {attack.id}; give one of them another id")
            attacks[attack.id] = attack
    return list(attacks.values())


def _find_contaminated(
    training: Mapping[str, TrainingFiles], items: Sequence[Item], allow: bool
) -> tuple[dict[str, list[str]], list[dict[str, str]]]:
    """Return the prompts that each model was trained on, "suite/item", and what could not be found out.

    Raises:
        SaroError: there are such prompts, and they are not allowed.
    """
    contaminated: dict[str, list[str]] = {}
    threats = []
    for model, known in training.items():
        prompts = ((f"{record} of {file}", text) for file, record, text in read_training_prompts(known.files))
        found = find_contamination(items, prompts)
        if found and not allow:
            first = found[0]
            raise SaroError(
                f"{model}: was trained on {len(found):,} prompts of the suites, such as {first.suite}/{first.item} "
                f"({first.kind} overlap with {first.record}); leave them out, or give --allow_contaminated"
            )
        contaminated[model] = [f"{one.suite}/{one.item}" for one in found]
        if known.unknown:
            text = (
                f"Whether {model} was trained on prompts of the suites is not fully known: {'; '.join(known.unknown)}."
            )
            threats.append({"id": f"training-data-unknown/{model}", "text": text})
    return contaminated, threats


def _find_own_teacher(training: Mapping[str, TrainingFiles], judge: str) -> list[dict[str, str]]:
    """Return a threat if the judge of this evaluation also chose what models were trained on."""
    files = {model: find_training_judges(known.files).get(judge) for model, known in training.items()}
    taught = {model: Path(file).name for model, file in files.items() if file is not None}
    if not taught:
        return []
    models = ", ".join(f"{model} ({file})" for model, file in taught.items())
    text = (
        f"A judge {judge} also chose training records of {models}: these models may have learned what it likes to read, and "
        "not what is safe; judge again with another one."
    )
    return [{"id": "judge-taught", "text": text}]


def _plan(
    store: DrawStore,
    subjects: Sequence[Subject],
    generators: Mapping[str, Generator],
    asked: Mapping[str, Sequence[Asked]],
    items: Sequence[Item],
) -> list[str]:
    """Return lines that say what would be asked."""
    plans = []
    for subject in subjects:
        concurrency = 1 if subject.server is None else subject.server.concurrency
        identity = generators[subject.name].identity
        plans.append(plan_model(store, subject.name, identity, asked[subject.name], concurrency))
    return describe_plan(plans, items)


def _answer(
    subject: Subject, asked: Sequence[Asked], generator: Generator, draw_all: Callable[..., list[Draw]]
) -> list[Answer]:
    """Return a model's answers to what it is asked."""
    draws = draw_all(generator, [one.request for one in asked])
    return [
        read_answer(subject, one, one.request.key(generator.identity), draw)
        for one, draw in zip(asked, draws, strict=True)
    ]


def _judge(
    judge: JudgeSpec,
    model: JudgeModel,
    answers: Sequence[Answer],
    items: Mapping[tuple[str, str], Item],
    draw_all: Callable[..., list[Draw]],
) -> list[Verdict]:
    """Return the verdicts of a judge with a model."""
    identity = model.generator.identity
    return judge_answers(judge, answers, items, partial(draw_all, model.generator), chat=model.chat, identity=identity)


def _write_requests(
    path: str,
    store: DrawStore,
    subjects: Sequence[Subject],
    generators: Mapping[str, Generator],
    asked: Mapping[str, Sequence[Asked]],
    runtime: Runtime,
) -> None:
    """Write what the only server among the models would be asked."""
    servers = [subject for subject in subjects if subject.server is not None]
    if len(servers) != 1:
        raise SaroError(
            f"--requests is for one server among --models, and there are {len(servers)}; name one as URL#MODEL"
        )
    (server,) = servers
    if runtime.is_main:
        requests = [one.request for one in asked[server.name]]
        number = write_requests(Path(path), store, generators[server.name].identity, requests, server.server.model)
        runtime.say(f"{number:,} requests in {path}" if number else "the store has all draws; nothing was written")


def _read_gold(name: str | None, judge: JudgeSpec, model: JudgeModel | None) -> Mapping[str, Any] | None:
    """Return the figures that `saro judge-check` wrote of this judge.

    Raises:
        SaroError: it is no such file, or one of another judge, or of another model or version of this one.
    """
    if name is None:
        return None
    try:
        gold = json.loads(Path(name).read_text(encoding="utf-8"))
        measured, figures = (gold["judge"], gold["judge_hash"]), gold["agreement"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SaroError(f"--judge.gold {name}: is not a file that `saro judge-check` wrote; give its output") from error
    spec = judge if model is None else judge.with_model(model.generator.identity)
    if measured != (spec.name, spec.hash):
        raise SaroError(
            f"--judge.gold {name}: measures {measured[0]}, with other patterns, prompts or another model than this judge "
            f"{spec.name}; run saro judge-check again"
        )
    return figures


def _find_incomplete(foreign: Sequence[Answer], items: Sequence[Item]) -> list[dict[str, str]]:
    """Return a threat for each model whose answers were made elsewhere and lack some of the prompts."""
    threats = []
    for model in dict.fromkeys(answer.model for answer in foreign):
        answered = {(a.suite, a.item) for a in foreign if a.model == model and a.attack == NO_ATTACK.id}
        if len(answered) < len(items):
            text = f"{model} answers only {len(answered):,} of {len(items):,} prompts: its rates are of other prompts."
            threats.append({"id": f"incomplete/{model}", "text": text})
    return threats
