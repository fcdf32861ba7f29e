"""Loads the records of a run as checked token ids: small files into memory, large ones mapped by all ranks of a machine."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from saro.checks import check_masks as check_module
from saro.checks.check_masks import check_masks
from saro.config import DataConfig, PreferenceConfig
from saro.data.chat_format import ChatFormat
from saro.data.dataset import ExampleSet, PairSet
from saro.data.encode_files import encode_files, encode_pair_files
from saro.data.encoded_folder import MAPPED_BYTES, map_encoded
from saro.data.unpaired_set import UnpairedSet, encode_unpaired_files
from saro.distributed.machines import first_on_machine
from saro.distributed.runtime import Runtime
from saro.files import file_hash
from saro.model.architectures import TokenLimits


def load_examples(
    runtime: Runtime, paths: Sequence[str], chat: ChatFormat, options: DataConfig, limits: TokenLimits
) -> ExampleSet:
    """Read, encode and check files of examples; see ``encode_files``, ``check_masks`` and ``map_encoded``.

    Args:
        limits: what the model's sequences may hold.

    Raises:
        SaroError: names the first record that is wrong.
    """
    return _load("examples", runtime, paths, chat, options, limits)


def load_preferences(
    runtime: Runtime,
    paths: Sequence[str],
    chat: ChatFormat,
    options: DataConfig,
    limits: TokenLimits,
    preference: PreferenceConfig,
) -> PairSet | UnpairedSet:
    """Read, encode and check files of what a loss of stage 2 takes, as ``load_examples`` does examples.

    It takes pairs, and kto labelled responses, which are always loaded into memory.
    """
    if not preference.is_unpaired:
        return _load("pairs", runtime, paths, chat, options, limits)
    return encode_unpaired_files(
        paths, chat, options, progress=runtime.is_main, check=partial(check_masks, limits=limits)
    )


def _load(
    kind: str, runtime: Runtime, paths: Sequence[str], chat: ChatFormat, options: DataConfig, limits: TokenLimits
) -> ExampleSet | PairSet:
    check = partial(check_masks, limits=limits)
    # Rank 0 decides: where another one has other files, they must still meet in the same collectives.
    if not runtime.on_main(lambda: _are_large(paths)):
        encode = encode_pair_files if kind == "pairs" else encode_files
        return encode(paths, chat, options, progress=runtime.is_main, check=check)
    return first_on_machine(
        runtime,
        lambda: map_encoded(
            kind,
            paths,
            chat,
            options,
            check=check,
            checked=limits._asdict()
            | {"placeholders": sorted(limits.placeholders), "check": file_hash(Path(check_module.__file__))},
            say=runtime.say,
            progress=runtime.is_main,
        ),
    )


def _are_large(paths: Sequence[str]) -> bool:
    """Return True if the files are worth the cache: not those of the hub, which has its own. If one is missing, the reader says so."""
    files = [Path(path) for path in paths]
    return all(file.is_file() for file in files) and sum(file.stat().st_size for file in files) >= MAPPED_BYTES
