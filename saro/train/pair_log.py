"""Keeps the margin of each pair at every evaluation, and warns when chosen responses lose probability."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from saro.config import PAIR_KINDS
from saro.data.dataset import PairSet
from saro.data.packs import Pack, pack_trees
from saro.data.unpaired_set import UnpairedSet
from saro.distributed.runtime import Runtime
from saro.model.policy import Policy
from saro.train.engine import evaluate
from saro.train.metrics import Row, write_margins
from saro.train.objective import Objective, Sums

# The warning names at most this many pairs, so that it stays one readable line.
_NAMED = 10


class PairLog:
    """Collects the values of pairs pack by pack, and reads them from the device only when they are asked for.

    Packs of labelled responses have none.

    Args:
        data: the pairs, or labelled responses, that the packs' records index.
        name: name of this set of pairs in the warning.
        warn_share: warn once if the chosen log-prob has fallen in more than this share of the pairs.
    """

    def __init__(self, runtime: Runtime, data: PairSet | UnpairedSet, name: str, warn_share: float) -> None:
        self._runtime = runtime
        self._data = data
        self._name = name
        self._warn_share = warn_share
        self._seen: list[tuple[Sequence[int], dict[str, torch.Tensor]]] = []
        self._warned = False

    def observe(self, pack: Pack, sums: Sums) -> None:
        """Keep a pack's values as tensors, without reading them."""
        if sums.pair_values:
            self._seen.append((pack.pairs, sums.pair_values))

    def take(self, step: int) -> list[Row]:
        """Return a row for each pair that any rank has seen since the last call, in the order of the files.

        A row has step, id, kind and values: ``margin`` in nats and, if whole responses are scored, the changes
        ``delta_logps/chosen`` and ``delta_logps/rejected`` in nats and ``chosen_fell``.
        """
        seen: list[tuple[int, dict[str, float]]] = []
        for records, values in self._seen:
            columns = {name: column.tolist() for name, column in values.items()}
            for i, record in enumerate(records):
                seen.append((record, {name: column[i] for name, column in columns.items()}))
        self._seen.clear()
        ids, kinds = self._data.ids, self._data.kinds
        rows = []
        for record, values in sorted(self._runtime.gather(seen), key=lambda item: item[0]):
            rows.append({"step": step, "id": ids[record], "kind": PAIR_KINDS[kinds[record]], **values})
        self._warn(step, rows)
        return rows

    def watch(self, step: int, means: Mapping[str, float]) -> None:
        """Warn if chosen responses have fallen, and discard the values.

        The values are read, which waits for the device, only if the mean ``chosen_fell`` calls for the warning.
        """
        if self._warned or means.get("chosen_fell", 0.0) <= self._warn_share:
            self._seen.clear()
        else:
            self.take(step)

    def _warn(self, step: int, rows: Sequence[Row]) -> None:
        """Warn once if the chosen log-prob has fallen in more than ``warn_share`` of the rows' pairs."""
        fallen = [str(row["id"]) for row in rows if row.get("chosen_fell")]
        if self._warned or len(fallen) <= self._warn_share * len(rows):
            return
        self._warned = True
        others = f" and {len(fallen) - _NAMED} others" if len(fallen) > _NAMED else ""
        self._runtime.say(
            f"warning: after step {step} the chosen response has lost probability in {len(fallen)} of {len(rows)} "
            f"{self._name} pairs ({', '.join(fallen[:_NAMED])}{others}); "
            "a higher --preference.beta, or --preference.nll, keeps it up"
        )


def evaluate_heldout(
    runtime: Runtime,
    policy: Policy,
    objective: Objective,
    data: PairSet | UnpairedSet,
    pack_tokens: int,
    *,
    log: PairLog,
    step: int,
    output: Path | None,
) -> dict[str, float]:
    """Return the metrics of held-out records under the policy after ``step`` steps.

    If they have margins, each pair has a line in margins.jsonl.

    Args:
        log: reads the margins.
        output: the run's folder; None if margins.jsonl is not to be written.
    """
    records = range(len(data))
    objective.start_step(runtime, policy, records)
    packs = pack_trees(data.trees(records, pack_tokens), pack_tokens, runtime.share)
    metrics = evaluate(runtime, policy, objective, packs, log=log)
    rows = log.take(step)
    if rows and runtime.is_main and output is not None:
        write_margins(output, step, rows)
    return metrics
