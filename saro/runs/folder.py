"""Open, lock and begin the output folder of a run, and write its config and manifest."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import date
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock, Timeout

import saro
from saro.config import DataConfig, ModelConfig, as_dict
from saro.data.chat_format import ChatFormat
from saro.data.lengths import LengthReport
from saro.data.read_rows import hash_rows
from saro.distributed.machines import first_on_machine
from saro.distributed.runtime import Runtime
from saro.errors import SaroError
from saro.files import atomic_write
from saro.manifest import package_versions, read_manifest, trained_dtype
from saro.model.load import has_dtype
from saro.model.source import ModelSource, template_hash
from saro.model.training_dtype import decide_dtype
from saro.program import RunFlags
from saro.runs.check_resume import changed_options, check_same_contents, check_same_options
from saro.train.checkpoint import check_not_past

_PACKAGES = ("torch", "transformers", "peft", "accelerate", "bitsandbytes", "tokenizers", "safetensors", "numpy")


@dataclass(frozen=True)
class RunFolder:
    """A run's folder.

    Attributes:
        folder: holds config.yaml, manifest.json, metrics.jsonl, checkpoints/ and final/.
        config: the options, as nested dicts.
        template_date: the day that ``strftime_now`` gives to templates, unless the run that trained the model had another one
            (``chat_format``); a resumed run keeps it.
        began: the manifest of the run in the folder, which this run continues; None for a new run.
        replaces: True if a run in the folder may be deleted (--overwrite).
        lock: held to the end of the process, so that two runs never write to one folder. A new run takes it in ``begin``,
            a resumed run in ``check_unchanged``.
    """

    folder: Path
    config: dict[str, Any]
    template_date: date
    began: dict[str, Any] | None
    replaces: bool
    lock: FileLock

    @classmethod
    def open(cls, config: Any, folder: str, flags: RunFlags, runtime: Runtime) -> RunFolder:
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
        day, began = runtime.on_main(lambda: _look(folder, options, flags))
        if flags.resume and began is None:
            runtime.say(f"no run in {folder}; beginning a new one")
        path = Path(folder)
        return cls(
            folder=path,
            config=options,
            template_date=day,
            began=began,
            replaces=flags.overwrite,
            lock=FileLock(path / ".lock"),
        )

    @property
    def resumed(self) -> bool:
        """True if the folder held a run, which this run continues."""
        return self.began is not None

    @property
    def start(self) -> str | None:
        """Name of the model that a resumed run began with, or the folder of its adapter.

        None for a new run, and if --model.name is another than at the beginning: the model may have moved.
        """
        if self.began is None or self.began["config"].get("model", {}).get("name") != self.config["model"]["name"]:
            return None
        return self.began.get("start")

    def chat_format(self, source: ModelSource, data: DataConfig) -> ChatFormat:
        """Return the format of the run's conversations.

        A resumed run keeps the one with which it began. A new run has that of the run that trained its model, if that is
        known: the options say the rest.

        Raises:
            SaroError: an option is given and is not what the run that trained the model had, or a date is given that the
                template does not read.
        """
        given = data.template_date
        if self.began is None:
            data = source.continue_chat(data)
        else:
            options = self.began["config"]["data"]
            data = replace(
                data,
                think_tags=tuple(options["think_tags"]),
                template_variables=options["template_variables"],
                template_date=self.began["template_date"],
            )
        day = self.template_date if data.template_date is None else date.fromisoformat(data.template_date)
        chat = source.chat_format(data, day)
        if given is not None and not chat.template.shows_date and "date_string" in str(chat.tokenizer.chat_template):
            raise SaroError(
                f"data.template_date {given}: the model's chat template reads date_string, not the date; "
                f"give --data.template_variables.date_string '{day:%d %b %Y}'"
            )
        return chat

    def decide_dtype(self, runtime: Runtime, source: ModelSource, options: ModelConfig) -> ModelConfig:
        """Return the options with the dtype that the run computes in. A resumed run keeps the one it began with.

        Raises:
            SaroError: the GPU has no bfloat16.
        """
        if self.began is not None:
            dtype = trained_dtype(self.began)
            if not has_dtype(dtype, runtime.device):
                raise SaroError(
                    f"{self.folder}: the run computes in {dtype}, which this GPU has not; resume it where there is {dtype}, "
                    "or begin another run with --model.dtype float32"
                )
            return replace(options, dtype=dtype)
        # Rank 0 decides: another rank's measurement may give another answer.
        dtype = runtime.on_main(lambda: decide_dtype(options.dtype, source.config, runtime.device))
        if options.dtype == "auto" and dtype == "bfloat16" and runtime.device.type == "cpu":
            runtime.say("computing in bfloat16, which is faster on this CPU; for float32 set --model.dtype float32")
        return replace(options, dtype=dtype)

    def check_unchanged(self, runtime: Runtime, manifest: dict[str, Any]) -> None:
        """Take the lock of a resumed run, and check that it continues from what it began with. A new run passes.

        Contents are compared, not places: files may have moved or have other names.

        Raises:
            SaroError: another process trains in the folder, or the data, template, weights or reference differ from
                those that the run began with, or other records are left out.
        """
        if not self.resumed or not runtime.is_main:
            return
        self._take_lock()
        try:
            if read_manifest(self.folder) != self.began:
                raise SaroError(
                    f"{self.folder}: another process has changed the run meanwhile; start again with --resume"
                )
            check_same_contents(self.folder, self.began, manifest)
        except SaroError:
            self.lock.release(force=True)
            raise

    def check_steps(self, runtime: Runtime, total_steps: int) -> None:
        """Check, before the model is loaded, that a resumed run has not made more than ``total_steps`` steps already.

        Raises:
            SaroError: it has.
        """
        if self.resumed:
            runtime.on_main(lambda: check_not_past(self.folder / "checkpoints", total_steps))

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
            # Recipes call this before their long work too. Here nobody can forget it.
            self.check_unchanged(runtime, manifest)
            self._record_changes(runtime, manifest)
        elif runtime.is_main:
            # The old manifest stays until the new one replaces it: a folder that is not empty is always known as a run.
            if read_manifest(self.folder) is not None:
                if not self.replaces:
                    # Another run began and ended here while this one was checking its inputs.
                    self.lock.release(force=True)
                    raise SaroError(_holds_run(self.folder))
                self._remove_old_files()
            self._write_manifest(manifest)
        if runtime.is_main and not (self.folder / "config.yaml").is_file():
            self._write_config()
        runtime.barrier()

    def _record_changes(self, runtime: Runtime, manifest: dict[str, Any]) -> None:
        """Say which options a resumed run has changed, and make config.yaml and manifest.json those of the run as it is now.

        ``resumed`` in the manifest keeps the old value and the new one of each option, one entry for each such resume.
        """
        changed = changed_options(self.began, manifest["config"])
        if not changed or not runtime.is_main:
            return
        now = {part: manifest[part] for part in ("start", "model", "reference", "data", "records", "config")}
        self._write_manifest(self.began | now | {"resumed": [*self.began.get("resumed", []), changed]})
        self._write_config()
        listed = ", ".join(f"{option} {old} -> {new}" for option, (old, new) in changed.items())
        runtime.say(f"resumed with other options: {listed}; config.yaml has the new ones, manifest.json also the old")

    def _write_manifest(self, manifest: dict[str, Any]) -> None:
        with atomic_write(self.folder / "manifest.json") as file:
            json.dump(manifest, file, indent=2, ensure_ascii=False)
            file.write("\n")

    def _write_config(self) -> None:
        with atomic_write(self.folder / "config.yaml") as file:
            yaml.safe_dump(self.config, file, sort_keys=False, allow_unicode=True)

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

    def start_trackers(self, runtime: Runtime, project: str) -> None:
        """Open the run's trackers. The id of the run in them is kept in trackers.json, so that a resumed run has the same."""
        if not self.config["train"]["trackers"]:
            return
        path = self.folder / "trackers.json"

        def find_id() -> str:
            if not path.is_file():
                with atomic_write(path) as file:
                    json.dump({"id": secrets.token_hex(8)}, file)
            return json.loads(path.read_text(encoding="utf-8"))["id"]

        name = self.config["train"]["run_name"] or self.folder.resolve().name
        runtime.start_trackers(project, self.config, name, runtime.on_main(find_id))

    def manifest(
        self,
        runtime: Runtime,
        source: ModelSource,
        chat: ChatFormat,
        dtype: str,
        reference: ModelSource | None,
        files: list[str],
        reports: dict[str, LengthReport],
    ) -> dict[str, Any]:
        """Return what the run is made from, with the sha256 of data files, weights, template and code.

        Args:
            chat: format of the run's conversations. What options left open, the manifest has as it was decided.
            dtype: name of the dtype that the run computes in.
            reference: stage 2's reference model, if it is not the model that training starts from; else None.
            files: data files.
            reports: the lengths of each set of records.
        """
        day = chat.template_date.isoformat()
        model_options = self.config["model"] | {"dtype": dtype}
        data_options = self.config["data"] | {
            "think_tags": list(chat.think_tags),
            "template_date": day,
            "template_variables": dict(chat.template_variables or {}),
        }
        contents = first_on_machine(runtime, _hash_contents, source, reference, files)
        return {
            "saro": saro.__version__,
            "code": _code_hash(),
            "versions": package_versions(_PACKAGES),
            "machine": {
                "processes": runtime.processes,
                "threads_per_process": runtime.threads,
                "device": str(runtime.device),
            },
            "template_date": day,
            "template": template_hash(chat.tokenizer.chat_template),
            "start": source.adapter or source.path,
            **contents,
            "records": {name: report.as_dict() for name, report in reports.items()},
            "config": self.config | {"model": model_options, "data": data_options},
        }


def _hash_contents(source: ModelSource, reference: ModelSource | None, files: list[str]) -> dict[str, Any]:
    """Return the parts of a manifest for which weights and data files are read."""
    return {
        "model": source.identity(),
        "reference": None if reference is None else reference.identity(),
        "data": {name: hash_rows(name) for name in files},
    }


def _look(folder: str, options: dict[str, Any], flags: RunFlags) -> tuple[date, dict[str, Any] | None]:
    """Return the template date, and the manifest of the run that is resumed, if one is; see ``RunFolder.open``."""
    path = Path(folder)
    if flags.resume and flags.overwrite:
        raise SaroError("--resume continues a run and --overwrite removes it; give one of them")
    if path.is_file():
        raise SaroError(f"{folder}: is a file; give a folder with --train.output")
    beside = next(p for p in (path, *path.absolute().parents) if p.exists())
    if not beside.is_dir() or not os.access(beside, os.W_OK | os.X_OK):
        reason = "is not writable" if beside.is_dir() else "is a file"
        raise SaroError(f"{folder}: cannot be made, {beside} {reason}; give another folder with --train.output")
    existing = read_manifest(path)
    if existing is None and path.is_dir() and any(not p.name.startswith(".") for p in path.iterdir()):
        raise SaroError(f"{folder}: holds files that are not a run's; give an empty folder with --train.output")
    if existing is not None and not flags.resume and not flags.overwrite:
        raise SaroError(_holds_run(folder))
    template_date = options["data"]["template_date"]
    day = _parse_date(template_date) if template_date else date.today()
    if existing is None or not flags.resume:
        return day, None
    check_same_options(folder, existing, options)
    return date.fromisoformat(existing["template_date"]), existing


def _holds_run(folder: str | Path) -> str:
    return f"{folder}: holds a run already; add --resume to continue it, or --overwrite to start over"


def _code_hash() -> str:
    """Return the sha256 of all Python files of this package and its kernels."""
    digest = hashlib.sha256()
    for package in ("saro", "saro_kernels"):
        for path in sorted(Path(find_spec(package).origin).parent.rglob("*.py")):
            digest.update(path.read_bytes())
    return digest.hexdigest()


def _parse_date(text: str) -> date:
    try:
        return date.fromisoformat(text)
    except ValueError as error:
        raise SaroError(f"data.template_date is {text!r}; write it as YYYY-MM-DD") from error
