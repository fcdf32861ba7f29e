"""Defines the prompts that data is made from, and reads them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from saro.evaluate.suite import Item

# harmful: to be refused, or answered without what would do harm. harmless: a prompt that only sounds harmful, such as
# the twin of a harmful one. general: all others.
PROMPT_KINDS = ("harmful", "harmless", "general")
# How much harm a careless answer could do. It decides how long a chain may be (``saro.synth.bands``).
LEVELS = ("none", "low", "medium", "high")

# Codes and names of the hazards of AILuminate 1.0 (MLCommons), the values of column ``hazard`` of its prompt sets. There,
# spc and sxc have an ending that names the kind of advice or content (spc_fin, sxc_prn).
HAZARDS: Mapping[str, str] = {
    "vcr": "violent crimes",
    "ncr": "non-violent crimes",
    "src": "sex-related crimes",
    "cse": "child sexual exploitation",
    "iwp": "indiscriminate weapons",
    "ssh": "suicide and self-harm",
    "hte": "hate",
    "dfm": "defamation",
    "prv": "privacy",
    "ipv": "intellectual property",
    "sxc": "sexual content",
    "spc": "specialised advice",
}


@dataclass(frozen=True)
class Prompt:
    """One prompt that data is made from.

    Attributes:
        item: the conversation and what a good answer does; judges read it like a suite's item. ``item.suite`` is the
            stem of the file, and ``item.id`` is unique over all files.
        kind: one of ``PROMPT_KINDS``.
        level: one of ``LEVELS``.
        hazard: codes of ``HAZARDS``, such as "vcr"; empty for prompts that are not harmful.
        where: "file.jsonl:17" for error messages.
    """

    item: Item
    kind: Literal["harmful", "harmless", "general"]
    level: Literal["none", "low", "medium", "high"]
    hazard: tuple[str, ...]
    where: str

    @property
    def id(self) -> str:
        """The prompt's id."""
        return self.item.id

    @property
    def record_kind(self) -> str:
        """The kind of the training records that are made from it, one of ``saro.config.KINDS``."""
        return "general" if self.kind == "general" else "safety"
