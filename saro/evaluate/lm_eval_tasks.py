"""Finds lm-eval's tasks, and says in one line what is wrong with one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lm_eval.tasks import TaskManager

from saro.errors import SaroError


class CheckedTasks(TaskManager):
    """lm-eval's tasks and those of a folder.

    Args:
        include_path: folder with more tasks, or None.

    Raises:
        SaroError: there is no such folder.
    """

    def __init__(self, include_path: str | None) -> None:
        if include_path is not None and not Path(include_path).expanduser().is_dir():
            raise SaroError(f"--include_path {include_path}: there is no such folder")
        super().__init__(include_path=include_path and str(Path(include_path).expanduser()))

    def load(self, task_list: Any) -> Any:
        """Load tasks with their data.

        Raises:
            SaroError: a task cannot be loaded, runs code that the model wrote, or shows pictures.
        """
        try:
            loaded = super().load(task_list)
        # A task runs code of its own, which may raise anything: a package is missing, the hub is out of reach.
        except Exception as error:
            reason = " ".join(str(error).split())[:200]
            names = ", ".join(map(str, task_list))
            raise SaroError(
                f"--tasks {names}: a task or its data cannot be loaded ({type(error).__name__}: {reason}); see to its data "
                "and packages, or leave it out"
            ) from error
        for name, task in loaded["tasks"].items():
            if getattr(task, "UNSAFE_CODE", False):
                raise SaroError(
                    f"--tasks {name}: runs code that the model writes; leave it out, or run it in a sandbox"
                )
            if getattr(task, "MULTIMODAL", False):
                raise SaroError(f"--tasks {name}: shows pictures, and the model reads text; leave it out")
        return loaded
