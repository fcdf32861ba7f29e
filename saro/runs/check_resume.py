"""Check the rules of --resume: which options may change, and which inputs must be those that the run began with."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from saro.config import DataConfig, ModelConfig, PreferenceConfig, TrainConfig, as_dict
from saro.errors import SaroError
from saro.manifest import trained_dtype
from saro.model.identity import is_same_model

# A resumed run may change these options. They change what is written, or how a result is computed but not, up to
# rounding, the result, or for how long the run trains.
_FREE_ON_RESUME = frozenset(
    {
        "model.attention",
        "model.head",
        "model.fused_lora",
        "model.liger",
        "model.gradient_checkpointing",
        "model.activation_offloading",
        "data.allow_overlap",
        "data.pack_tokens",
        "data.too_long",
        "preference.warn_chosen_fell",
        "train.output",
        "train.shard",
        "train.epochs",
        "train.max_steps",
        "train.eval_every",
        "train.patience",
        "train.save_every",
        "train.keep_checkpoints",
        "train.log_every",
        "train.samples",
        "train.sample_tokens",
        "train.trackers",
        "train.run_name",
        "train.track_samples",
    }
)
# These options say where something is. ``check_same_contents`` compares what is there.
_COMPARED_BY_CONTENT = frozenset(
    {
        "model.name",
        "model.revision",
        "data.train",
        "data.heldout",
        "data.chat_template",
        "preference.reference",
    }
)
_GROUPS = {"model": ModelConfig, "data": DataConfig, "preference": PreferenceConfig, "train": TrainConfig}
# If these options are not given, or leave the choice open, a resumed run keeps what it began with.
_KEPT_ON_RESUME = frozenset({"model.dtype", "data.think_tags", "data.template_date", "data.template_variables"})
# Values of options that did not exist when a run of an older version began.
_DEFAULTS = {group: as_dict(options()) for group, options in _GROUPS.items()}


def check_same_options(folder: str, began: Mapping[str, Any], options: Mapping[str, Any]) -> None:
    """Raise SaroError for the first option that has changed since the run began, unless a resumed run may change it.

    Args:
        began: the manifest of the run.
        options: those of the resumed run, as nested dicts.
    """
    for option, (old, new) in changed_options(began, options).items():
        is_kept = option in _KEPT_ON_RESUME and new in (None, "auto")
        if not is_kept and option not in _FREE_ON_RESUME | _COMPARED_BY_CONTENT:
            raise SaroError(
                f"{folder}: the run began with {option} {old}, not {new}; "
                "resume with the same, or start over with --overwrite"
            )


def changed_options(began: Mapping[str, Any], options: Mapping[str, Any]) -> dict[str, list[Any]]:
    """Return the old and the new value of each option that has changed. Options that the run did not know had defaults.

    Arguments as in ``check_same_options``.
    """
    recorded = _recorded_options(began)
    changed = {}
    for group, values in options.items():
        for name, value in values.items():
            old = recorded.get(group, {}).get(name, _DEFAULTS[group].get(name))
            if old != value:
                changed[f"{group}.{name}"] = [old, value]
    return changed


def _recorded_options(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of a run. An older version recorded the dtype and the day as given; here they are what that meant."""
    config = manifest["config"]
    recorded = config | {"data": config["data"] | {"template_date": manifest["template_date"]}}
    if config.get("model", {}).get("dtype") == "auto":
        recorded["model"] = config["model"] | {"dtype": trained_dtype(manifest)}
    return recorded


def check_same_contents(folder: Path, began: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raise SaroError if a part of the run's inputs is not what it began with, or if other records are left out.

    Args:
        began: the manifest of the run.
        now: that of the resumed run.
    """
    same = {
        "data": _data_contents(began) == _data_contents(now),
        "template": began.get("template") == now["template"],
        "model": is_same_model(began.get("model"), now["model"]),
        "reference": is_same_model(began.get("reference"), now["reference"]),
    }
    for part, is_same in same.items():
        if not is_same:
            raise SaroError(
                f"{folder}: the {part} is not what the run began with; restore it, or start over with --overwrite"
            )
    _check_same_records(folder, began, now)


def _check_same_records(folder: Path, began: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raise SaroError if another limit on lengths leaves out other records. The files are known to be the same."""
    for name, report in now["records"].items():
        # Records above the limit are left out: two limits that leave out equally many leave out the same ones.
        old, new = len(began["records"][name]["dropped"]), len(report["dropped"])
        if old != new:
            limit = began["config"]["data"]["pack_tokens"]
            raise SaroError(
                f"{folder}: --data.pack_tokens and --data.too_long now leave out {new} {name} records, and {old} when the "
                f"run began (data.pack_tokens {limit}); resume with a limit that leaves out the same"
            )


def _data_contents(manifest: Mapping[str, Any]) -> tuple[Any, ...]:
    """Return what the sets of a run hold, wherever the files are.

    These are the hashes of the files in order, how many of them are training files, the names of the sets, and the training
    file that each held-out file is, if it is one: both are then hashed once.
    """
    hashes, data = list(manifest.get("data", {}).values()), manifest["config"]["data"]
    train = data["train"]
    shared = [train.index(name) if name in train else None for name in data["heldout"] or []]
    return hashes, len(train), sorted(manifest.get("records", {})), shared
