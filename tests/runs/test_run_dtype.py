"""The dtype that a run computes in: decided once, and kept by a resumed run."""

from __future__ import annotations

import json

import pytest
import torch
import yaml
from run_folders import (
    OneProcess,
    begin,
    open_run,
    refusal,
)

from saro.config import ModelConfig, RWConfig
from saro.errors import SaroError
from saro.model.source import ModelSource
from saro.runs import folder as run_folder
from saro.runs.folder import RunFolder

pytestmark = pytest.mark.usefixtures("cache")


@pytest.fixture
def fast_bfloat16(monkeypatch):
    """Return a function that makes "auto" choose bfloat16 on this CPU, or float32."""

    def choose(is_fast: bool) -> None:
        chosen = {True: "bfloat16", False: "float32"}[is_fast]
        monkeypatch.setattr(run_folder, "decide_dtype", lambda name, *_: chosen if name == "auto" else name)

    return choose


def decided(run: RunFolder, source: ModelSource, **options) -> tuple[str, list[str]]:
    """Return the dtype that a run decides on, and what it said."""
    runtime = OneProcess()
    return run.decide_dtype(runtime, source, ModelConfig(**options)).dtype, runtime.said


def test_a_choice_of_bfloat16_on_a_cpu_is_told_with_the_way_out_of_it(folder, source, fast_bfloat16):
    fast_bfloat16(True)
    dtype, said = decided(open_run(folder), source)
    assert dtype == "bfloat16"
    assert said == ["computing in bfloat16, which is faster on this CPU; for float32 set --model.dtype float32"]
    assert decided(open_run(folder), source, dtype="bfloat16") == ("bfloat16", [])
    assert decided(open_run(folder), source, dtype="float32") == ("float32", [])
    fast_bfloat16(False)
    assert decided(open_run(folder), source) == ("float32", [])


@pytest.mark.parametrize(("began", "other"), [(True, "float32"), (False, "bfloat16")])
def test_a_resumed_run_keeps_its_dtype_although_the_machine_would_choose_another(
    folder, source, data_file, fast_bfloat16, began, other
):
    fast_bfloat16(began)
    begin(folder, source, data_file).lock.release(force=True)
    manifest = json.loads((folder / "manifest.json").read_text())
    dtype = "bfloat16" if began else "float32"
    assert manifest["config"]["model"]["dtype"] == dtype
    assert yaml.safe_load((folder / "config.yaml").read_text())["model"]["dtype"] == "auto"
    fast_bfloat16(not began)
    assert decided(open_run(folder, resume=True), source) == (dtype, [])
    same = RWConfig(model=ModelConfig(dtype=dtype))
    assert open_run(folder, same, resume=True).resumed
    assert f"the run began with model.dtype {dtype}, not {other}" in refusal(
        folder, RWConfig(model=ModelConfig(dtype=other)), resume=True
    )
    begin(folder, source, data_file, resume=True)
    assert json.loads((folder / "manifest.json").read_text()) == manifest


def test_a_run_in_bfloat16_is_not_resumed_on_a_gpu_without_it(folder, source, data_file, fast_bfloat16, monkeypatch):
    fast_bfloat16(True)
    begin(folder, source, data_file)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    old_gpu = OneProcess()
    old_gpu.device = torch.device("cuda")
    with pytest.raises(
        SaroError, match="the run computes in bfloat16, which this GPU has not; resume it where there is bfloat16"
    ):
        open_run(folder, resume=True).decide_dtype(old_gpu, source, ModelConfig())


@pytest.mark.parametrize(("device", "dtype"), [("cpu", "float32"), ("cuda:0", "bfloat16")])
def test_a_run_of_an_older_version_that_recorded_no_choice_keeps_what_auto_meant(
    folder, source, data_file, fast_bfloat16, device, dtype
):
    begin(folder, source, data_file)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["config"]["model"]["dtype"] = "auto"
    manifest["machine"]["device"] = device
    (folder / "manifest.json").write_text(json.dumps(manifest))
    fast_bfloat16(dtype == "float32")
    assert decided(open_run(folder, resume=True), source)[0] == dtype
    other = {"float32": "bfloat16", "bfloat16": "float32"}[dtype]
    assert open_run(folder, RWConfig(model=ModelConfig(dtype=dtype)), resume=True).resumed
    assert f"the run began with model.dtype {dtype}, not {other}" in refusal(
        folder, RWConfig(model=ModelConfig(dtype=other)), resume=True
    )
