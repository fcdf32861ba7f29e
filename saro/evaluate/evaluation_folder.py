"""The folder of an evaluation: its lock, its manifest, and its files."""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock

import saro
from saro.config import as_dict
from saro.errors import SaroError
from saro.evaluate.answers import write_rows
from saro.evaluate.options import Options
from saro.files import atomic_write, lock_output
from saro.manifest import package_versions


@dataclass(frozen=True)
class EvaluationFolder:
    """The folder of an evaluation. Only rank 0 reads and writes it.

    Every file in it but labels.jsonl can be made again from the store of draws.

    Attributes:
        path: the folder.
        lock: held to the end of the process, so that two evaluations never write to one folder.
        is_main: True on rank 0.
    """

    path: Path
    lock: FileLock
    is_main: bool

    @classmethod
    def open(cls, options: Options, is_main: bool) -> EvaluationFolder:
        """Look at the folder without writing to it.

        Raises:
            SaroError: it is a file, or holds other files than an evaluation's.
        """
        path = Path(options.output).expanduser()
        if path.is_file():
            raise SaroError(f"{path}: is a file; give a folder with --output")
        is_foreign = is_main and path.is_dir() and read_evaluation(path) is None
        if is_foreign and any(not item.name.startswith(".") for item in path.iterdir()):
            raise SaroError(f"{path}: holds files that are not an evaluation's; give an empty folder with --output")
        return cls(path, FileLock(path / ".lock"), is_main)

    def begin(self, manifest: Mapping[str, Any], items: Iterable[Any]) -> None:
        """Make the folder, take its lock, and write the manifest and the items.

        Raises:
            SaroError: another process evaluates in the folder, or it holds answers of models, suites or attacks that are
                not part of this evaluation, which would be removed from it.
        """
        if not self.is_main:
            return
        busy = f"{self.path}: another process evaluates in this folder; wait for it, or give another one with --output"
        lock_output(self.path, self.lock, busy)
        self._check_nothing_removed(manifest)
        # The scores of an earlier evaluation must not stand beside other answers, whenever this one is stopped.
        (self.path / "scores.json").unlink(missing_ok=True)
        self.write_json("manifest.json", manifest)
        self.write_rows("items.jsonl", items)

    def _check_nothing_removed(self, manifest: Mapping[str, Any]) -> None:
        before = read_evaluation(self.path)
        if before is None:
            return
        for part in ("models", "suites", "attacks"):
            removed = [name for name in before[part] if name not in manifest[part]]
            if removed:
                self.lock.release(force=True)
                raise SaroError(
                    f"{self.path}: holds an evaluation with the {part} {', '.join(removed)} too; "
                    "name them as well, or give another folder with --output"
                )

    def write_rows(self, name: str, rows: Iterable[Any]) -> None:
        """Write a JSONL file of the folder, on rank 0."""
        if self.is_main:
            write_rows(self.path / name, rows)

    def write_json(self, name: str, content: Mapping[str, Any]) -> None:
        """Write a JSON file of the folder, on rank 0. Like all files of the folder, only its owner can read it."""
        if self.is_main:
            with atomic_write(self.path / name) as file:
                os.chmod(file.name, 0o600)
                json.dump(content, file, indent=1, ensure_ascii=False, allow_nan=False)
                file.write("\n")


def read_evaluation(folder: Path) -> dict[str, Any] | None:
    """Return the manifest of the evaluation in a folder; None if it holds none."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    parts = ("models", "suites", "attacks")
    is_one = isinstance(manifest, dict) and manifest.keys() >= {"saro", "evaluation", *parts}
    return manifest if is_one and all(isinstance(manifest[part], dict) for part in parts) else None


def make_manifest(
    options: Options,
    *,
    models: Mapping[str, Any],
    suites: Mapping[str, Any],
    attacks: Mapping[str, Any],
    judge: Mapping[str, Any],
    contaminated: Mapping[str, Any],
) -> dict[str, Any]:
    """Return what an evaluation is made from.

    Args:
        models, suites, attacks: name -> what decides their answers, as hashes.
        judge: name and hash.
        contaminated: model -> prompts of the suites that it was trained on.
    """
    return {
        "saro": saro.__version__,
        "evaluation": 1,
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "versions": package_versions(),
        "models": dict(models),
        "suites": dict(suites),
        "attacks": dict(attacks),
        "judge": dict(judge),
        "contaminated": {name: list(places) for name, places in contaminated.items()},
        "config": as_dict(options),
    }
