"""What the project brings along: demo data, written for it, and the fetcher of the demo model."""

from collections.abc import Callable, Sequence
from pathlib import Path

from saro.config import DEMO, TrainConfig
from saro.demo.demo_model import demo_model
from saro.manifest import read_manifest

# Where stage 1 puts the demo model that it has trained: by default, and under `make demo`.
_RW_FOLDERS = (TrainConfig().output, "output/demo-rw")


def demo_file(name: str) -> str:
    """Path of a demo data file, such as ``rw_train``."""
    return str(Path(__file__).parent / f"{name}.jsonl")


def data_files(names: Sequence[str], demo: str) -> list[str]:
    """File names with "demo" replaced by the demo data file ``demo``."""
    return [demo_file(demo) if name == DEMO else name for name in names]


def find_start(model: str, say: Callable[[str], None]) -> str:
    """Where stage 2 starts: from the demo model as stage 1 has left it, where there is such a run; else from ``model``."""
    if model != DEMO:
        return model
    for folder in map(Path, _RW_FOLDERS):
        manifest = read_manifest(folder)
        trained_demo = manifest is not None and manifest["config"].get("model", {}).get("name") == DEMO
        if trained_demo and (folder / "final").is_dir():
            say(f"starting from what stage 1 has left in {folder / 'final'}")
            return str(folder / "final")
    say(f"no finished run of recipes/rw.py in {' or '.join(_RW_FOLDERS)}: starting from the base model")
    return model


def find_demo(name: str) -> str:
    """Return a model's name, with "demo" replaced by the folder of the demo model, which is fetched if it is not there."""
    return str(demo_model()) if name == DEMO else name
