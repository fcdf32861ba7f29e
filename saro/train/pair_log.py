"""Writes the margin of each pair at every evaluation, and warns when chosen responses lose probability."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from saro.config import PAIR_KINDS
from saro.data.dataset import PairSet
from saro.data.packs import Pack, pack_trees
from saro.distributed.runtime import Runtime
from saro.files import atomic_write
from saro.model.policy import Policy
from saro.train.engine import evaluate
from saro.train.objective import SRPOObjective, Sums

# One line of margins.jsonl, see ``PairLog.take``.
Row = dict[str, float | int | str]
# The warning names at most this many pairs, so that it stays one readable line.
_NAMED = 10


class PairLog:
    """Collects the values of pairs pack by pack, and reads them from the device only when they are asked for.

    Args:
        pairs: the pairs that the packs' records index.
        name: name of this set of pairs in the warning.
        warn_share: warn once if the chosen log-prob has fallen in more than this share of the pairs.
    """

    def __init__(self, runtime: Runtime, pairs: PairSet, name: str, warn_share: float) -> None:
        self._runtime = runtime
        self._pairs = pairs
        self._name = name
        self._warn_share = warn_share
        self._seen: list[tuple[Sequence[int], dict[str, torch.Tensor]]] = []
        self._warned = False

    def observe(self, pack: Pack, sums: Sums) -> None:
        """Keep a pack's values as tensors, without reading them."""
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
        ids, kinds = self._pairs.ids, self._pairs.kinds
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


def evaluate_pairs(
    runtime: Runtime,
    policy: Policy,
    objective: SRPOObjective,
    pairs: PairSet,
    pack_tokens: int,
    *,
    log: PairLog,
    step: int,
    file: Path | None,
) -> dict[str, float]:
    """Return the metrics of pairs under the policy after ``step`` steps, and write a line for each pair to ``file``, if given."""
    packs = pack_trees(pairs.trees(range(len(pairs)), pack_tokens), pack_tokens, runtime.share)
    metrics = evaluate(runtime, policy, objective, packs, log=log)
    rows = log.take(step)
    if runtime.is_main and file is not None:
        write_margins(file, step, rows)
    return metrics


def write_margins(path: Path, step: int, rows: Sequence[Row]) -> None:
    """Append an evaluation's rows to margins.jsonl. Rows of this or later steps, from a killed run, are dropped."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
    with atomic_write(path) as file:
        file.writelines(line for line in lines if json.loads(line)["step"] < step)
        file.writelines(json.dumps(row) + "\n" for row in rows)
