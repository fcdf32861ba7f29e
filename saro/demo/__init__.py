"""Provides the demo: data that was written for this project, and the model that ``demo_model`` downloads."""

from collections.abc import Callable, Sequence
from pathlib import Path

from saro.config import DEMO, TrainConfig
from saro.demo.fetch_model import demo_model
from saro.manifest import read_manifest

# Output folders of stage 1 on the demo model: the default, and that of `make demo`.
_RW_FOLDERS = (TrainConfig().output, "output/demo-rw")
# Suites of the demo: harmless prompts with their harmful sisters, and questions with one right answer.
_SUITES = ("twins", "ability")
# Names of the prompts for data construction that come with saro, and their files.
_PROMPTS = {DEMO: "prompts", "twins": "twin_prompts"}


def demo_file(name: str) -> str:
    """Return the path of a demo data file, such as ``rw_train``."""
    return str(Path(__file__).parent / f"{name}.jsonl")


def data_files(names: Sequence[str], demo: str) -> list[str]:
    """Return the file names, with "demo" replaced by the path of the demo data file ``demo``."""
    return [demo_file(demo) if name == DEMO else name for name in names]


def suite_files(names: Sequence[str]) -> list[str]:
    """Return the file names of suites, with "demo" replaced by the paths of the demo's suites."""
    files: list[str] = []
    for name in names:
        files += [demo_file(suite) for suite in _SUITES] if name == DEMO else [name]
    return files


def prompt_files(names: Sequence[str]) -> list[str]:
    """Return the file names of prompts for data construction, with "demo" and "twins" replaced by the paths of ours."""
    return [demo_file(_PROMPTS[name]) if name in _PROMPTS else name for name in names]


def find_start(model: str, say: Callable[[str], None]) -> str:
    """Return the name of the model that stage 2 starts from: ``model``, unless that is the demo.

    The demo starts from the model that stage 1 trained, or from the base model if there is no finished run. A line says
    which of the two it is.
    """
    if model != DEMO:
        return model
    for folder in map(Path, _RW_FOLDERS):
        manifest = read_manifest(folder)
        trained_demo = manifest is not None and manifest["config"].get("model", {}).get("name") == DEMO
        if trained_demo and (folder / "final").is_dir():
            say(f"starting from the model that stage 1 trained: {folder / 'final'}")
            return str(folder / "final")
    say(f"no finished run of recipes/rw.py in {' or '.join(_RW_FOLDERS)}: starting from the base model")
    return model


def find_demo(name: str) -> str:
    """Return a model's name, with "demo" replaced by the demo model's folder, which is made if it does not exist."""
    return str(demo_model()) if name == DEMO else name
