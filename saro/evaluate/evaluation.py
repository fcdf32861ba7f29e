"""Runs an evaluation, from its options to scores.json. Read it from top to bottom."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Sequence
from typing import Any

from saro.distributed.runtime import Runtime
from saro.draws.draw_all import draw_missing
from saro.draws.request import Draw, Generator, Request, Sampling
from saro.draws.store import DrawStore
from saro.errors import SaroError
from saro.evaluate.answers import Answer, Verdict
from saro.evaluate.attacks import read_attacks
from saro.evaluate.evaluation_folder import EvaluationFolder
from saro.evaluate.foreign_answers import read_foreign_answers
from saro.evaluate.judge import judge_answers
from saro.evaluate.jury import Jury
from saro.evaluate.options import Options
from saro.evaluate.plan import describe_plan
from saro.evaluate.questions import Asked, ask, choose_items, make_questions, read_answer
from saro.evaluate.rules import judge_by_rules
from saro.evaluate.scores import make_scores
from saro.evaluate.subject import Subject, check_contamination, find_subjects
from saro.evaluate.suite import read_suites
from saro.program import as_list


def evaluate(options: Options, runtime: Runtime) -> dict[str, Any] | None:
    """Evaluate models on suites, and write the folder of the evaluation.

    Every generated text is kept in the store of draws. All else is computed from the store and the files: an evaluation
    that was stopped goes on where it was, and another judge generates no answer again.

    Returns:
        The content of scores.json; None if only the plan was asked for.

    Raises:
        SaroError: a model, suite, attack or judge does not exist or is not sound, a model was trained on a suite, or
            the folder is in use.
    """
    # 1. Find what is asked, of whom, and who judges. No weights are read yet, and all that can be wrong is said here.
    suites = [choose_items(suite, options.limit, options.seed) for suite in read_suites(as_list(options.suites))]
    items = {(item.suite, item.id): item for suite in suites for item in suite}
    attacks = read_attacks(as_list(options.attacks))
    subjects = find_subjects(options)
    jury = Jury.find(options.judge, subjects, options.allow_self_judge)
    questions = make_questions(suites, attacks, options.draws, options.attack_items, options.seed)
    sampling = Sampling(options.max_tokens, options.temperature)
    asked = {subject.name: ask(subject, questions, sampling) for subject in subjects}
    answers = read_foreign_answers(as_list(options.answers), items, attacks, subjects)
    contaminated = check_contamination(subjects, list(items.values()), options.allow_contaminated)
    folder = EvaluationFolder.open(options, runtime)
    _check_one_machine(runtime)
    with DrawStore.open(folder.store) as store:
        if options.plan:
            runtime.say(describe_plan(store, subjects, asked, options))
            return None
        folder.begin(suites, attacks, subjects, jury, contaminated)

        # 2. Draw what the store lacks, one model after the other, on all ranks.
        for subject in subjects:
            answers += _answer(runtime, store, subject, asked[subject.name], options)
        folder.write("answers.jsonl", answers)

        # 3. Judge. The rules always give a second opinion.
        verdicts = [judge_by_rules(items[a.suite, a.item], a) for a in answers if jury.judges(items, a)]
        verdicts += _judge(runtime, store, jury, answers, items, options)
        folder.write("verdicts.jsonl", verdicts)

    # 4. Count.
    scores = make_scores(list(items.values()), answers, verdicts, folder.labels(), folder.context(...))
    folder.write_scores(scores)
    return scores
