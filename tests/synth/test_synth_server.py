"""Data construction with a real server, `transformers serve` with a tiny model, whose random texts pass no gate."""

from __future__ import annotations

import importlib.util

import pytest
from serve import Serve
from synth_cases import make_prompts, write_lines

from saro.draws.store import DrawStore
from saro.errors import SaroError
from saro.synth.synth_options import Options, OutcomeStage
from saro.synth.synthesis import synthesize

pytestmark = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("fastapi", "uvicorn", "openai")),
    reason="transformers serve needs fastapi, uvicorn and openai",
)


def test_a_server_draws_each_text_once(tiny_model, environment, runtime, tmp_path):
    server = Serve(tiny_model(), environment)
    options = Options(
        stage="op",
        prompts=write_lines(tmp_path / "made.jsonl", make_prompts(1, 1)),
        generator=f"{server.url}#{server.model}",
        output=str(tmp_path / "out" / "op.jsonl"),
        store=str(tmp_path / "draws.sqlite3"),
        max_tokens=8,
        op=OutcomeStage(draws=2, guided=0),
    )
    server.start()
    try:
        with pytest.raises(SaroError, match="no record is left"):
            synthesize(options, runtime)
    finally:
        server.kill()
    with DrawStore.open(tmp_path / "draws.sqlite3") as store:
        (model,) = store.read_models()
        assert (model.texts, model.failures) == (6, {})
    # The server is gone, and nothing is asked of it.
    with pytest.raises(SaroError, match="no record is left"):
        synthesize(options, runtime)
