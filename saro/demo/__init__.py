"""What the project brings along: demo data, written for it, and the fetcher of the demo model."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

from saro.config import DEMO, TrainConfig

# Where stage 1 puts the demo model that it has trained: by default, and under `make demo`.
_RW_FOLDERS = (TrainConfig().output, "output/demo-rw")


def demo_file(name: str) -> str:
    """Path of a demo data file, such as ``rw_train``."""
    return str(Path(__file__).parent / f"{name}.jsonl")


def data_files(names: Sequence[str], demo: str) -> list[str]:
    """File names with "demo" replaced by the demo data file ``demo``."""
    return [demo_file(demo) if name == DEMO else name for name in names]


def start_of(model: str, say: Callable[[str], None]) -> str:
    """Where stage 2 starts: from the demo model as stage 1 has left it, where there is such a run; else from ``model``."""
    if model != DEMO:
        return model
    for folder in map(Path, _RW_FOLDERS):
        try:
            manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
            of_demo = manifest["config"]["model"]["name"] == DEMO
        except (OSError, ValueError, KeyError, TypeError):
            continue
        if of_demo and (folder / "final").is_dir():
            say(f"starting from what stage 1 has left in {folder / 'final'}")
            return str(folder / "final")
    say(f"no finished run of recipes/rw.py in {' or '.join(_RW_FOLDERS)}: starting from the base model")
    return model
