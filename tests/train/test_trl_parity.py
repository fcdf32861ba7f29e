"""SRPO gives the numbers of TRL's trainers, step by step, from the same records, weights and options."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import replace
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
from saro.data.unpaired_set import encode_unpaired_files
from saro.distributed.runtime import Runtime
from saro.model.load import load_policy
from saro.model.policy import Policy
from saro.model.score import score_pairs
from saro.model.source import ModelSource, find_model
from saro.train.engine import fit
from saro.train.make_objective import make_objective

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
UNPAIRED = [
    {"prompt": record["prompt"], "completion": record["chosen"], "label": number % 3 > 0}
    for number, record in enumerate(RECORDS)
]

# TRL smooths labels only in robust and divides by the number of tokens only in ipo.
CASES = [
    PreferenceConfig("sigmoid"),
    PreferenceConfig("hinge"),
    PreferenceConfig("robust", label_smoothing=0.2),
    PreferenceConfig("ipo", length_normalize=True),
    PreferenceConfig("simpo", beta=2.0, gamma=1.0),
    PreferenceConfig("orpo", beta=0.5),
    PreferenceConfig("kto", desirable_weight=1.5),
]
each_loss = pytest.mark.parametrize("case", CASES, ids=lambda case: case.loss)

Metrics = list[dict[str, float]]


def trainer_of(trl: Any, case: PreferenceConfig) -> tuple[type, type, dict[str, Any]]:
    """Return TRL's trainer for a loss, the class of its options, and those options that others do not have."""
    if case.loss == "kto":
        weights = {name: getattr(case, name) for name in ("desirable_weight", "undesirable_weight")}
        return trl.KTOTrainer, trl.KTOConfig, weights | {"max_length": None}
    if case.loss == "simpo":
        from trl.experimental.cpo import CPOConfig, CPOTrainer

        own = {"loss_type": "simpo", "simpo_gamma": case.gamma, "cpo_alpha": 0.0}
        return CPOTrainer, CPOConfig, own | {"max_length": PACK_TOKENS}
    if case.loss == "orpo":
        from trl.experimental.orpo import ORPOConfig, ORPOTrainer

        class OnResponses(ORPOTrainer):
            """Takes the NLL of responses, as the paper does, where TRL's own takes that of prompts too."""

            def concatenated_forward(self, model: Any, batch: Any) -> tuple[torch.Tensor, ...]:
                *others, _ = super().concatenated_forward(model, batch)
                targets = batch["chosen_labels"][:, 1:]
                logits = others[2][:, : targets.shape[1]]
                return *others, torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())

        return OnResponses, ORPOConfig, {"max_length": PACK_TOKENS}
    own = {"loss_type": [case.loss], "label_smoothing": case.label_smoothing, "max_length": None}
    return trl.DPOTrainer, trl.DPOConfig, own


class Setting:
    """The records, their order, and a model with a trained adapter, which is also the reference."""

    def __init__(self, trl: Any, model: str, records: str, unpaired: str, output: Path) -> None:
        self._trl, self._output = trl, output
        self._options = ModelConfig(name=model, method="lora", lora_rank=4)
        self.source: ModelSource = find_model(self._options)
        chat = self.source.chat_format(DataConfig(), date(2024, 7, 26))
        self.pairs: PairSet = encode_pair_files([records], chat, DataConfig(pack_tokens=PACK_TOKENS))
        self.schedule = Schedule(self.pairs.kinds, PER_STEP, seed=0)
        self.order = np.concatenate([self.schedule.records(step) for step in range(STEPS)]).tolist()
        labelled = encode_unpaired_files([unpaired], chat, DataConfig(pack_tokens=PACK_TOKENS))
        # TRL takes the completion of the record before it in the step, and for the first that of the last.
        others = np.empty(len(labelled), np.int64)
        for start in range(0, len(self.order), PER_STEP):
            step = self.order[start : start + PER_STEP]
            others[step] = [step[-1], *step[:-1]]
        self.unpaired = replace(labelled, others=others)

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

        kind, config, own = trainer_of(self._trl, case)

        class Trainer(kind):
            def _send_telemetry(self) -> None:
                pass

        tokenizer = deepcopy(self.source.tokenizer)
        if not case.needs_reference:
            # Those trainers would put a BOS token in front of every prompt, which this model's tokenizer does not.
            tokenizer.bos_token = None
        ours = self.policy()
        base = AutoModelForCausalLM.from_pretrained(self.source.path, dtype=torch.float32, attn_implementation="sdpa")
        model = get_peft_model(base, ours.model.peft_config["default"])
        set_peft_model_state_dict(model, get_peft_model_state_dict(ours.model))
        options = config(
            output_dir=str(self._output / "trl"),
            beta=case.beta,
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
            **own,
        )
        return Trainer(
            model=model,
            args=options,
            train_dataset=Dataset.from_list([(UNPAIRED if case.is_unpaired else RECORDS)[r] for r in self.order]),
            processing_class=tokenizer,
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
        data = self.unpaired if case.is_unpaired else self.pairs
        reference = None
        if case.needs_reference:
            pairs = data.as_pairs
            trees = pairs.trees(range(len(pairs)), PACK_TOKENS)
            reference = score_pairs(policy, pairs, trees, PACK_TOKENS)
        objective = make_objective(data, reference, case, PACK_TOKENS)
        options = TrainConfig(
            output=str(folder),
            records_per_step=PER_STEP,
            lr=LR,
            schedule="constant",
            warmup=0.0,
            max_grad_norm=MAX_GRAD_NORM,
            save_every=0,
        )
        steps = Steps(data, self.schedule, PACK_TOKENS)
        fit(runtime, policy, objective, steps, STEPS, options, ids=data.ids)
        return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory, tiny_model: Callable[..., str]) -> Setting:
    trl = pytest.importorskip("trl", reason="TRL is not installed: pip install -c constraints.txt -e '.[bench]'")
    folder = tmp_path_factory.mktemp("parity")
    files = {folder / "pairs.jsonl": RECORDS, folder / "unpaired.jsonl": UNPAIRED}
    for file, records in files.items():
        file.write_text("".join(json.dumps(record) + "\n" for record in records))
    return Setting(trl, tiny_model(), *map(str, files), folder)


@pytest.fixture(scope="module")
def runs(setting: Setting) -> Iterator[Callable[[PreferenceConfig], tuple[Metrics, Metrics]]]:
    """Return a function that gives the metrics of saro and TRL for a case; each case is trained once."""
    return cache(lambda case: (setting.train_saro(case), setting.train_trl(case)))


def values(metrics: Metrics, name: str) -> list[float]:
    """Return the values of a metric. A step without desirable, or undesirable, records has none of them."""
    return [line[name] for line in metrics if name in line]


@pytest.mark.parametrize("case", [case for case in CASES if not case.is_unpaired], ids=lambda case: case.loss)
def test_saro_and_trl_read_and_score_the_same_tokens(setting, case):
    rows = setting.trainer(case).train_dataset
    for record, row in zip(setting.order, rows, strict=True):
        for side, sequence in zip(("chosen", "rejected"), setting.pairs.sequences(record), strict=True):
            if f"{side}_input_ids" in row:
                ids, prompt = row[f"{side}_input_ids"], len(row["prompt_input_ids"])
            else:
                ids, prompt = row["prompt_ids"] + row[f"{side}_ids"], len(row["prompt_ids"])
            assert (ids, prompt) == (sequence.tokens.tolist(), sequence.scored_from)


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


@pytest.mark.parametrize("case", [case for case in CASES if case.needs_reference], ids=lambda case: case.loss)
@pytest.mark.parametrize("side", ["chosen", "rejected"])
def test_the_log_probs_of_every_step_equal_trls(runs, case, side):
    ours, theirs = (values(metrics, f"logps/{side}") for metrics in runs(case))
    assert ours == pytest.approx(theirs, rel=1e-5)


@each_loss
@pytest.mark.parametrize("side", ["chosen", "rejected"])
def test_the_rewards_of_every_step_equal_trls(runs, case, side):
    """In ipo, TRL reports rewards before it divides by the number of tokens; ours are those that the loss sees."""
    ours, theirs = runs(case)
    name, scale = (f"delta_logps/{side}", case.beta) if case.length_normalize else (f"rewards/{side}", 1.0)
    assert [scale * reward for reward in values(ours, name)] == pytest.approx(
        values(theirs, f"rewards/{side}"), rel=0, abs=1e-4
    )


@pytest.mark.parametrize("case", [case for case in CASES if not case.length_normalize], ids=lambda case: case.loss)
def test_the_margins_of_every_step_equal_trls(runs, case):
    ours, theirs = (values(metrics, "rewards/margins") for metrics in runs(case))
    assert ours == pytest.approx(theirs, rel=0, abs=1e-4)


@pytest.mark.parametrize("case", [case for case in CASES if not case.is_unpaired], ids=lambda case: case.loss)
def test_the_accuracies_equal_trls_once_there_is_a_margin(runs, case):
    """In the first step the policy is its reference, so the sign of the margin may be only rounding."""
    ours, theirs = (values(metrics, "rewards/accuracies")[1:] for metrics in runs(case))
    assert ours == theirs
    assert len(set(theirs)) > 1


@pytest.mark.parametrize("name", ["log_odds_ratio", "log_odds_chosen"])
def test_the_odds_of_every_step_equal_trls(runs, name):
    (case,) = (case for case in CASES if case.loss == "orpo")
    ours, theirs = (values(metrics, name) for metrics in runs(case))
    assert ours == pytest.approx(theirs, rel=0, abs=1e-4)


def test_the_reference_point_of_every_step_equals_trls(runs):
    (case,) = (case for case in CASES if case.is_unpaired)
    ours, theirs = (values(metrics, "kl") for metrics in runs(case))
    assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-5)
    assert max(theirs) > 0.01
    assert len(ours) == STEPS


def test_kto_reads_and_scores_the_tokens_that_trl_does(setting):
    (case,) = (case for case in CASES if case.is_unpaired)
    data = setting.unpaired
    for record, row in zip(setting.order, setting.trainer(case).train_dataset, strict=True):
        own, mismatched = data.sequence(record), data.mismatched.sequence(record)
        assert row["prompt_ids"] + row["completion_ids"] == own.tokens.tolist()
        assert row["prompt_ids"] + row["KL_completion_ids"] == mismatched.tokens.tolist()
        assert row["label"] == data.labels[record]
