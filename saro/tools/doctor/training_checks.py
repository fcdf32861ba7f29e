"""Checks of training: a few steps with the engine, and a resume."""

from __future__ import annotations

import io
import json
import shutil
from contextlib import redirect_stderr
from functools import partial
from pathlib import Path

import torch

from saro.config import TrainConfig
from saro.data.packs import pack_trees
from saro.errors import SaroError
from saro.tools.doctor.checked_model import CheckedModel
from saro.tools.doctor.finding import Check, Finding
from saro.train.checkpoint import checkpoint_folder
from saro.train.engine import Outcome, evaluate, fit
from saro.train.rw_objective import RWObjective

_STEPS = 3
_RATE = {"full": 2e-5, "lora": 1e-3, "qlora": 1e-3}
# On a GPU the backward may add in another order: a resumed run may be off by this share of the change of one step.
_RESUME_SHARE = 1e-2
# Two checkpoints hold the trainable weights and the optimizer's two moments: 6 times the size of the weights.
_COPIES = 6


def training_checks(checked: CheckedModel, folder: Path) -> list[Check]:
    """Return the checks, to be run in this order: the second one continues from the first one's files in ``folder``."""
    return [
        Check("three steps of training", partial(_training, checked, folder)),
        Check("resume after two steps", partial(_resume, checked, folder)),
    ]


def _training(checked: CheckedModel, folder: Path) -> Finding:
    """Train three steps, and check that the loss fell and parameters changed."""
    name = "three steps of training"
    needed = _COPIES * sum(p.nbytes for p in checked.policy.trainable().values())
    if shutil.disk_usage(folder).free < needed:
        return Finding(name, None, f"checkpoints need {needed / 2**30:.1f} GiB in {folder}; set TMPDIR to another disk")
    before = _loss(checked)
    outcome = _fit(checked, folder, resume=False)
    after = _loss(checked)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    changed = min(line["changed_parameters"] for line in lines)
    norms = max(line["grad_norm"] for line in lines)
    figure = (
        f"loss {before:.4f} -> {after:.4f}, gradient norm up to {norms:.2g}, {changed:.0%} of the parameters changed, "
        f"{outcome.tokens_per_second:.0f} tokens/s, peak {outcome.peak_memory_gib:.2f} GiB"
    )
    # The engine itself refuses a loss or a gradient norm that is not finite.
    return Finding(name, changed > 0 and after < before, figure, "lower loss, parameters changed")


def _resume(checked: CheckedModel, folder: Path) -> Finding:
    """Set the weights to zero, resume from the checkpoint of step 2, and check step 3 against the first run's."""
    name, trainable = "resume after two steps", checked.policy.trainable()
    last, kept = (checkpoint_folder(folder / "checkpoints", step) for step in (_STEPS, _STEPS - 1))
    if not (last.is_dir() and kept.is_dir()):
        return Finding(name, None, "there are no checkpoints: training did not finish its three steps")
    straight = {key: p.detach().clone() for key, p in trainable.items()}
    shutil.rmtree(last)
    with torch.no_grad():
        for parameter in trainable.values():
            parameter.zero_()
    outcome = _fit(checked, folder, resume=True)
    if outcome.step != _STEPS:
        raise SaroError(f"the resumed run ended after step {outcome.step} of {_STEPS}")
    # Relative to the change of one step, which is about the learning rate in each entry.
    step = _RATE[checked.model.method]
    off = max((p.detach() - straight[key]).abs().mean().item() for key, p in trainable.items()) / step
    if checked.runtime.device.type == "cpu":
        same = all(torch.equal(p, straight[key]) for key, p in trainable.items())
        return Finding(name, same, f"off by {off:.2g} of a step", "the same bits")
    return Finding(name, off <= _RESUME_SHARE, f"off by {off:.2g} of a step", f"at most {_RESUME_SHARE:.2g}")


def _fit(checked: CheckedModel, folder: Path, *, resume: bool) -> Outcome:
    examples = checked.examples
    options = TrainConfig(
        output=str(folder),
        records_per_step=len(examples),
        lr=_RATE[checked.model.method],
        schedule="constant",
        warmup=0.0,
        save_every=_STEPS - 1,
        keep_checkpoints=2,
    )
    # Hide the engine's log lines; they would mix with the doctor's.
    with redirect_stderr(io.StringIO()):
        return fit(
            checked.runtime,
            checked.policy,
            RWObjective(examples.kinds),
            checked.example_steps(),
            _STEPS,
            options,
            ids=examples.ids,
            resume=resume,
        )


def _loss(checked: CheckedModel) -> float:
    """Return the policy's mean loss on all examples."""
    packs = pack_trees(checked.example_trees(range(len(checked.examples))), checked.pack_tokens)
    return evaluate(checked.runtime, checked.policy, RWObjective(checked.examples.kinds), packs)["eval/loss"]
