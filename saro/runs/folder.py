"""The output folder of a run: config, manifest, and what --resume and --overwrite may do with it."""

from __future__ import annotations

import hashlib
import json
import platform
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock, Timeout

import saro
from saro.config import START, ModelConfig, as_dict
from saro.data.lengths import Report
from saro.distributed.runtime import Runtime
from saro.errors import SaroError
from saro.files import atomic_write, file_hash
from saro.model.load import ModelSource, find_model

_PACKAGES = ("torch", "transformers", "peft", "accelerate", "bitsandbytes", "tokenizers", "safetensors", "numpy")
# These change what is written, or when, and not what is learned: a resumed run may set them anew.
_FREE_ON_RESUME = frozenset(
    {
        "train.output",
        "train.eval_every",
        "train.save_every",
        "train.keep_checkpoints",
        "train.log_every",
        "train.samples",
        "train.sample_tokens",
        "train.trackers",
        "data.template_date",
        "preference.warn_chosen_fell",
    }
)


@dataclass(frozen=True)
class Run:
    """A run's folder.

    Attributes:
        folder: config.yaml, manifest.json, metrics.jsonl, checkpoints/, final/.
        config: the options, as nested dicts.
        template_date: the day that templates see, the same after a resume.
        resumed: the folder held a run, which goes on.
        lock: held from ``begin`` to the end of the process, so that two runs never write one folder.
    """

    folder: Path
    config: dict[str, Any]
    template_date: date
    resumed: bool
    lock: FileLock

    @classmethod
    def open(cls, config: Any, folder: str, *, resume: bool, overwrite: bool, template_date: str | None) -> Run:
        """Look at the folder; nothing is written or removed yet.

        Raises:
            SaroError: the folder holds a run and neither flag is given, or --resume with other options.
        """
        path, options = Path(folder), as_dict(config)
        if resume and overwrite:
            raise SaroError("--resume goes on with a run and --overwrite removes it; give one of them")
        if path.is_file():
            raise SaroError(f"{folder}: is a file; give a folder with --train.output")
        began = manifest_of(path)
        held = began is not None
        if not held and path.is_dir() and any(not p.name.startswith(".") for p in path.iterdir()):
            raise SaroError(f"{folder}: holds files that are no run's; give an empty folder with --train.output")
        if held and not resume and not overwrite:
            raise SaroError(
                f"{folder}: holds a run already; add --resume to go on with it, or --overwrite to start anew"
            )
        today = _parse_date(template_date) if template_date else date.today()
        if began is not None and resume:
            _check_same_options(folder, began["config"], options)
            today = date.fromisoformat(began["template_date"])
        return cls(path, options, today, held and resume, FileLock(path / ".lock"))

    def start(self) -> str | None:
        """The model that a resumed run began with: its adapter's folder, or the model itself; None for a new run."""
        return (manifest_of(self.folder) or {}).get("start") if self.resumed else None

    def check(self, runtime: Runtime, manifest: dict[str, Any]) -> None:
        """Of a resumed run, check that what it was made from is what there is now, and take its lock.

        Raises:
            SaroError: another process trains in the folder; or data, template, weights or reference differ from those
                that the run began with.
        """
        if not self.resumed:
            return
        if runtime.is_main:
            self._take_lock()
        began = manifest_of(self.folder) or {}
        for part in ("data", "template", "model", "reference"):
            if began.get(part) != manifest[part]:
                self.lock.release(force=True)
                raise SaroError(
                    f"{self.folder}: the {part} is not what the run began with; restore it, "
                    "or start anew with --overwrite"
                )

    def begin(self, runtime: Runtime, manifest: dict[str, Any]) -> None:
        """Make the folder, or check that what it was made from is what there is now.

        Raises:
            SaroError: as ``check``.
        """
        # Every process has looked at the folder before the first one writes to it.
        runtime.barrier()
        if runtime.is_main:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._take_lock()
        if self.resumed:
            self.check(runtime, manifest)
        elif runtime.is_main:
            # At every moment a folder that is not empty holds a manifest, by which it is known as a run.
            manifest_file = self.folder / "manifest.json"
            for item in self.folder.iterdir() if manifest_of(self.folder) else ():
                # Hidden files are the user's, such as .gitignore, or what a killed process left.
                if item == manifest_file or (item.name.startswith(".") and not item.name.endswith(".tmp")):
                    continue
                if item.is_dir() and not item.is_symlink():
                    shutil.rmtree(item)
                else:
                    item.unlink()
            with atomic_write(manifest_file) as file:
                json.dump(manifest, file, indent=2, ensure_ascii=False)
                file.write("\n")
        if runtime.is_main and not (self.folder / "config.yaml").is_file():
            with atomic_write(self.folder / "config.yaml") as file:
                yaml.safe_dump(self.config, file, sort_keys=False, allow_unicode=True)
        runtime.barrier()

    def _take_lock(self) -> None:
        try:
            self.lock.acquire(timeout=0)
        except Timeout as error:
            raise SaroError(
                f"{self.folder}: another process trains in this folder; wait for it or stop it, "
                "or give another folder with --train.output"
            ) from error

    def once(self, runtime: Runtime, name: str, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What ``measure`` gives, from the file ``name`` where a resumed run has it already."""
        path = self.folder / name
        known = self.resumed and path.is_file()
        runtime.barrier()
        if known:
            return json.loads(path.read_text(encoding="utf-8"))
        measured = measure()
        if runtime.is_main:
            with atomic_write(path) as file:
                json.dump(measured, file, indent=2, ensure_ascii=False)
        return measured

    def manifest(
        self, source: ModelSource, files: list[str], reports: dict[str, Report], runtime: Runtime
    ) -> dict[str, Any]:
        """What the run is made from, with sha256 of every file."""
        return {
            "saro": saro.__version__,
            "code": _code_hash(),
            "versions": {"python": platform.python_version()} | {name: version(name) for name in _PACKAGES},
            "machine": {
                "processes": runtime.processes,
                "threads_per_process": runtime.threads,
                "device": str(runtime.device),
            },
            "template_date": self.template_date.isoformat(),
            "template": hashlib.sha256(str(source.tokenizer.chat_template or "").encode()).hexdigest(),
            "start": source.adapter or source.path,
            "model": source.identity(),
            "reference": self._reference(),
            "data": {name: file_hash(Path(name)) for name in files},
            "records": {name: report.as_dict() for name, report in reports.items()},
            "config": self.config,
        }

    def _reference(self) -> dict[str, Any] | None:
        """Identity of the model that stage 2 takes as its reference; None where that is where training starts."""
        name = self.config.get("preference", {}).get("reference", START)
        return (
            None
            if name == START
            else find_model(
                ModelConfig(name=name, trust_remote_code=self.config["model"]["trust_remote_code"])
            ).identity()
        )


def manifest_of(folder: Path) -> dict[str, Any] | None:
    """The manifest of the run in a folder; None where there is no run: other programs write a manifest.json too."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    ours = isinstance(manifest, dict) and {"saro", "config", "template_date"} <= manifest.keys()
    return manifest if ours else None


def _code_hash() -> str:
    digest = hashlib.sha256()
    for path in sorted(Path(saro.__file__).parent.rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _parse_date(text: str) -> date:
    try:
        return date.fromisoformat(text)
    except ValueError as error:
        raise SaroError(f"data.template_date is {text!r}; write it as YYYY-MM-DD") from error


def _check_same_options(folder: str, began: dict[str, Any], now: dict[str, Any]) -> None:
    for group, options in now.items():
        for name, value in options.items():
            option = f"{group}.{name}"
            if option not in _FREE_ON_RESUME and began.get(group, {}).get(name) != value:
                raise SaroError(
                    f"{folder}: the run began with {option} {began.get(group, {}).get(name)}, not {value}; "
                    "resume with the same, or start anew with --overwrite"
                )
