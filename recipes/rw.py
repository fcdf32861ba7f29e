"""Stage 1, RW: supervised fine-tuning on long-chain reasoning, from files to `final/`. Read it from top to bottom.

    accelerate launch recipes/rw.py [--config FILE.yaml] [--group.option VALUE ...] [--resume | --overwrite]

Without options it trains the demo model on the demo data.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import partial
from itertools import islice
from typing import Any

from rich.console import Console

from saro.checks.check_packs import check_packs
from saro.config import DEMO, RWConfig
from saro.data.dataset import ExampleSet, encode_files
from saro.data.lengths import Report, check_masks
from saro.data.records import KINDS, read_examples
from saro.data.steps import Schedule
from saro.data.tree import SequenceTree, build_tree
from saro.demo import data_files
from saro.distributed.runtime import Runtime
from saro.evaluate.answers import answer, answer_table, choose_prompts, token_table
from saro.model.load import dropout_options, find_model, load_policy
from saro.program import parse_recipe, run_program
from saro.runs.folder import Run
from saro.train.checkpoint import save_final
from saro.train.engine import evaluate, fit
from saro.train.metrics import format_metrics
from saro.train.objective import RWObjective
from saro.train.steps import Steps, packs_of


def main() -> int:
    """Train. Returns the exit code: 0 when done, 128 + signal number when stopped with a checkpoint."""
    config, flags = parse_recipe(RWConfig, "rw.py", __doc__)
    model_options, data_options, options = config.model, config.data, config.train
    runtime = Runtime.start(options.trackers, options.output)
    console = Console(stderr=True, quiet=not runtime.is_main)

    # 1. What there is: the folder of the run, the model's tokenizer and config. Nothing is written yet.
    run = Run.open(config, options.output, template_date=data_options.template_date, **flags)
    source = find_model(model_options)
    chat = source.chat_format(data_options, run.template_date)

    # 2. Records -> token ids; prompts exactly as at inference, nothing cut, a wrong record is an error.
    train_files = data_files(data_options.train, "rw_train")
    heldout_files = data_files(data_options.heldout, "rw_heldout")
    encoding = {"max_tokens": data_options.pack_tokens, "too_long": data_options.too_long, "progress": runtime.is_main}
    data = encode_files(train_files, chat, **encoding)
    heldout = encode_files(heldout_files, chat, **encoding) if heldout_files else None
    reports = {"train": Report.of(data)} | ({"heldout": Report.of(heldout)} if heldout else {})
    for name, report in reports.items():
        report.show(console, name)
    check_masks(data, chat, islice(read_examples(train_files[0]), 64), source.config.vocab_size)

    # 3. The steps: which records, in which order, in which packs.
    weights = {kind: data_options.weights.get(name, 1.0) for kind, name in enumerate(KINDS)}
    schedule = Schedule(data.kinds, options.records_per_step, options.seed, weights)

    def trees(of: ExampleSet, records: Iterable[int]) -> list[SequenceTree]:
        return [build_tree([of.sequence(record)]) for record in records]

    steps = Steps(schedule, partial(trees, data), data_options.pack_tokens, runtime.rank, runtime.processes)
    total_steps = min(math.ceil(options.epochs * schedule.steps_per_epoch), options.max_steps or math.inf)

    # 4. The model, and the proof that packs give what the model itself gives.
    policy = load_policy(source, model_options, runtime.device, options.seed)
    runtime.say(
        f"{model_options.name}: {model_options.method}, {policy.summary()}; checking that packs equal its own forward"
    )
    found = check_packs(policy, data)
    runtime.say(f"packed log-probs differ from its own by {found.logps:.1e}, rounding by {found.logps_floor:.1e}")

    # 5. The folder of the run; from here on things are written.
    run.begin(runtime, run.manifest(source, train_files + heldout_files, reports, runtime))
    runtime.start_trackers("saro-rw", run.config)

    # 6. What the model does before training, the training, and what it does after.
    prompts = choose_prompts([e for file in heldout_files for e in read_examples(file)], options.samples)

    def heldout_metrics(_: int) -> dict[str, float]:
        if heldout is None:
            return {}
        packs = packs_of(trees(heldout, range(len(heldout))), data_options.pack_tokens, runtime.rank, runtime.processes)
        return evaluate(runtime, policy, RWObjective(heldout.kinds), packs)

    def measure(step: int) -> dict[str, Any]:
        answers = answer(policy, chat, prompts, options.sample_tokens) if runtime.is_main else []
        return {"metrics": heldout_metrics(step), "answers": answers}

    before = run.once(runtime, "before.json", partial(measure, 0))
    if heldout:
        losses = {name: value for name, value in before["metrics"].items() if name.startswith("eval/loss")}
        runtime.say("before training  " + format_metrics(losses))
    outcome = fit(
        runtime,
        policy,
        RWObjective(data.kinds),
        steps,
        total_steps,
        options,
        record_ids=lambda records: [data.ids[r] for r in records],
        evaluate=heldout_metrics if heldout else None,
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
            console.print(token_table(before["metrics"], after["metrics"]))
    runtime.say(
        f"{total_steps} steps, {outcome.tokens_per_second:.0f} tokens/s, peak memory {outcome.peak_memory_gib:.2f} GiB; "
        f"model in {run.folder / 'final'}"
    )
    runtime.end()
    return 0


if __name__ == "__main__":
    run_program(main)
