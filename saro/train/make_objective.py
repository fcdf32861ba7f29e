"""Chooses the objective that the options of stage 2 ask for."""

from __future__ import annotations

from saro.config import PreferenceConfig
from saro.data.dataset import PairSet
from saro.data.packs import PairLogps
from saro.data.unpaired_set import UnpairedSet
from saro.train.kto_objective import KTOObjective
from saro.train.srpo_objective import SRPOObjective


def make_objective(
    data: PairSet | UnpairedSet, reference: PairLogps | None, options: PreferenceConfig, pack_tokens: int
) -> SRPOObjective | KTOObjective:
    """Return the objective of a set of pairs, or of one of labelled responses.

    Args:
        reference: log-probs of ``data.as_pairs``; None for a loss without a reference.
        pack_tokens: budget of a pack.
    """
    if isinstance(data, UnpairedSet):
        return KTOObjective(data, reference, options, pack_tokens)
    return SRPOObjective(data.kinds, reference, options, data.forms)
