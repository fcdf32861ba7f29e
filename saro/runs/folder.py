"""The output folder of a run: its config and manifest, and the rules of --resume and --overwrite."""

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
from saro.config import as_dict
from saro.data.lengths import LengthReport
from saro.distributed.runtime import Runtime
from saro.errors import SaroError
from saro.files import atomic_write, file_hash
from saro.manifest import read_manifest
from saro.model.source import ModelSource
from saro.program import RunFlags

_PACKAGES = ("torch", "transformers", "peft", "accelerate", "bitsandbytes", "tokenizers", "safetensors", "numpy")
# These options change what is written, or when, but not what is learned: a resumed run may change them.
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
class RunFolder:
    """A run's folder.

    Attributes:
        folder: holds config.yaml, manifest.json, metrics.jsonl, checkpoints/ and final/.
        config: the options, as nested dicts.
        template_date: the day that templates see as today; a resumed run keeps it.
        resumed: True if the folder held a run, which this run continues.
        start: the model that a resumed run began with, or the folder of its adapter; None for a new run.
        lock: held to the end of the process, so that two runs never write to one folder. A new run takes it in ``begin``,
            a resumed run in ``check_unchanged``.
    """

    folder: Path
    config: dict[str, Any]
    template_date: date
    resumed: bool
    start: str | None
    lock: FileLock

    @classmethod
    def open(cls, config: Any, folder: str, flags: RunFlags, template_date: str | None, runtime: Runtime) -> RunFolder:
        """Look at the folder without writing to it or deleting anything.

        Only rank 0 looks, at its folder and at its calendar: what the other ranks see there may be older, or missing.

        Raises:
            SaroError: the folder holds a run and neither flag is given, the run is resumed with other options, the
                folder holds other files, both flags are given, or a rank was started with other options than rank 0.
        """
        options = as_dict(config)
        given = {f"--{group}.{name}": repr(value) for group, part in options.items() for name, value in part.items()}
        given |= {f"--{name}": repr(value) for name, value in flags._asdict().items()}
        runtime.compare(given, "start every rank with the same options")
        day, resumed, start = runtime.on_main(lambda: _look(folder, options, flags, template_date))
        path = Path(folder)
        return cls(
            folder=path, config=options, template_date=day, resumed=resumed, start=start, lock=FileLock(path / ".lock")
        )

    def check_unchanged(self, runtime: Runtime, manifest: dict[str, Any]) -> None:
        """Take the lock of a resumed run, and check that it continues from what it began with. A new run passes.

        Raises:
            SaroError: another process trains in the folder, or the data, template, weights or reference differ from
                those that the run began with.
        """
        if not self.resumed or not runtime.is_main:
            return
        self._take_lock()
        began = read_manifest(self.folder) or {}
        for part in ("data", "template", "model", "reference"):
            if began.get(part) != manifest[part]:
                self.lock.release(force=True)
                raise SaroError(
                    f"{self.folder}: the {part} is not what the run began with; restore it, "
                    "or start over with --overwrite"
                )

    def begin(self, runtime: Runtime, manifest: dict[str, Any]) -> None:
        """Make the folder with its manifest and config. From here on it is written.

        Raises:
            SaroError: see ``check_unchanged``.
        """
        # Wait until every rank has looked at the folder, before rank 0 writes to it.
        runtime.barrier()
        if runtime.is_main:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._take_lock()
        if self.resumed:
            # Recipes call it before their long work too; here nobody can forget it.
            self.check_unchanged(runtime, manifest)
        elif runtime.is_main:
            # The old manifest stays until the new one replaces it: a folder that is not empty is always known as a run.
            if read_manifest(self.folder) is not None:
                self._remove_old_files()
            with atomic_write(self.folder / "manifest.json") as file:
                json.dump(manifest, file, indent=2, ensure_ascii=False)
                file.write("\n")
        if runtime.is_main and not (self.folder / "config.yaml").is_file():
            with atomic_write(self.folder / "config.yaml") as file:
                yaml.safe_dump(self.config, file, sort_keys=False, allow_unicode=True)
        runtime.barrier()

    def _remove_old_files(self) -> None:
        """Delete the files of the run that --overwrite replaces, except its manifest."""
        for item in self.folder.iterdir():
            # Hidden files are the user's, such as .gitignore; hidden .tmp files were left by a killed process.
            is_users = item.name.startswith(".") and not item.name.endswith(".tmp")
            if is_users or item.name == "manifest.json":
                continue
            if item.is_dir() and not item.is_symlink():
                shutil.rmtree(item)
            else:
                item.unlink()

    def _take_lock(self) -> None:
        try:
            self.lock.acquire(timeout=0)
        except Timeout as error:
            raise SaroError(
                f"{self.folder}: another process trains in this folder; wait for it or stop it, "
                "or give another folder with --train.output"
            ) from error

    def once(self, runtime: Runtime, name: str, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Return the result of ``measure`` and write it to the file ``name``.

        A resumed run that already has the file reads it instead.
        """
        path = self.folder / name
        is_measured = self.resumed and path.is_file()
        known = runtime.on_main(lambda: json.loads(path.read_text(encoding="utf-8")) if is_measured else None)
        if known is not None:
            return known
        measured = measure()
        if runtime.is_main:
            with atomic_write(path) as file:
                json.dump(measured, file, indent=2, ensure_ascii=False)
        return measured

    def manifest(
        self,
        runtime: Runtime,
        source: ModelSource,
        reference: ModelSource | None,
        files: list[str],
        reports: dict[str, LengthReport],
    ) -> dict[str, Any]:
        """Return what the run is made from, with the sha256 of data files, weights, template and code.

        Args:
            reference: stage 2's reference model, if it is not the model that training starts from; else None.
            files: data files.
            reports: the lengths of each set of records.
        """
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
            "reference": None if reference is None else reference.identity(),
            "data": {name: file_hash(Path(name)) for name in files},
            "records": {name: report.as_dict() for name, report in reports.items()},
            "config": self.config,
        }


def _look(
    folder: str, options: dict[str, Any], flags: RunFlags, template_date: str | None
) -> tuple[date, bool, str | None]:
    """Return the template date, True if a run is resumed, and the model that it began with; see ``RunFolder.open``."""
    path = Path(folder)
    if flags.resume and flags.overwrite:
        raise SaroError("--resume continues a run and --overwrite removes it; give one of them")
    if path.is_file():
        raise SaroError(f"{folder}: is a file; give a folder with --train.output")
    existing = read_manifest(path)
    if existing is None and path.is_dir() and any(not p.name.startswith(".") for p in path.iterdir()):
        raise SaroError(f"{folder}: holds files that are not a run's; give an empty folder with --train.output")
    if existing is not None and not flags.resume and not flags.overwrite:
        raise SaroError(f"{folder}: holds a run already; add --resume to continue it, or --overwrite to start over")
    day = _parse_date(template_date) if template_date else date.today()
    if existing is None or not flags.resume:
        return day, False, None
    _check_same_options(folder, existing["config"], options)
    return date.fromisoformat(existing["template_date"]), True, existing.get("start")


def _code_hash() -> str:
    """Return the sha256 of all Python files of this package."""
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
    """Raise SaroError for the first option that is not as the run began, unless a resumed run may change it."""
    for group, options in now.items():
        for name, value in options.items():
            option, old_value = f"{group}.{name}", began.get(group, {}).get(name)
            if option not in _FREE_ON_RESUME and old_value != value:
                raise SaroError(
                    f"{folder}: the run began with {option} {old_value}, not {value}; "
                    "resume with the same, or start over with --overwrite"
                )
