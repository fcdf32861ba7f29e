"""Tests that `saro_kernels` imports and that Python never takes the folder `kernels/` for the PyPI package `kernels`.

transformers and bitsandbytes import `kernels` if they find it. A run from the repository root must not give them our
folder.
"""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def run_in_root(code: str) -> str:
    """Return the last line that `code` prints in a new interpreter with the repository root first on sys.path."""
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{code}"
    process = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr
    return process.stdout.strip().splitlines()[-1]


def test_the_kernels_folder_has_no_modules():
    assert sorted(p.name for p in (ROOT / "kernels").glob("*.py")) == []


def test_saro_kernels_imports():
    file, *names = run_in_root("import saro_kernels; print(saro_kernels.__file__, *saro_kernels.__all__)").split()
    assert Path(file).parent.name == "saro_kernels"
    assert {"token_logps", "lora_linear"} <= set(names)


def test_importing_saro_kernels_imports_neither_transformers_nor_triton():
    loaded = run_in_root("import saro_kernels; print('transformers' in sys.modules, 'triton' in sys.modules)")
    assert loaded == "False False"


def test_import_kernels_does_not_find_our_folder():
    # A namespace package (a folder without __init__.py) has no origin; the origin of the PyPI package is elsewhere.
    origin = run_in_root("import importlib.util as u; s = u.find_spec('kernels'); print(s.origin if s else None)")
    assert not origin.startswith(str(ROOT / "kernels"))


def test_transformers_sees_only_the_real_package():
    code = (
        "import importlib.metadata as m\n"
        "from transformers.utils import is_kernels_available\n"
        "real = any(d.metadata['Name'] == 'kernels' for d in m.distributions())\n"
        "print(is_kernels_available() <= real)"
    )
    assert run_in_root(code) == "True"
