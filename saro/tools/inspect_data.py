"""`saro inspect`: how long the records are, and what of them is scored, before any training."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from datetime import date

import numpy as np
from rich.console import Console, Group
from rich.markup import escape
from rich.text import Text
from rich.tree import Tree
from transformers import PreTrainedTokenizerBase

from saro.config import DataConfig, ModelConfig
from saro.data.chat_format import ChatFormat
from saro.data.dataset import ExampleSet, PairSet, encode_files, encode_pair_files
from saro.data.lengths import Report, check_masks
from saro.data.records import holds_pairs, read_examples, read_pairs
from saro.data.tree import RowKind, ScoredSequence, common_prefix
from saro.errors import SaroError, nearest
from saro.model.load import find_model

STYLES = {RowKind.THINK: "cyan", RowKind.ANSWER: "green", RowKind.STOP: "bold red"}


def inspect(
    model: ModelConfig, data: DataConfig, files: Sequence[str], show: int, console: Console, ids: Sequence[str] = ()
) -> None:
    """Print the length report of ``files`` and some of their records as the model will see them.

    The first record tells whether they hold examples or preference pairs.

    Args:
        show: how many of the first records.
        ids: records to show instead of the first.

    Raises:
        SaroError: for what training would refuse.
    """
    source = find_model(model)
    chat = source.chat_format(data, date.fromisoformat(data.template_date) if data.template_date else date.today())
    encoded = _encode(files, chat, source.config.vocab_size)
    of_pairs = isinstance(encoded, PairSet)
    Report.of(encoded).show(console, ", ".join(files))
    lengths = encoded.lengths
    too_long = [encoded.ids[i] for i in np.flatnonzero(lengths > data.pack_tokens)]
    if too_long:
        noun = "pairs" if of_pairs else "records"
        line = f"{len(too_long):,} {noun} are longer than a pack of {data.pack_tokens:,} tokens: {', '.join(too_long)}"
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    missing = [record for record in ids if record not in encoded.ids]
    if missing:
        raise SaroError(f"no record has the id {missing[0]!r}{nearest(missing[0], encoded.ids)}")
    for index in [encoded.ids.index(record) for record in ids] or range(min(show, len(encoded))):
        name = escape(encoded.ids[index])
        if of_pairs:
            console.rule(f"{name}: {lengths[index]} tokens, the shared part once")
            console.print(pair_tree(*encoded.sequences(index), chat.tokenizer))
        else:
            sequence = encoded.sequence(index)
            console.rule(f"{name}: {len(sequence.tokens)} tokens, {len(sequence.row_kinds)} scored")
            console.print(colour(sequence, chat.tokenizer), soft_wrap=True)
    if show or ids:
        legend = Text("not scored: ").append("prompt", "dim").append("   scored: ")
        for kind, style in STYLES.items():
            legend.append(kind.name.lower(), style).append("  ")
        console.rule()
        console.print(legend)


def _encode(files: Sequence[str], chat: ChatFormat, vocabulary: int) -> ExampleSet | PairSet:
    """All records, however long, encoded and checked."""
    if not files:
        raise SaroError("--data names no file; give one, or leave the option out for the demo data")
    if holds_pairs(files[0]):
        pairs = encode_pair_files(files, chat, max_tokens=sys.maxsize, progress=True)
        for side in (pairs.chosen, pairs.rejected):
            check_masks(side, chat, (p for file in files for p in read_pairs(file)), vocabulary)
        return pairs
    examples = encode_files(files, chat, max_tokens=sys.maxsize, progress=True)
    check_masks(examples, chat, (e for file in files for e in read_examples(file)), vocabulary)
    return examples


def pair_tree(chosen: ScoredSequence, rejected: ScoredSequence, tokenizer: PreTrainedTokenizerBase) -> Tree:
    """What both sides of a pair begin with, and from where they part a branch for each."""
    shared = common_prefix([chosen.tokens, rejected.tokens])
    prompt = chosen.scored_from
    label = Text(f"shared: {shared} tokens ({prompt} of the prompt, {shared - prompt} of the responses)", "bold")
    tree = Tree(Group(label, colour(chosen, tokenizer, stop=shared)), guide_style="bold")
    for name, sequence in (("chosen", chosen), ("rejected", rejected)):
        label = Text(f"{name}: {len(sequence.tokens) - shared} tokens", "bold")
        tree.add(Group(label, colour(sequence, tokenizer, start=shared)))
    return tree


def colour(
    sequence: ScoredSequence, tokenizer: PreTrainedTokenizerBase, start: int = 0, stop: int | None = None
) -> Text:
    """The sequence from ``start`` to ``stop`` as text: the prompt dim, scored tokens in the style of their kind."""
    styles = ["dim"] * sequence.scored_from + [STYLES[RowKind(kind)] for kind in sequence.row_kinds]
    text = Text()
    stop = len(styles) if stop is None else stop
    # Runs, not tokens: a character may take several tokens, and half of one is no text.
    for end in range(start + 1, stop + 1):
        if end == stop or styles[end] != styles[start]:
            text.append(tokenizer.decode(sequence.tokens[start:end].tolist()), styles[start])
            start = end
    return text
