"""A loss is refused exactly if it moves the wrong steps that both sides of a pair begin with."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from saro.config import PreferenceConfig
from saro.data.packs import PairLogps, lay_out
from saro.data.tree import ScoredSequence, build_tree
from saro.errors import SaroError
from saro.train.check_forms import check_forms
from saro.train.srpo_objective import SRPOObjective

PROMPT, SHARED = [10, 11, 12], [40, 41, 42, 43]


def _moves_shared_steps(options: PreferenceConfig) -> bool:
    """Return True if the loss of a pair with a short chosen and a long rejected side moves the tokens that they share."""

    def side(rest: list[int]) -> ScoredSequence:
        tokens = np.array(PROMPT + SHARED + rest, np.int32)
        return ScoredSequence(tokens, len(PROMPT), np.zeros(len(tokens) - len(PROMPT), np.uint8), 0)

    tree = build_tree([side([60, 2]), side([*range(70, 86), 2])])
    pack = lay_out([tree])
    reference = PairLogps.zeros(np.array([[6, 21]])) if options.needs_reference else None
    objective = SRPOObjective(np.zeros(1, np.uint8), reference, options, ("recover",))
    logps = torch.full((pack.rows,), -1.0, requires_grad=True)
    sums, counts = objective(logps, pack), objective.counts([tree])
    torch.stack([value / counts[name] for name, value in sums.losses.items()]).sum().backward()
    is_shared = torch.isin(pack.row_target, torch.tensor(SHARED))
    assert is_shared.sum() == len(SHARED)
    return bool(logps.grad[is_shared].abs().max() > 1e-6)


@pytest.mark.parametrize("form", ["recover", "mirror", "sibling"])
@pytest.mark.parametrize(
    ("options", "refused"),
    [
        ({}, None),
        ({"loss": "hinge"}, None),
        ({"loss": "ipo"}, None),
        ({"loss": "robust"}, None),
        ({"loss": "simpo"}, "loss simpo"),
        ({"loss": "orpo"}, "loss orpo"),
        ({"length_normalize": True}, "length_normalize"),
        ({"loss": "ipo", "length_normalize": True}, "length_normalize"),
        ({"nll": 0.1}, "nll"),
    ],
    ids=str,
)
def test_a_loss_is_refused_exactly_if_it_moves_shared_wrong_steps(options, refused, form):
    options = PreferenceConfig(**options)
    assert _moves_shared_steps(options) == (refused is not None)
    check_forms(options, ["intervene", "earlier", None])
    if refused is None:
        check_forms(options, ["intervene", form])
        return
    advice = "give --preference.scored divergent" if refused == "nll" else "take sigmoid without length_normalize"
    with pytest.raises(SaroError) as caught:
        check_forms(options, ["intervene", form])
    assert str(caught.value) == (
        f"preference.{refused} would teach the wrong steps that {form} pairs have before their fork; {advice}"
    )


def test_a_loss_on_single_responses_is_refused():
    with pytest.raises(SaroError, match=r"preference.loss kto would teach the wrong steps that recover pairs have"):
        check_forms(PreferenceConfig(loss="kto"), ["recover"])


def test_the_nll_after_the_fork_teaches_no_shared_step():
    check_forms(PreferenceConfig(nll=0.1, scored="divergent"), ["recover", "mirror", "sibling"])
