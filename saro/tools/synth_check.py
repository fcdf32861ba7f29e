"""`saro synth check`: records of data construction, checked from the files alone; exit code 1 if a check fails."""

from __future__ import annotations

from dataclasses import dataclass, field

from rich.console import Console

from saro.config import DEMO, DataConfig, check_at_least
from saro.errors import SaroError
from saro.evaluate.options import LoadOptions, ServerOptions
from saro.evaluate.subjects import find_subjects
from saro.program import positional, shown
from saro.synth.check_records import check_records, read_records
from saro.synth.safety_policy import read_policy


@dataclass(frozen=True)
class Options:
    """Options of `saro synth check`.

    Attributes:
        files: JSONL files of examples or pairs; name all that are trained on together.
        model: The model that is to be trained on them: a run's folder, a folder or hub name, or "demo".
        policy: YAML file of the policy that the writer had in view; "saro" is the one that comes with saro.
        sample: Compare the judge's verdicts with the rules on this many answers.
        seed: Seed of the sample.
        data: How prompts become tokens. The defaults are those of the model's run.
    """

    files: list[str] = field(metadata=positional())
    model: str = DEMO
    policy: str = "saro"
    sample: int = 200
    seed: int = 0
    data: DataConfig = field(
        default_factory=DataConfig,
        metadata=shown("think_tags", "chat_template", "template_date", "template_variables"),
    )

    def __post_init__(self) -> None:
        check_at_least(self, "--", 1, "sample")


def run(options: Options, console: Console) -> int:
    """Check records: encoding, duplicates, forks, leaks, lengths, balance and verdicts. Exit code 1 if a check fails; a warning is none.

    Raises:
        SaroError: a file cannot be read, or the model or the policy does not exist.
    """
    policy = read_policy(options.policy)
    (subject,) = find_subjects([options.model], [], LoadOptions(), ServerOptions(), options.data)
    if subject.chat is None:
        raise SaroError(
            f"--model {options.model}: is a server, whose tokens are not known; name the model to be trained"
        )
    results = check_records(
        read_records(options.files, subject.chat), subject.chat, policy, sample=options.sample, seed=options.seed
    )
    width = max(len(result.check) for result in results)
    for result in results:
        status = "FAIL" if not result.passed else "WARN" if result.is_warning else "ok  "
        console.out(f"{status} {result.check:{width}}  {result.text}", highlight=False)
    return 0 if all(result.passed for result in results) else 1
