"""SRPO gives the numbers of TRL's DPOTrainer, step by step, from the same records, weights and options."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from datetime import date
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from peft import get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from transformers import AutoModelForCausalLM

from saro.config import DataConfig, ModelConfig, PreferenceConfig, TrainConfig
from saro.data.dataset import PairSet
from saro.data.encode_files import encode_pair_files
from saro.data.steps import Schedule, Steps
from saro.distributed.runtime import Runtime
from saro.model.load import load_policy
from saro.model.policy import Policy
from saro.model.score import score_pairs
from saro.model.source import ModelSource, find_model
from saro.train.engine import fit
from saro.train.objective import SRPOObjective

pytestmark = [pytest.mark.trl, pytest.mark.usefixtures("one_thread")]

STEPS, PER_STEP, PACK_TOKENS = 8, 4, 256
LR, MAX_GRAD_NORM = 5e-4, 1.0


def _words(draw: random.Random, most: int) -> str:
    return "".join(f" {draw.choice(('one', 'more', 'not', 'so', 'far'))}" for _ in range(draw.randint(1, most)))


def _record(number: int) -> dict[str, str]:
    """Make a pair. Two pairs share each prompt; sides differ in length, and most start with the same words."""
    draw = random.Random(number)
    shared = _words(draw, 3) if number % 4 else ""
    sides = {"chosen": shared + _words(draw, 4) + ".", "rejected": shared + _words(draw, 5) + "!"}
    return {"prompt": f"Name {number // 2} things."} | sides


RECORDS = [_record(number) for number in range(STEPS * PER_STEP)]

# TRL smooths labels only in robust and divides by the number of tokens only in ipo.
CASES = [
    PreferenceConfig("sigmoid"),
    PreferenceConfig("hinge"),
    PreferenceConfig("robust", label_smoothing=0.2),
    PreferenceConfig("ipo", length_normalize=True),
]
each_loss = pytest.mark.parametrize("case", CASES, ids=lambda case: case.loss)

Metrics = list[dict[str, float]]


class Setting:
    """The records, their order, and a model with a trained adapter, which is also the reference."""

    def __init__(self, trl: Any, model: str, records: str, output: Path) -> None:
        self._trl, self._output = trl, output
        self._options = ModelConfig(name=model, method="lora", lora_rank=4)
        self.source: ModelSource = find_model(self._options)
        chat = self.source.chat_format(DataConfig(), date(2024, 7, 26))
        self.pairs: PairSet = encode_pair_files([records], chat, DataConfig(pack_tokens=PACK_TOKENS))
        self.schedule = Schedule(self.pairs.kinds, PER_STEP, seed=0)
        self.order = np.concatenate([self.schedule.records(step) for step in range(STEPS)]).tolist()

    def policy(self) -> Policy:
        """Make the policy that every run starts from. Its adapter is not zero, so that losing it would be noticed."""
        policy = load_policy(self.source, self._options, torch.device("cpu"), seed=0)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for name, parameter in policy.trainable().items():
                if "lora_B" in name:
                    parameter.normal_(std=0.05, generator=generator)
        return policy

    def trainer(self, case: PreferenceConfig) -> Any:
        """Make TRL's trainer on the records in our order."""
        from datasets import Dataset

        class Trainer(self._trl.DPOTrainer):
            def _send_telemetry(self) -> None:
                pass

        ours = self.policy()
        base = AutoModelForCausalLM.from_pretrained(self.source.path, dtype=torch.float32, attn_implementation="sdpa")
        model = get_peft_model(base, ours.model.peft_config["default"])
        set_peft_model_state_dict(model, get_peft_model_state_dict(ours.model))
        options = self._trl.DPOConfig(
            output_dir=str(self._output / "trl"),
            loss_type=[case.loss],
            beta=case.beta,
            label_smoothing=case.label_smoothing,
            max_length=None,
            per_device_train_batch_size=PER_STEP,
            train_sampling_strategy="sequential",
            max_steps=STEPS,
            learning_rate=LR,
            lr_scheduler_type="constant",
            max_grad_norm=MAX_GRAD_NORM,
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        return Trainer(
            model=model,
            args=options,
            train_dataset=Dataset.from_list([RECORDS[r] for r in self.order]),
            processing_class=self.source.tokenizer,
        )

    def train_trl(self, case: PreferenceConfig) -> Metrics:
        """Train with TRL and return the metrics of each step."""
        trainer = self.trainer(case)
        trainer.train()
        return trainer.state.log_history[:STEPS]

    def train_saro(self, case: PreferenceConfig) -> Metrics:
        """Train with saro and return the metrics of each step."""
        runtime = Runtime(Accelerator(cpu=True, mixed_precision="no"), 0, 1, 1)
        policy, folder = self.policy(), self._output / case.loss
        folder.mkdir()
        trees = self.pairs.trees(range(len(self.pairs)), PACK_TOKENS)
        reference = score_pairs(policy, self.pairs, trees, PACK_TOKENS)
        objective = SRPOObjective(self.pairs.kinds, reference, case)
        options = TrainConfig(
            output=str(folder),
            records_per_step=PER_STEP,
            lr=LR,
            schedule="constant",
            warmup=0.0,
            max_grad_norm=MAX_GRAD_NORM,
            save_every=0,
        )
        steps = Steps(self.pairs, self.schedule, PACK_TOKENS)
        fit(runtime, policy, objective, steps, STEPS, options, ids=self.pairs.ids)
        return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory, tiny_model: Callable[..., str]) -> Setting:
    trl = pytest.importorskip("trl", reason="TRL is not installed: pip install -c constraints.txt -e '.[bench]'")
    folder = tmp_path_factory.mktemp("parity")
    records = folder / "pairs.jsonl"
    records.write_text("".join(json.dumps(record) + "\n" for record in RECORDS))
    return Setting(trl, tiny_model(), str(records), folder)


@pytest.fixture(scope="module")
def runs(setting: Setting) -> Iterator[Callable[[PreferenceConfig], tuple[Metrics, Metrics]]]:
    """Return a function that gives the metrics of saro and TRL for a case; each case is trained once."""
    return cache(lambda case: (setting.train_saro(case), setting.train_trl(case)))


def values(metrics: Metrics, name: str) -> list[float]:
    return [line[name] for line in metrics]


def test_saro_and_trl_read_and_score_the_same_tokens(setting):
    rows = setting.trainer(CASES[0]).train_dataset
    for record, row in zip(setting.order, rows, strict=True):
        for side, sequence in zip(("chosen", "rejected"), setting.pairs.sequences(record), strict=True):
            assert row["prompt_ids"] == sequence.tokens[: sequence.scored_from].tolist()
            assert row[f"{side}_ids"] == sequence.tokens[sequence.scored_from :].tolist()


@each_loss
def test_the_loss_of_every_step_equals_trls(runs, case):
    ours, theirs = (values(side, "loss") for side in runs(case))
    assert ours == pytest.approx(theirs, rel=0, abs=1e-4)
    # Training has changed it by far more than that.
    assert abs(theirs[-1] - theirs[0]) > 0.01


@each_loss
def test_the_gradient_norm_of_every_step_equals_trls(runs, case):
    ours, theirs = (values(side, "grad_norm") for side in runs(case))
    assert ours == pytest.approx(theirs, rel=1e-3)


@each_loss
@pytest.mark.parametrize("side", ["chosen", "rejected"])
def test_the_log_probs_of_every_step_equal_trls(runs, case, side):
    ours, theirs = (values(metrics, f"logps/{side}") for metrics in runs(case))
    assert ours == pytest.approx(theirs, rel=1e-5)


@each_loss
@pytest.mark.parametrize("side", ["chosen", "rejected"])
def test_the_rewards_of_every_step_equal_trls(runs, case, side):
    """TRL reports rewards before it divides by the number of tokens; ours are those that the loss sees."""
    ours, theirs = runs(case)
    name, scale = (f"delta_logps/{side}", case.beta) if case.length_normalize else (f"rewards/{side}", 1.0)
    assert [scale * reward for reward in values(ours, name)] == pytest.approx(
        values(theirs, f"rewards/{side}"), rel=0, abs=1e-4
    )


@pytest.mark.parametrize("case", [case for case in CASES if not case.length_normalize], ids=lambda case: case.loss)
def test_the_margins_of_every_step_equal_trls(runs, case):
    ours, theirs = (values(metrics, "rewards/margins") for metrics in runs(case))
    assert ours == pytest.approx(theirs, rel=0, abs=1e-4)


@each_loss
def test_the_accuracies_equal_trls_once_there_is_a_margin(runs, case):
    """In the first step the policy is the reference, so the sign of the margin is only rounding."""
    ours, theirs = (values(metrics, "rewards/accuracies")[1:] for metrics in runs(case))
    assert ours == theirs
    assert len(set(theirs)) > 1
