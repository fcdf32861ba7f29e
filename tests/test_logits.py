"""Scales and softcaps of logits: read from the config, and packed log-probs are those of the unmodified model."""

from __future__ import annotations

import pytest
from test_checks import DATA, load
from tiny import KINDS_OF_LOGITS, KINDS_OF_MODEL, tiny_config
from transformers import CohereConfig, Gemma2Config, GraniteConfig

from saro.errors import SaroError
from saro.model.logits import LogitOptions, logit_options
from saro.train.checks import check_packs

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize(
    ("config", "want"),
    [
        (CohereConfig(), LogitOptions(scale=0.0625)),
        (GraniteConfig(logits_scaling=8.0), LogitOptions(scale=0.125)),
        (Gemma2Config(), LogitOptions(softcap=30.0)),
        (tiny_config("hyperclovax", logits_scaling=0.125), LogitOptions(scale=0.125)),
        (tiny_config("minicpm3", dim_model_base=4), LogitOptions(scale=0.125)),
        (tiny_config("gemma3 with a softcap", final_logit_softcapping=None), LogitOptions()),
        *((tiny_config(kind), LogitOptions()) for kind in KINDS_OF_MODEL),
    ],
    ids=lambda x: x.model_type if hasattr(x, "model_type") else "",
)
def test_options_of_a_config(config, want):
    assert logit_options(config) == want


@pytest.mark.parametrize("kind", KINDS_OF_LOGITS)
@pytest.mark.parametrize("method", ["full", "qlora"])
@pytest.mark.parametrize("head", ["reference", "tiled-torch"])
def test_packs_equal_the_unmodified_model(tiny_model, kind, method, head):
    policy = load(tiny_model(kind), method)
    policy.head = head
    result = check_packs(policy, DATA)
    assert result.logps < 1e-6
    assert result.control > 1e-2


@pytest.mark.parametrize("kind", KINDS_OF_LOGITS)
def test_without_them_the_check_fails(tiny_model, kind):
    policy = load(tiny_model(kind))
    policy.logits = LogitOptions()
    with pytest.raises(SaroError, match=r"^packed logps differ"):
        check_packs(policy, DATA)


@pytest.mark.parametrize("kind", ["granite", "cohere"])
def test_a_factor_that_should_divide_fails_the_check(tiny_model, kind):
    policy = load(tiny_model(kind))
    policy.logits = LogitOptions(scale=1 / policy.logits.scale)
    with pytest.raises(SaroError, match=r"^packed logps differ"):
        check_packs(policy, DATA)
