"""What becomes of each pair: its margin at every evaluation, and a warning when chosen responses lose probability."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch

from saro.config import PAIR_KINDS
from saro.data.dataset import PairSet
from saro.data.packs import Pack
from saro.distributed.runtime import Runtime
from saro.files import atomic_write
from saro.model.policy import Policy
from saro.train.engine import evaluate
from saro.train.objective import SRPOObjective, Sums
from saro.train.steps import packs_of

Row = dict[str, float | int | str]
# Ids on the warning line.
_NAMED = 10


class PairLog:
    """Collects the values of pairs, pack by pack, and reads them only when they are asked for.

    Args:
        pairs: what the records index.
        name: which pairs these are, for the warning.
        warn_share: a warning tells, once, when the chosen log-prob has fallen in more than this share of the pairs.
    """

    def __init__(self, runtime: Runtime, pairs: PairSet, name: str, warn_share: float) -> None:
        self._runtime, self._pairs, self._name, self._warn_share = runtime, pairs, name, warn_share
        self._seen: list[tuple[Sequence[int], dict[str, torch.Tensor]]] = []
        self._warned = False

    def observe(self, pack: Pack, sums: Sums) -> None:
        """Keep a pack's values. No host read."""
        self._seen.append((pack.records[0::2], sums.pairs))

    def take(self, step: int) -> list[Row]:
        """A row for each pair seen since the last call, by all processes, in the files' order: step, id, kind, values.

        Values: ``margin`` and, unless only divergent tokens are scored, ``delta_logps/chosen`` and
        ``delta_logps/rejected``, nats; ``chosen_fell``.
        """
        found = []
        for records, values in self._seen:
            columns = {name: column.tolist() for name, column in values.items()}
            found += [(record, {k: v[i] for k, v in columns.items()}) for i, record in enumerate(records)]
        self._seen.clear()
        found = sorted(self._runtime.gather(found), key=lambda row: row[0])
        ids, kinds = self._pairs.ids, self._pairs.kinds
        rows = [{"step": step, "id": ids[r], "kind": PAIR_KINDS[kinds[r]], **values} for r, values in found]
        self._warn(step, rows)
        return rows

    def watch(self, step: int) -> None:
        """Look at the pairs seen since the last call for the warning alone."""
        if self._warned or not any("chosen_fell" in values for _, values in self._seen):
            self._seen.clear()
        else:
            self.take(step)

    def _warn(self, step: int, rows: Sequence[Row]) -> None:
        fallen = [str(row["id"]) for row in rows if row.get("chosen_fell")]
        if self._warned or len(fallen) <= self._warn_share * len(rows):
            return
        self._warned = True
        others = f" and {len(fallen) - _NAMED} others" if len(fallen) > _NAMED else ""
        self._runtime.say(
            f"warning: after step {step} the chosen response has lost probability in {len(fallen)} of {len(rows)} "
            f"{self._name} pairs ({', '.join(fallen[:_NAMED])}{others}); a higher --preference.beta, or --preference.nll, "
            "holds it up"
        )


def evaluate_pairs(
    runtime: Runtime,
    policy: Policy,
    objective: SRPOObjective,
    pairs: PairSet,
    pack_tokens: int,
    log: PairLog,
    step: int,
    file: Path,
) -> dict[str, float]:
    """Metrics of pairs under ``policy`` after ``step`` steps; what becomes of each pair goes into ``file``."""
    packs = packs_of(pairs.trees(range(len(pairs)), pack_tokens), pack_tokens, runtime.rank, runtime.processes)
    metrics = evaluate(runtime, policy, objective, packs, observe=log.observe)
    rows = log.take(step)
    if runtime.is_main:
        write_margins(file, step, rows)
    return metrics


def write_margins(path: Path, step: int, rows: Sequence[Row]) -> None:
    """Put the rows of an evaluation after those of earlier steps; what a run that was killed left of later ones goes."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
    with atomic_write(path) as file:
        file.writelines(line for line in lines if json.loads(line)["step"] < step)
        file.writelines(json.dumps(row) + "\n" for row in rows)
