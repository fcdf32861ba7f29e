"""Importing saro configures torch's allocator before torch is loaded, and loads no more than it needs."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from saro.model import _compile_when_called

NAMES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")
CODE = """
import os
import saro
import torch
given = [os.environ[name] for name in {names} if name in os.environ]
# torch 2.11 does not say what it has read: there, only the variable is tested.
read = getattr(torch._C, "_accelerator_getAllocatorSettings", lambda: given[0])
print(given, read())
"""


def settings(**given: str) -> str:
    """Return the allocator's variables that are set after an import, and what torch has read from them."""
    environment = {name: value for name, value in os.environ.items() if name not in NAMES} | given
    command = [sys.executable, "-c", CODE.format(names=NAMES)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.strip()


@pytest.mark.skipif(sys.platform != "linux", reason="torch has no expandable segments elsewhere")
def test_torch_has_expandable_segments():
    assert settings() == "['expandable_segments:True'] expandable_segments:True"


@pytest.mark.parametrize("name", NAMES[:2])
def test_what_the_user_has_configured_stays(name):
    assert settings(**{name: "max_split_size_mb:64"}) == "['max_split_size_mb:64'] max_split_size_mb:64"


def test_conversions_of_public_sets_do_not_wait_for_torch():
    code = "import sys, saro.tools.convert; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def say_if_compiler_is_loaded() -> None:
    print("torch._inductor.compile_fx" in sys.modules)


def test_recipes_do_not_wait_for_torchs_compiler(recipes):
    """bitsandbytes would import it."""
    assert recipes.run(call=f"{__file__}:say_if_compiler_is_loaded").out == "False\n"


def test_what_is_compiled_later_is_compiled_once_as_it_was_asked_for(monkeypatch):
    asked = []

    def compiled(function, **options):
        asked.append((function, options))
        return lambda x: function(x) + 1

    def double(x):
        return 2 * x

    monkeypatch.setattr(torch, "compile", compiled)
    later = _compile_when_called(dynamic=False)(double)
    assert asked == []
    assert [later(1), later(2)] == [3, 5]
    assert asked == [(double, {"dynamic": False})]
