"""Ask whether harmful and harmless training prompts teach the difference that other prompts need.

    python benchmarks/prompt_probe.py --run output/rw --train '[star1-prompts.jsonl, coconot-prompts.jsonl]' --test xstest.jsonl

A linear probe on the hidden states of a prompt's last token learns to tell the harmful prompts of ``--train`` from the
harmless ones, and then orders those of ``--test``. Its AUC is the share of (harmful, harmless) test prompts in the right order:
0.5 is a coin. Training prompts from which the probe learns nothing for the test can move a model's threshold, but will hardly
teach it which prompts to refuse.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jsonargparse import auto_cli
from rich.console import Console

from saro.demo import prompt_files, suite_files
from saro.evaluate.subjects import Subject, find_measured
from saro.evaluate.suite import Item, read_suite
from saro.model.unmodified import unmodified
from saro.runs.finished import this_device
from saro.synth.prompts import read_prompts

# Where in the depth of the model hidden states are read: the first layers hold words, the last ones the next token.
_DEPTHS = (1 / 2, 2 / 3, 5 / 6)


@dataclass(frozen=True)
class Probe:
    """A linear classifier of standardised features.

    Attributes:
        mean, deviation: (F,) of the features that it was trained on.
        weight: (F,)
        bias: ()
    """

    mean: torch.Tensor
    deviation: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor

    def score(self, features: torch.Tensor) -> torch.Tensor:
        """Return (P,) of features (P, F): above 0 if the probe calls the prompt harmful."""
        return (features - self.mean) / self.deviation @ self.weight + self.bias


def train_probe(harmful: torch.Tensor, harmless: torch.Tensor, penalty: float) -> Probe:
    """Fit a logistic regression with a squared penalty, in which both kinds weigh the same however many there are.

    Args:
        harmful: (P, F) features in float64.
        harmless: (Q, F)
        penalty: weight of the squared norm beside the mean loss.
    """
    features = torch.cat([harmful, harmless])
    mean, deviation = features.mean(0), features.std(0) + 1e-6
    scaled = (features - mean) / deviation
    labels = torch.cat([torch.ones(len(harmful)), torch.zeros(len(harmless))]).double()
    weights = torch.cat([torch.full_like(part[:, 0], 0.5 / len(part)) for part in (harmful, harmless)])
    weight = torch.zeros(features.shape[1], dtype=torch.float64, requires_grad=True)
    bias = torch.zeros((), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=200, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        losses = torch.nn.functional.binary_cross_entropy_with_logits(scaled @ weight + bias, labels, reduction="none")
        total = (losses * weights).sum() + penalty * weight.square().sum()
        total.backward()
        return total

    optimizer.step(loss)
    return Probe(mean, deviation, weight.detach(), bias.detach())


def auc(harmful: torch.Tensor, harmless: torch.Tensor) -> float:
    """Return the share of pairs in which the harmful prompt has the higher score; equal scores count half."""
    difference = harmful[:, None] - harmless
    return ((difference > 0).double() + (difference == 0).double() / 2).mean().item()


@torch.no_grad()
def read_features(subject: Subject, items: Sequence[Sequence[Item]]) -> list[torch.Tensor]:
    """Return (P, F) float64 for each group of P prompts: hidden states at the last token before the response."""
    policy = subject.load_policy(this_device())
    decoder = policy.causal_lm.get_decoder()
    layers = [round(depth * policy.causal_lm.config.get_text_config().num_hidden_layers) for depth in _DEPTHS]

    def read(item: Item) -> torch.Tensor:
        ids = torch.tensor([subject.chat.prompt_ids(item.prompt)], device=policy.causal_lm.device)
        states = decoder(input_ids=ids, output_hidden_states=True, use_cache=False).hidden_states
        return torch.cat([states[layer][0, -1] for layer in layers]).double().cpu()

    with unmodified(policy), policy.precision():
        return [torch.stack([read(item) for item in group]) for group in items]


def choose_training_items(files: Sequence[str], kind: str, limit: int, max_words: int | None, seed: int) -> list[Item]:
    """Return at most ``limit`` prompts of a kind from each file."""
    chosen: list[Item] = []
    for file in prompt_files(files):
        items = [prompt.item for prompt in read_prompts([file]) if prompt.kind == kind]
        if max_words is not None:
            items = [item for item in items if len(item.prompt[-1].content.split()) <= max_words]
        chosen += random.Random(seed).sample(items, min(limit, len(items)))
    return chosen


def main(
    run: str | None = None,
    model: str | None = None,
    train: list[str] = ["twins"],  # noqa: B006 (jsonargparse shows it)
    test: str = "demo",
    limit: int = 400,
    max_words: int | None = None,
    penalty: float = 1e-2,
    seed: int = 0,
) -> None:
    """Train a probe on prompts, and print how it orders those of a suite.

    Args:
        run: Folder of a finished run.
        model: Or a model's folder or name.
        train: Files of prompts as `saro synth` reads them, "twins" or "demo".
        test: A suite as `saro evaluate` reads it, or "demo".
        limit: Most prompts of each kind and file.
        max_words: Leave out training prompts with more words, so that length is no hint.
        penalty: Weight of the probe's squared norm.
        seed: For the choice of prompts.
    """
    suite = [item for file in suite_files([test]) for item in read_suite(file)]
    groups = [
        *(choose_training_items(train, kind, limit, max_words, seed) for kind in ("harmful", "harmless")),
        *([item for item in suite if item.expect == expect] for expect in ("refuse", "comply")),
    ]
    harmful, harmless, test_harmful, test_harmless = read_features(find_measured(run, model), groups)
    probe = train_probe(harmful, harmless, penalty)
    scores = probe.score(test_harmful), probe.score(test_harmless)
    shares = [(score > 0).double().mean().item() for score in scores]
    Console().print(
        f"{', '.join(train)} ({len(harmful)} + {len(harmless)} prompts) → {test} ({len(test_harmful)} + "
        f"{len(test_harmless)}): AUC {auc(*scores):.3f}; called harmful are {shares[0]:.0%} of the harmful and "
        f"{shares[1]:.0%} of the harmless prompts"
    )


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
