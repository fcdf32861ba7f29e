"""Sums the metrics of stage 2 over all records, and over those of each kind and form."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import reduce

import numpy as np
import torch

from saro.config import PAIR_KINDS
from saro.data.packs import Pack, send
from saro.data.records import SIDES
from saro.train.objective import Metrics
from saro_kernels import TokenStatistics


class Groups:
    """The kinds and forms of records, by which metrics are reported too, whether or not a pack has records of them.

    Args:
        kinds: (n,) the kind of each record, as an index into ``PAIR_KINDS``.
        forms: (n,) the form of each record, as in ``PairSet.forms``; empty if no record has one.
    """

    def __init__(self, kinds: np.ndarray, forms: Sequence[str | None]) -> None:
        form_names = sorted({form for form in forms if form is not None})
        self._names = (*PAIR_KINDS, *form_names)
        members = [kinds == index for index in range(len(PAIR_KINDS))]
        members += [np.array([form == name for form in forms]) for name in form_names]
        self._members = torch.from_numpy(np.stack(members, axis=1))  # (n, groups) bool

    def members(self, records: Sequence[int], device: torch.device) -> torch.Tensor:
        """Return (P, groups) bool, True if the record is in the group."""
        return send(self._members[list(records)], device)

    def sum(
        self, values: Mapping[str, torch.Tensor], members: torch.Tensor, counts: torch.Tensor | None = None
    ) -> Metrics:
        """Sum (P,) values over all records as ``NAME``, and over the records of each group as ``GROUP/NAME``.

        Args:
            members: those of the P records.
            counts: (P,) what each record counts for in the divisor; default 1.
        """
        everyone = torch.ones_like(members[:, :1])
        in_group = torch.cat([everyone, members], dim=1).T  # (groups + 1, P)
        columns = [value.detach().double() for value in values.values()]
        if counts is None:
            counts = torch.ones(len(members), dtype=torch.float64, device=members.device)
        # Stack the values, so that one kernel makes all sums.
        table = torch.stack([*columns, counts.double()])  # (names + 1, P)
        sums = table[None].where(in_group[:, None], 0).sum(-1)  # (groups + 1, names + 1)
        names = tuple(prefix + name for prefix in ("", *(f"{group}/" for group in self._names)) for name in values)
        return Metrics(names, torch.stack([sums[:, :-1], sums[:, -1:].expand(-1, len(values))], dim=2).view(-1, 2))

    def describe_sides(
        self,
        statistics: TokenStatistics,
        pack: Pack,
        members: torch.Tensor,
        sum_sides: Callable[[torch.Tensor], torch.Tensor],
    ) -> Metrics:
        """Return the metrics of ``Objective.describe`` as ``NAME/SIDE``, over all records and those of each group.

        Args:
            members: (P, groups), those of the pack's records.
            sum_sides: sums values (E,) of entries over each side of each record: (P, 2), chosen and rejected.
        """
        parts = []
        for name, row_values in (("entropy", statistics.entropy), ("mean_token_accuracy", statistics.top1)):
            entries = row_values.index_select(0, pack.entry_row).double()
            # Sums over the tokens of each side, then over records, as for the metrics of the loss.
            sums = sum_sides(entries)  # (P, 2)
            rows = sum_sides(torch.ones_like(entries))
            for side, side_name in enumerate(SIDES):
                by_name = {f"{name}/{side_name}": sums[:, side]}
                parts.append(self.sum(by_name, members, rows[:, side]))
        return reduce(Metrics.join, parts)
