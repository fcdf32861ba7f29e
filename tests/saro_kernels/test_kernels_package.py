"""`saro_kernels` is importable, and the folder `kernels/` never poses as the PyPI package of that name.

transformers and bitsandbytes import `kernels` where they find it; a run from the repository root must not feed them
ours.
"""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def run_in_root(code: str) -> str:
    """What `code` prints in a fresh interpreter with the repository root first on sys.path."""
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{code}"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip().splitlines()[-1]


def test_kernels_is_only_a_folder():
    assert sorted(p.name for p in (ROOT / "kernels").glob("*.py")) == []


def test_saro_kernels_imports():
    where = run_in_root("import saro_kernels; print(saro_kernels.__file__, *saro_kernels.__all__)")
    assert Path(where.split()[0]).parent.name == "saro_kernels"
    assert {"token_logps", "lora_linear"} <= set(where.split()[1:])


def test_importing_saro_kernels_loads_nothing_but_torch():
    loaded = run_in_root("import saro_kernels; print('transformers' in sys.modules, 'triton' in sys.modules)")
    assert loaded == "False False"


def test_kernels_is_no_module_of_ours():
    # A namespace package (a bare folder on the path) has no origin; the real package's lies elsewhere.
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
