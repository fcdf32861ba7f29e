"""Stage 2, SRPO: preference optimization of chains of reasoning, from files of pairs, or of labelled responses, to `final/`.

    accelerate launch recipes/srpo.py [--config FILE.yaml] [--group.option VALUE ...] [--resume | --overwrite]

Without options it continues with the demo model that recipes/rw.py has trained, on the demo pairs. The file is meant to
be read from top to bottom.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

from rich.console import Console

from saro.checks.check_overlap import check_overlap
from saro.checks.check_packs import check_packs
from saro.config import DEMO, START, SRPOConfig
from saro.data.lengths import LengthReport
from saro.data.packs import PairLogps
from saro.data.steps import Schedule, Steps
from saro.data.unpaired_records import read_preference_files
from saro.demo import data_files, find_demo, find_start
from saro.distributed.machines import first_on_machine
from saro.distributed.run_ranks import run_ranks
from saro.distributed.runtime import Runtime
from saro.evaluate.heldout_prompts import choose_prompts, label_prompts
from saro.model.architectures import dropout_options
from saro.model.load import load_policy
from saro.model.source import find_model
from saro.program import parse_recipe
from saro.report.tables import before_after_tables, print_lengths
from saro.runs.check_ranks import check_same_inputs
from saro.runs.finish import BeforeAfter, end_run, gather_weights, save_final
from saro.runs.folder import RunFolder
from saro.train.best import check_metric
from saro.train.check_forms import check_forms
from saro.train.check_start import check_start
from saro.train.engine import fit
from saro.train.largest_pack import find_largest_pack, recompute_as_needed, try_pack
from saro.train.load_sets import load_preferences
from saro.train.make_objective import make_objective
from saro.train.pair_log import PairLog, evaluate_heldout
from saro.train.reference import load_other_references, load_references, other_reference_options


def main() -> int:
    """Run stage 2. Returns the exit code: 0 when done, 128 + signal number if a signal stopped it with a checkpoint."""
    config, flags = parse_recipe(SRPOConfig, "srpo.py", __doc__)
    data_options, preference, train_options = config.data, config.preference, config.train
    pack_tokens = data_options.pack_tokens
    runtime = Runtime.start(train_options.trackers, train_options.output, train_options.shard)
    console = Console(stderr=True, quiet=not runtime.is_main)

    # 1. The run's folder, the model that training starts from, and the reference model if it is another one. The folder
    # is not written yet.
    run = RunFolder.open(config, train_options.output, flags, runtime)
    start = runtime.broadcast(run.start or find_start(config.model.name, runtime.say))
    model_options = replace(config.model, name=find_demo(start))
    source = first_on_machine(runtime, find_model, model_options)
    model_options = run.decide_dtype(runtime, source, model_options)
    reference_source = None
    if preference.reference != START:
        reference_options = other_reference_options(model_options, find_demo(preference.reference))
        reference_source = first_on_machine(runtime, find_model, reference_options)
    chat = run.chat_format(source, data_options)

    # 2. Pairs -> token ids. Both sides have the same prompt, nothing is cut, and a wrong pair is an error. For kto, each
    # side of a pair is a record of its own.
    train_files = data_files(data_options.train, "srpo_train")
    heldout_files = data_files(data_options.heldout, "srpo_heldout")
    limits = source.token_limits()
    train = load_preferences(runtime, train_files, chat, data_options, limits, preference)
    check_forms(preference, train.forms)
    heldout = None
    if heldout_files:
        heldout = load_preferences(runtime, heldout_files, chat, data_options, limits, preference)
    sets = {"train": train} if heldout is None else {"train": train, "heldout": heldout}
    reports = {name: LengthReport.of(data, train) for name, data in sets.items()}
    for name, report in reports.items():
        print_lengths(console, name, report.as_dict())
    manifest = run.manifest(
        runtime, source, chat, model_options.dtype, reference_source, train_files + heldout_files, reports
    )
    # Refuse to resume on other data or another model here, before the model is loaded.
    run.check_unchanged(runtime, manifest)
    check_same_inputs(runtime, manifest, sets)
    heldout_records = list(read_preference_files(heldout_files, data_options, preference))
    if heldout is not None and not data_options.allow_overlap:
        check_overlap(heldout, train)
    if heldout is None:
        runtime.say("no records are held out, so nothing is measured before and after; name a file with --data.heldout")
    if preference.scored == "divergent":
        # Only after the checks: it changes what is scored, not what is read.
        sets = {name: pairs.divergent() for name, pairs in sets.items()}
    train, heldout = sets["train"], sets.get("heldout")
    # A reference scores pairs. A record of kto stands there beside a response that its prompt did not get.
    pairs = {name: data.as_pairs for name, data in sets.items()}

    # 3. Token ids -> steps of packs. A step can be made from its number, without the steps before it.
    schedule = Schedule.of(train, data_options, train_options)
    steps = Steps(train, schedule, pack_tokens, runtime.share)
    total_steps = schedule.num_steps(train_options)
    run.check_steps(runtime, total_steps)

    # 4. The policy, checked against the unmodified model, and the reference log-probs: from the cache, or scored now.
    references = None
    if reference_source is not None:
        # Load, score and free this model before the policy is loaded, so that two models need not fit into memory.
        references = load_other_references(runtime, reference_source, reference_options, chat, pairs, pack_tokens)
    policy = load_policy(source, model_options, runtime.device, train_options.seed, runtime.mesh)
    runtime.say(f"{start}: {config.model.method}, {policy.summary()}; checking packs against the model's own forward")
    check = check_packs(policy, pairs["train"])
    runtime.say(
        f"packed log-probs differ from the model's own by {check.logps:.1e} nats; "
        f"rounding changes them by {check.logps_floor:.1e}"
    )
    # Run out of memory now and not hours later. To score the reference may take hours too: zeros stand for it here.
    zero_reference = PairLogps.zeros(pairs["train"].scored_tokens) if preference.needs_reference else None
    trial_objective = make_objective(train, zero_reference, preference, pack_tokens)
    largest = find_largest_pack(steps, total_steps, runtime.processes)
    recompute_as_needed(runtime, policy, trial_objective, largest, train_options.optimizer)
    try_pack(runtime, policy, trial_objective, largest, steps, train_options.optimizer)
    if references is None and preference.needs_reference:
        references = load_references(runtime, policy, source, pairs, pack_tokens)
    objective = make_objective(train, references and references["train"], preference, pack_tokens)
    if references is not None and reference_source is None:
        # The policy is its own reference, so that all margins of the first step are zero.
        first = replace(steps, data=pairs["train"])[0]
        runtime.say(check_start(runtime, policy, objective, first, pairs["train"], pack_tokens).describe())

    # 5. From here on the run's folder is written.
    run.begin(runtime, manifest)
    run.start_trackers(runtime, "saro-srpo")

    # 6. Measure held-out metrics and answers, train, and measure again.
    train_log = PairLog(runtime, train, "train", preference.warn_chosen_fell)
    if heldout is not None:
        heldout_objective = make_objective(heldout, references and references["heldout"], preference, pack_tokens)
        heldout_log = PairLog(runtime, heldout, "heldout", preference.warn_chosen_fell)

    def heldout_metrics(step: int, output: Path | None = run.folder) -> dict[str, float]:
        if heldout is None:
            return {}
        return evaluate_heldout(
            runtime, policy, heldout_objective, heldout, pack_tokens, log=heldout_log, step=step, output=output
        )

    sampled = choose_prompts(heldout_records, train_options.samples)
    measures = BeforeAfter(
        runtime=runtime,
        run=run,
        policy=policy,
        chat=chat,
        prompts=[record.prompt for record in sampled],
        max_tokens=train_options.sample_tokens,
        heldout_metrics=heldout_metrics,
        tracked=label_prompts(sampled, show_texts=True) if train_options.track_samples else (),
    )
    before = measures.measure("before.json", step=0)
    check_metric(train_options, before["metrics"])
    outcome = fit(
        runtime,
        policy,
        objective,
        steps,
        total_steps,
        train_options,
        ids=train.ids,
        evaluate=None if heldout is None else heldout_metrics,
        log=train_log,
        resume=run.resumed,
    )
    if outcome.stopped_by:
        return end_run(runtime, run, outcome)
    if outcome.best_step not in (None, outcome.step):
        # The model is that of an earlier step, whose margins are in the file.
        measures = replace(measures, heldout_metrics=partial(heldout_metrics, output=None))
    after = measures.measure("after.json", outcome.step)

    # 7. Write the model that other programs load, and show the tables.
    weights = gather_weights(runtime, policy.model)
    if runtime.is_main:
        final, dropout = run.folder / "final", dropout_options(source.config)
        save_final(final, policy.model, source.tokenizer, dropout, weights)
    labels = label_prompts(sampled, show_texts=data_options.heldout == [DEMO])
    for table in before_after_tables(before, after, labels, data_options.heldout):
        console.print(table)
    return end_run(runtime, run, outcome)


if __name__ == "__main__":
    run_ranks(main)
