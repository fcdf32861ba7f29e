"""Stage 1, RW: supervised fine-tuning on long chains of reasoning, from data files to `final/`.

    accelerate launch recipes/rw.py [--config FILE.yaml] [--group.option VALUE ...] [--resume | --overwrite]

Without options it trains the demo model on the demo data. The file is meant to be read from top to bottom.
"""

from __future__ import annotations

from dataclasses import replace

from rich.console import Console

from saro.checks.check_overlap import check_overlap
from saro.checks.check_packs import check_packs
from saro.config import DEMO, RWConfig
from saro.data.lengths import LengthReport
from saro.data.packs import pack_trees
from saro.data.records import read_example_files
from saro.data.steps import Schedule, Steps
from saro.demo import data_files, find_demo
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
from saro.train.engine import evaluate, fit
from saro.train.largest_pack import find_largest_pack, recompute_as_needed, try_pack
from saro.train.load_sets import load_examples
from saro.train.metrics import format_metrics
from saro.train.rw_objective import RWObjective


def main() -> int:
    """Run stage 1. Returns the exit code: 0 when done, 128 + signal number if a signal stopped it with a checkpoint."""
    config, flags = parse_recipe(RWConfig, "rw.py", __doc__)
    data_options, train_options = config.data, config.train
    pack_tokens = data_options.pack_tokens
    runtime = Runtime.start(train_options.trackers, train_options.output, train_options.shard)
    console = Console(stderr=True, quiet=not runtime.is_main)

    # 1. The run's folder, and the model's tokenizer and config. The folder is not written yet.
    run = RunFolder.open(config, train_options.output, flags, runtime)
    model_options = replace(config.model, name=find_demo(config.model.name))
    source = first_on_machine(runtime, find_model, model_options)
    model_options = run.decide_dtype(runtime, source, model_options)
    chat = run.chat_format(source, data_options)

    # 2. Records -> token ids. Prompts are exactly those of inference, nothing is cut, and a wrong record is an error.
    train_files = data_files(data_options.train, "rw_train")
    heldout_files = data_files(data_options.heldout, "rw_heldout")
    limits = source.token_limits()
    train = load_examples(runtime, train_files, chat, data_options, limits)
    heldout = load_examples(runtime, heldout_files, chat, data_options, limits) if heldout_files else None
    sets = {"train": train} if heldout is None else {"train": train, "heldout": heldout}
    reports = {name: LengthReport.of(data, train) for name, data in sets.items()}
    for name, report in reports.items():
        print_lengths(console, name, report.as_dict())
    manifest = run.manifest(runtime, source, chat, model_options.dtype, None, train_files + heldout_files, reports)
    # Refuse to resume on other data or another model here, before the model is loaded.
    run.check_unchanged(runtime, manifest)
    check_same_inputs(runtime, manifest, sets)
    heldout_records = list(read_example_files(heldout_files, data_options.train_on))
    if heldout is not None and not data_options.allow_overlap:
        check_overlap(heldout, train)
    if heldout is None:
        runtime.say("no records are held out, so nothing is measured before and after; name a file with --data.heldout")

    # 3. Token ids -> steps of packs. A step can be made from its number, without the steps before it.
    schedule = Schedule.of(train, data_options, train_options)
    steps = Steps(train, schedule, pack_tokens, runtime.share)
    total_steps = schedule.num_steps(train_options)
    run.check_steps(runtime, total_steps)

    # 4. The policy, checked against the unmodified model.
    policy = load_policy(source, model_options, runtime.device, train_options.seed, runtime.mesh)
    runtime.say(
        f"{config.model.name}: {config.model.method}, {policy.summary()}; "
        "checking packs against the model's own forward"
    )
    check = check_packs(policy, train)
    runtime.say(
        f"packed log-probs differ from the model's own by {check.logps:.1e} nats; "
        f"rounding changes them by {check.logps_floor:.1e}"
    )
    objective = RWObjective(train.kinds, data_options.row_weights)
    # Run out of memory now and not hours later.
    largest = find_largest_pack(steps, total_steps, runtime.processes)
    recompute_as_needed(runtime, policy, objective, largest, train_options.optimizer)
    try_pack(runtime, policy, objective, largest, steps, train_options.optimizer)

    # 5. From here on the run's folder is written.
    run.begin(runtime, manifest)
    run.start_trackers(runtime, "saro-rw")

    # 6. Measure held-out metrics and answers, train, and measure again.
    def heldout_metrics(step: int) -> dict[str, float]:
        if heldout is None:
            return {}
        packs = pack_trees(heldout.trees(range(len(heldout)), pack_tokens), pack_tokens, runtime.share)
        return evaluate(runtime, policy, RWObjective(heldout.kinds), packs)

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
    if heldout is not None:
        losses = {name: value for name, value in before["metrics"].items() if name.startswith("eval/loss")}
        runtime.say("before training  " + format_metrics(losses))
    outcome = fit(
        runtime,
        policy,
        objective,
        steps,
        total_steps,
        train_options,
        ids=train.ids,
        evaluate=None if heldout is None else heldout_metrics,
        resume=run.resumed,
    )
    if outcome.stopped_by:
        return end_run(runtime, run, outcome)
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
