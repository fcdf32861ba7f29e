"""Stage 2, SRPO: preference optimization of reasoning chains, from pairs to `final/`. Read it from top to bottom.

    accelerate launch recipes/srpo.py [--config FILE.yaml] [--group.option VALUE ...] [--resume | --overwrite]

Without options it goes on with the demo model that recipes/rw.py has trained, on the demo pairs.
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from itertools import islice
from typing import Any

from rich.console import Console

from saro.checks.check_packs import check_packs
from saro.config import DEMO, START, SRPOConfig
from saro.data.dataset import encode_pair_files
from saro.data.lengths import Report, check_masks
from saro.data.records import PAIR_KINDS, read_pairs
from saro.data.steps import Schedule
from saro.demo import data_files, start_of
from saro.distributed.runtime import Runtime
from saro.evaluate.answers import answer, answer_table, choose_prompts, preference_table
from saro.model.load import dropout_options, find_model, load_policy
from saro.program import parse_recipe, run_program
from saro.runs.folder import Run
from saro.train.checkpoint import save_final
from saro.train.engine import fit
from saro.train.objective import SRPOObjective
from saro.train.pair_log import PairLog, evaluate_pairs
from saro.train.reference import load_references, other_references
from saro.train.start_check import check_start
from saro.train.steps import Steps


def main() -> int:
    """Train. Returns the exit code: 0 when done, 128 + signal number when stopped with a checkpoint."""
    config, flags = parse_recipe(SRPOConfig, "srpo.py", __doc__)
    model_options, data_options, preference, options = config.model, config.data, config.preference, config.train
    runtime = Runtime.start(options.trackers, options.output)
    console = Console(stderr=True, quiet=not runtime.is_main)

    # 1. What there is: the folder of the run, and where training starts. Nothing is written yet.
    run = Run.open(config, options.output, template_date=data_options.template_date, **flags)
    model_options = replace(model_options, name=run.start() or start_of(model_options.name, runtime.say))
    source = find_model(model_options)
    chat = source.chat_format(data_options, run.template_date)

    # 2. Pairs -> token ids; both sides on one prompt, nothing cut, a wrong pair is an error.
    train_files = data_files(data_options.train, "srpo_train")
    heldout_files = data_files(data_options.heldout, "srpo_heldout")
    encoding = {"max_tokens": data_options.pack_tokens, "too_long": data_options.too_long, "progress": runtime.is_main}
    sets = {"train": encode_pair_files(train_files, chat, **encoding)}
    if heldout_files:
        sets["heldout"] = encode_pair_files(heldout_files, chat, **encoding)
    reports = {name: Report.of(pairs) for name, pairs in sets.items()}
    for name, report in reports.items():
        report.show(console, name)
    manifest = run.manifest(source, train_files + heldout_files, reports, runtime)
    run.check(runtime, manifest)
    for side in (sets["train"].chosen, sets["train"].rejected):
        check_masks(side, chat, islice(read_pairs(train_files[0]), 64), source.config.vocab_size)
    if preference.scored == "divergent":
        sets = {name: of.divergent() for name, of in sets.items()}
    pairs, heldout = sets["train"], sets.get("heldout")

    # 3. The steps: which pairs, in which order, in which trees and packs.
    pack_tokens = data_options.pack_tokens
    weights = {kind: data_options.weights.get(name, 1.0) for kind, name in enumerate(PAIR_KINDS)}
    groups = pairs.prompts if data_options.group_by_prompt else None
    schedule = Schedule(pairs.kinds, options.records_per_step, options.seed, weights, groups)
    steps = Steps(schedule, partial(pairs.trees, budget=pack_tokens), pack_tokens, runtime.rank, runtime.processes)
    total_steps = min(math.ceil(options.epochs * schedule.steps_per_epoch), options.max_steps or math.inf)

    # 4. The reference, the model, and the proofs: packs give what the model itself gives, and it starts at its reference.
    of_sets = {"sets": list(sets.values()), "pack_tokens": pack_tokens}
    from_start = preference.reference == START
    if not from_start:
        references = other_references(runtime, model_options, preference.reference, chat, **of_sets)
    policy = load_policy(source, model_options, runtime.device, options.seed)
    runtime.say(
        f"{model_options.name}: {model_options.method}, {policy.summary()}; checking trees against its own forward"
    )
    found = check_packs(policy, pairs)
    runtime.say(f"packed log-probs differ from its own by {found.logps:.1e}, rounding by {found.logps_floor:.1e}")
    if from_start:
        references = load_references(runtime, policy, source, **of_sets)
    of_each = zip(sets.items(), references, strict=True)
    objectives = {name: SRPOObjective(of.kinds, reference, preference) for (name, of), reference in of_each}
    if from_start:
        zero = check_start(runtime, policy, objectives["train"], steps[0], pairs, pack_tokens)
        runtime.say(f"loss {zero.loss:.4f} at the start; margins up to {zero.margin:.1e}, rounding {zero.allowed:.1e}")

    # 5. The folder of the run; from here on things are written.
    run.begin(runtime, manifest)
    runtime.start_trackers("saro-srpo", run.config)

    # 6. What the model does before training, the training, and what it does after.
    prompts = choose_prompts([p for file in heldout_files for p in read_pairs(file)], options.samples)
    logs = {name: PairLog(runtime, of, name, preference.warn_chosen_fell) for name, of in sets.items()}

    def heldout_metrics(step: int) -> dict[str, float]:
        of_heldout = (objectives["heldout"], heldout, pack_tokens, logs["heldout"]) if heldout else None
        return evaluate_pairs(runtime, policy, *of_heldout, step, run.folder / "margins.jsonl") if of_heldout else {}

    def measure(step: int) -> dict[str, Any]:
        answers = answer(policy, chat, prompts, options.sample_tokens) if runtime.is_main else []
        return {"metrics": heldout_metrics(step), "answers": answers}

    before = run.once(runtime, "before.json", partial(measure, 0))
    outcome = fit(
        runtime,
        policy,
        objectives["train"],
        steps,
        total_steps,
        options,
        record_ids=lambda records: [pairs.ids[r] for r in records],
        evaluate=heldout_metrics if heldout else None,
        observe=logs["train"].observe,
        on_log=logs["train"].watch,
        resume=run.resumed,
    )
    if outcome.stopped_by:
        runtime.say(f"stopped after step {outcome.step} of {total_steps}; go on with --resume")
        runtime.end()
        return 128 + outcome.stopped_by
    after = run.once(runtime, "after.json", partial(measure, total_steps))

    # 7. What others load, and the table.
    if runtime.is_main:
        save_final(run.folder / "final", policy.model, source.tokenizer, dropout_options(source.config))
        if prompts:
            console.print(answer_table(before["answers"], after["answers"], prompts, data_options.heldout == [DEMO]))
        if heldout:
            console.print(preference_table(before["metrics"], after["metrics"]))
    runtime.say(
        f"{total_steps} steps, {outcome.tokens_per_second:.0f} tokens/s, peak memory {outcome.peak_memory_gib:.2f} GiB; "
        f"model in {run.folder / 'final'}"
    )
    runtime.end()
    return 0


if __name__ == "__main__":
    run_program(main)
