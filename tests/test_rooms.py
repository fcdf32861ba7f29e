"""The rules of the rooms (CONTRIBUTING.md), held by reading every import in the source."""

from __future__ import annotations

import ast
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = ("saro", "kernels", "recipes")

# The rooms that each room may import, from the bottom up: nothing may be imported from further up.
MAY_IMPORT = {
    "kernels": (),
    "data": (),
    "distributed": ("data",),
    "model": ("kernels", "data", "distributed"),
    "checks": ("kernels", "data", "model"),
    "train": ("kernels", "data", "distributed", "model", "checks"),
    "runs": ("data", "distributed", "model", "train"),
    "draws": ("data", "distributed", "model"),
    "demo": (),
    "evaluate": ("data", "distributed", "model", "runs", "draws", "demo"),
    "synth": ("data", "distributed", "model", "runs", "draws", "demo", "evaluate"),
    "report": (),
    "tools": (
        *("kernels", "data", "distributed", "model", "checks", "train"),
        *("runs", "draws", "evaluate", "synth", "report", "demo"),
    ),
    "recipes": (
        *("kernels", "data", "distributed", "model", "checks", "train"),
        *("runs", "draws", "evaluate", "synth", "report", "demo"),
    ),
}
# The files of the root that any room may import. Nobody imports cli.
ROOT_FILES = ("config", "errors", "files", "manifest", "program")
# A library, and the only rooms that may import it. A room that is not a key of MAY_IMPORT is the root.
ONLY_IN = {
    "accelerate": ("distributed",),
    # Only the table of tools may import by a name that is not in the source; this test could not see it.
    "importlib": ("root",),
    "torch.distributed": ("distributed",),
    "peft": ("model", "runs"),
    "matplotlib": ("report",),
    "httpx2": ("draws",),
    "sqlite3": ("draws",),
    "lm_eval": ("evaluate",),
    "rich": ("report", "runs", "tools", "recipes", "root"),
}


@dataclass(frozen=True)
class Import:
    """One import statement: the module that it stands in, and the module that it names."""

    importer: str
    imported: str


def module_name(file: Path, root: Path) -> str:
    """Return the name by which a source file is imported, such as "saro.data.packs" or "recipes.rw"."""
    parts = file.relative_to(root).with_suffix("").parts
    parts = parts[1:] if parts[0] == "kernels" else parts
    return ".".join(parts).removesuffix(".__init__")


def modules(root: Path) -> dict[str, Path]:
    return {module_name(file, root): file for folder in SOURCES for file in (root / folder).rglob("*.py")}


def imports(root: Path) -> Iterator[Import]:
    """Yield every import of every source file, also those inside functions. ``from a import b`` names a.b if it exists."""
    files = modules(root)
    for importer, file in files.items():
        for statement, _ in import_statements(file.read_text()):
            yield from imported_by(statement, importer, files)


@cache
def import_statements(source: str) -> list[tuple[ast.stmt, bool]]:
    """Return the imports of a source text, and whether each runs when the text is imported: those outside functions."""
    tree = ast.parse(source)
    inside = {id(n) for function in ast.walk(tree) if isinstance(function, ast.FunctionDef) for n in ast.walk(function)}
    return [(n, id(n) not in inside) for n in ast.walk(tree) if isinstance(n, (ast.Import, ast.ImportFrom))]


def imported_by(node: ast.stmt, importer: str, files: Collection[str]) -> Iterator[Import]:
    if isinstance(node, ast.Import):
        for alias in node.names:
            yield Import(importer, alias.name)
    elif isinstance(node, ast.ImportFrom):
        assert node.level == 0, f"{importer}: relative import"
        for alias in node.names:
            submodule = f"{node.module}.{alias.name}"
            is_module = submodule in files or submodule in ("torch.distributed", "importlib.metadata")
            yield Import(importer, submodule if is_module else node.module)


def room_of(module: str) -> str:
    parts = module.split(".")
    if parts[0] == "saro_kernels":
        return "kernels"
    if parts[0] == "recipes":
        return "recipes"
    return parts[1] if len(parts) > 1 and parts[1] in MAY_IMPORT else "root"


def tool_of(module: str) -> str:
    """Return the tool that a module of saro.tools belongs to: its file, or its folder."""
    return module.split(".")[2]


def is_within(module: str, package: str) -> bool:
    return (module + ".").startswith(package + ".")


def violation(found: Import) -> str | None:
    """Return what is wrong with an import, None if it keeps the rules."""
    room, target = room_of(found.importer), room_of(found.imported)
    for library, rooms in ONLY_IN.items():
        # importlib.metadata and importlib.util import nothing by name.
        is_library = found.imported == library if library == "importlib" else is_within(found.imported, library)
        if is_library and room not in rooms:
            return f"{found.importer} imports {found.imported}, which only {', '.join(rooms)} may"
    if found.imported.split(".")[0] not in ("saro", "saro_kernels", "recipes"):
        return None
    if target == "root":
        is_allowed = found.imported in ("saro", *(f"saro.{name}" for name in ROOT_FILES))
        is_allowed = is_allowed or (found.importer, found.imported) == ("saro.__main__", "saro.cli")
        is_allowed = is_allowed and room != "kernels"
    elif target == room:
        is_allowed = room != "recipes" and (room != "tools" or tool_of(found.importer) == tool_of(found.imported))
    else:
        # The root imports no room; cli names the tools in a table.
        is_allowed = target in MAY_IMPORT.get(room, ())
    return None if is_allowed else f"{found.importer} ({room}) imports {found.imported} ({target})"


def violations(root: Path) -> list[str]:
    return [text for found in imports(root) if (text := violation(found))]


def reachable(start: str, graph: dict[str, set[str]]) -> set[str]:
    """Return all modules that a module imports, directly or through others."""
    seen: set[str] = set()
    pending = [*graph.get(start, ())]
    while pending:
        module = pending.pop()
        if module not in seen:
            seen.add(module)
            pending += graph.get(module, ())
    return seen


def import_graph(root: Path) -> dict[str, set[str]]:
    graph: dict[str, set[str]] = {}
    for found in imports(root):
        graph.setdefault(found.importer, set()).add(found.imported)
    return graph


@pytest.fixture
def copy(tmp_path) -> Path:
    """A copy of the sources, to plant faults in."""
    for folder in SOURCES:
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("*.jsonl", "__pycache__"))
    return tmp_path


def test_every_import_keeps_the_rules_of_the_rooms():
    assert violations(ROOT) == []


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("saro/data/packs.py", "from saro.model.policy import Policy"),
        ("saro/data/packs.py", "import rich"),
        ("saro/model/policy.py", "from saro.train.engine import fit"),
        ("saro/model/load.py", "from saro.demo import find_demo"),
        ("saro/checks/noise.py", "    import saro.train.reference"),
        ("saro/train/engine.py", "from saro.report.tables import token_table"),
        ("saro/train/engine.py", "from accelerate import Accelerator"),
        ("saro/train/engine.py", "import torch.distributed as dist"),
        ("saro/train/engine.py", "from torch import distributed"),
        ("saro/evaluate/heldout.py", "from saro.train import engine"),
        ("saro/report/tables.py", "from saro.data.lengths import LengthReport"),
        ("saro/tools/chat.py", "from saro.tools.export import run"),
        ("saro/config.py", "from saro.data.tree import RowKind"),
        ("saro/files.py", "from saro import cli"),
        ("saro/data/tree.py", "from importlib import import_module"),
        ("recipes/srpo.py", "import recipes.rw"),
        ("kernels/saro_kernels/lora_group.py", "import saro"),
    ],
)
def test_a_forbidden_import_is_noticed(copy, file, line):
    """Also inside a function, by another spelling, or from the library that another room keeps."""
    body = f"\n\ndef planted():\n    {line.strip()}\n" if line.startswith(" ") else f"\n{line}\n"
    path = copy / file
    path.write_text(path.read_text() + body)
    assert len(violations(copy)) == 1
    assert module_name(path, copy) in violations(copy)[0]


def test_no_room_imports_back_up():
    order = [*MAY_IMPORT]
    for room, below in MAY_IMPORT.items():
        assert all(order.index(other) < order.index(room) for other in below), room


def find_circles(root: Path) -> list[str]:
    graph = import_graph(root)
    return [module for module in modules(root) if module in reachable(module, graph)]


def test_there_is_no_circle_of_imports(copy):
    assert find_circles(ROOT) == []
    packs = copy / "saro/data/tree.py"
    packs.write_text(packs.read_text() + "\nfrom saro.data.packs import Pack\n")
    assert {"saro.data.tree", "saro.data.packs"} <= set(find_circles(copy))


# Libraries that import torch.
TORCH = ("torch", "transformers", "peft", "accelerate", "bitsandbytes", "safetensors.torch")


def imports_torch(root: Path) -> list[str]:
    """Return the modules of report that import torch when they are imported, themselves or through other modules of ours."""
    files = modules(root)
    graph: dict[str, set[str]] = {}
    for importer, file in files.items():
        graph[importer] = {importer.rpartition(".")[0]} - {""}
        for statement, is_outside in import_statements(file.read_text()):
            if is_outside:
                graph[importer] |= {found.imported for found in imported_by(statement, importer, files)}
    reports = [module for module in files if room_of(module) == "report"]
    return [m for m in reports if any(is_within(name, library) for name in reachable(m, graph) for library in TORCH)]


def test_report_never_imports_torch(copy):
    assert imports_torch(ROOT) == []
    tables = copy / "saro/report/tables.py"
    tables.write_text(tables.read_text() + "\nfrom saro.data.packs import Pack\n")  # imports torch
    assert imports_torch(copy) == ["saro.report.tables"]


@pytest.mark.parametrize("planted", ["saro/__init__.py", "saro/report/__init__.py", "saro/program.py"])
def test_torch_on_the_way_to_report_is_noticed(copy, planted):
    (copy / planted).write_text((copy / planted).read_text() + "\nimport torch\n")
    assert "saro.report.plots" in imports_torch(copy)


def test_tables_and_plots_load_without_torch():
    code = "import saro.report.plots, saro.report.tables, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_file_names_are_unique():
    files = [file.stem for folder in (*SOURCES, "benchmarks") for file in (ROOT / folder).rglob("*.py")]
    assert [name for name, number in Counter(files).items() if number > 1 and not name.startswith("__")] == []


def test_the_root_holds_only_what_every_room_needs():
    assert {f.stem for f in (ROOT / "saro").glob("*.py")} == {*ROOT_FILES, "cli", "__init__", "__main__"}
    folders = {f.name for f in (ROOT / "saro").iterdir() if f.is_dir() and f.name != "__pycache__"}
    assert folders == MAY_IMPORT.keys() - {"kernels", "recipes"}


def test_tests_mirror_the_tree():
    folders = {f.name for f in (ROOT / "tests").iterdir() if f.is_dir() and f.name != "__pycache__"}
    assert folders <= {*MAY_IMPORT, "saro_kernels", "benchmarks", "helpers"}
