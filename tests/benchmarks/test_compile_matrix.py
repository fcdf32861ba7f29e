"""Tests that every Triton kernel compiles for every GPU generation without spilling registers. They need no GPU."""

from __future__ import annotations

import importlib
import json
import os
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import saro_kernels

triton = pytest.importorskip("triton", reason="the test extra brings triton for Linux")

ROOT = Path(__file__).parents[2]
TARGETS = {"sm_80", "sm_86", "sm_89", "sm_90", "sm_120", "gfx942"}


@pytest.fixture(scope="module")
def builds(tmp_path_factory):
    """Compile all kernels in a new process: in this one, Triton runs as an interpreter."""
    file = tmp_path_factory.mktemp("compiled") / "builds.json"
    command = [sys.executable, "benchmarks/compile_matrix.py", "--json", str(file)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    return json.loads(file.read_text())


def describe(build):
    vocab = "" if build["vocab"] is None else f", V = {build['vocab']}"
    return f"{build['kernel']} ({build['variant']}, {build['dtype']}{vocab}) for {build['target']}"


def test_every_kernel_builds_for_every_target_in_every_dtype(builds):
    kernels = set()
    for module in pkgutil.iter_modules(saro_kernels.__path__):
        for value in vars(importlib.import_module(f"saro_kernels.{module.name}")).values():
            if isinstance(value, triton.runtime.KernelInterface) and not value.__name__.startswith("_"):
                kernels.add(value.__name__)
    assert kernels
    for kernel in kernels:
        kernel_builds = [b for b in builds if b["kernel"] == kernel]
        assert {b["target"] for b in kernel_builds} == TARGETS
        for target in TARGETS:
            dtypes = {b["dtype"] for b in kernel_builds if b["target"] == target}
            assert dtypes == {"float32", "bfloat16", "float16"}


@pytest.mark.parametrize("option", ["log-probs", "statistics", "gradient", "gradient, upstream"])
@pytest.mark.parametrize("capped", ["", ", softcap"])
def test_every_variant_builds_for_every_target(builds, option, capped):
    assert {b["target"] for b in builds if b["variant"] == option + capped} == TARGETS


@pytest.mark.parametrize("variant", ["NF4", "NF4, 8-bit scales"])
def test_nf4_builds_for_every_target_whether_or_not_its_scales_are_quantized(builds, variant):
    assert {b["target"] for b in builds if b["variant"] == variant} == TARGETS


def test_no_register_is_spilled_and_no_local_memory_used(builds):
    assert [describe(b) for b in builds if b["stack_bytes"] or b["local_bytes"]] == []


def test_loads_are_16_bytes_wide_for_any_vocabulary(builds):
    narrow = [b for b in builds if b["vocab"] != 1 and b["target"].startswith("sm_") and b["access_bytes"] != 16]
    assert [describe(b) for b in narrow] == []


def test_tiles_and_weights_beyond_2_to_the_31_numbers_have_64_bit_offsets(builds):
    assert [describe(b) for b in builds if not b["wide_offsets"]] == []


def test_threads_wait_before_a_gradient_goes_over_logits_of_other_threads(builds):
    for build in builds:
        writes_over_others = build["variant"].startswith("gradient") and build["dtype"] != "float32"
        assert build["waits"] == writes_over_others, describe(build)


def test_the_readme_has_the_table_of_these_kernels(builds):
    """Checks only the rows: --write updates the table by hand, and registers differ a little between compilers."""
    text = (ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8")
    table = text.partition("<!-- compile matrix")[2].partition("<!-- end of the compile matrix")[0]
    for build in builds:
        assert f"| {build['variant']} | {build['dtype']} |" in table
        assert build["target"] in table
