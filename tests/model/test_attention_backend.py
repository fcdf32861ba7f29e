"""The backend of attention by device, dtype and model, and its refusals."""

from __future__ import annotations

import pytest
import torch
from transformers import Gemma2Config, Gemma4TextConfig, GPT2Config, LlamaConfig, MiniCPM3Config

from saro.model.architectures import remove_dropout
from saro.model.attention_backend import EITHER, choose_backend


@pytest.mark.parametrize(
    ("name", "device", "dtype", "chosen"),
    [
        ("auto", "cpu", torch.float32, "sdpa"),
        ("auto", "cpu", torch.bfloat16, "sdpa"),
        ("auto", "cuda", torch.float32, "sdpa"),
        ("auto", "cuda", torch.bfloat16, EITHER),
        ("sdpa", "cuda", torch.bfloat16, "sdpa"),
        ("varlen", "cuda", torch.bfloat16, "varlen"),
    ],
)
def test_backend_by_device_and_dtype(name, device, dtype, chosen):
    assert choose_backend(name, torch.device(device), dtype, LlamaConfig()) == chosen


@pytest.mark.parametrize(("device", "dtype"), [("cpu", torch.bfloat16), ("cuda", torch.float32)])
def test_varlen_is_refused_if_it_cannot_run(device, dtype):
    with pytest.raises(ValueError, match=r"needs CUDA and bfloat16; set --model.attention sdpa"):
        choose_backend("varlen", torch.device(device), dtype, LlamaConfig())


@pytest.mark.parametrize(
    ("config", "sizes"),
    [
        (MiniCPM3Config(qk_nope_head_dim=64, qk_rope_head_dim=32, v_head_dim=64), "64 and 96"),
        (Gemma4TextConfig(head_dim=256, global_head_dim=512), "256 and 512"),
        (LlamaConfig(hidden_size=48, num_attention_heads=4), "12"),
        (LlamaConfig(head_dim=512), "512"),
        (LlamaConfig(head_dim=200), "200"),
        (LlamaConfig(head_dim=224), "224"),
    ],
    ids=[
        "values of another size",
        "layers of another size",
        "not a multiple of 8",
        "too large",
        "no backward",
        "nor here",
    ],
)
def test_head_sizes_that_varlen_does_not_support_use_the_sdpa_backend(config, sizes):
    assert choose_backend("auto", torch.device("cuda"), torch.bfloat16, config) == "sdpa"
    with pytest.raises(ValueError, match=rf"not support heads of size .*{sizes}, which .*; set --model.attention sdpa"):
        choose_backend("varlen", torch.device("cuda"), torch.bfloat16, config)


@pytest.mark.parametrize("size", [64, 128, 192, 232, 256])
def test_head_sizes_that_flash_attention_supports_use_varlen(size):
    assert choose_backend("auto", torch.device("cuda"), torch.bfloat16, LlamaConfig(head_dim=size)) == EITHER


def test_a_softcap_uses_the_sdpa_backend():
    assert choose_backend("auto", torch.device("cuda"), torch.bfloat16, Gemma2Config()) == "sdpa"
    with pytest.raises(ValueError, match=r"no softcap, which the model needs; set --model.attention sdpa"):
        choose_backend("varlen", torch.device("cuda"), torch.bfloat16, Gemma2Config())


@pytest.mark.parametrize(
    "config", [LlamaConfig(attention_dropout=0.1), GPT2Config()], ids=["attention_dropout", "attn_pdrop"]
)
def test_attention_dropout_uses_the_sdpa_backend(config):
    assert choose_backend("auto", torch.device("cuda"), torch.bfloat16, config) == "sdpa"
    with pytest.raises(
        ValueError, match=r"has no dropout, which --model.dropout true keeps; set --model.attention sdpa"
    ):
        choose_backend("varlen", torch.device("cuda"), torch.bfloat16, config)
    remove_dropout(config)
    assert choose_backend("auto", torch.device("cuda"), torch.bfloat16, config) == EITHER
