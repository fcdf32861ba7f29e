"""Tests of the rows of a tile: it fits in memory, feeds the GEMM, and stays in the cache if that moves fewer bytes."""

import pytest
import torch

from saro_kernels.tile_height import (
    ACCELERATOR_TILE_BYTES,
    CPU_TILE_BYTES,
    FREE_SHARE,
    L2_SHARE,
    MAX_ACCELERATOR_ROWS,
    MAX_CPU_ROWS,
    MIN_L2_BYTES,
    MIN_L2_ROWS,
    MIN_ROWS,
    free_bytes,
    l2_bytes,
    tile_rows,
)

MIB = 2**20
VOCABULARIES = [1, 1000, 32000, 49152, 128256, 262144, 10**7]
# L2 cache sizes: unknown, RTX 3090, A100, H100, RTX 4090, RTX 5090, B200.
CACHES = [0, 6 * MIB, 40 * MIB, 50 * MIB, 72 * MIB, 96 * MIB, 126 * MIB]
MANY = 64 * 10**12


@pytest.mark.parametrize(("element_bytes", "logit_bytes"), [(2, 4), (4, 4), (8, 8)])
@pytest.mark.parametrize("vocab", VOCABULARIES)
def test_on_a_cpu_a_tile_fills_its_bytes_or_has_the_most_rows(vocab, element_bytes, logit_bytes):
    height = tile_rows(MANY, vocab, 512, element_bytes, None)
    assert height % 64 == 0
    assert height == MIN_ROWS or height * vocab * logit_bytes <= CPU_TILE_BYTES
    assert height == MAX_CPU_ROWS or (height + 64) * vocab * logit_bytes > CPU_TILE_BYTES


@pytest.mark.parametrize("l2", CACHES)
@pytest.mark.parametrize(("element_bytes", "logit_bytes"), [(2, 4), (4, 4), (8, 8)])
@pytest.mark.parametrize("width", [64, 576, 4096])
@pytest.mark.parametrize("vocab", VOCABULARIES)
def test_on_an_accelerator_a_tile_is_within_its_limits(vocab, width, element_bytes, logit_bytes, l2):
    height = tile_rows(MANY, vocab, width, element_bytes, l2)
    assert height % 64 == 0
    assert MIN_ROWS <= height <= MAX_ACCELERATOR_ROWS
    assert height == MIN_ROWS or height * vocab * logit_bytes <= ACCELERATOR_TILE_BYTES


@pytest.mark.parametrize("l2", [None, *CACHES])
@pytest.mark.parametrize("vocab", VOCABULARIES)
def test_tiles_of_one_batch_have_equal_heights(vocab, l2):
    highest = tile_rows(MANY, vocab, 512, 4, l2)
    for rows in (0, 1, 3, 63, 64, 65, highest - 1, highest, highest + 1, 2 * highest + 1, 7 * highest - 3):
        height = tile_rows(rows, vocab, 512, 4, l2)
        if rows <= highest:
            assert height == max(1, rows)
            continue
        tiles = -(-rows // height)
        assert height % 64 == 0
        assert height <= highest
        assert tiles == -(-rows // highest)  # no more tiles than necessary
        assert rows > tiles * (height - 64)  # no tile higher than necessary


def test_the_last_tile_does_not_have_only_a_few_rows():
    assert tile_rows(513, 49152, 576, 4, None) == 320


def test_heights_of_common_heads():
    """SmolLM2-135M and Llama-3-8B, on a CPU in float32 and on GPUs with Triton in bfloat16."""
    assert tile_rows(2048, 49152, 576, 4, None) == 512
    assert tile_rows(512, 128256, 4096, 4, None) == 512
    assert tile_rows(8192, 128256, 4096, 2, 50 * MIB) == 1024  # H100: too few rows would fit in its cache
    assert tile_rows(8192, 49152, 576, 2, 50 * MIB) == 2048
    assert tile_rows(8192, 49152, 576, 2, 72 * MIB) == 256  # RTX 4090: reading a narrow weight again costs little
    assert tile_rows(8192, 49152, 576, 2, 6 * MIB) == 2048  # RTX 3090


@pytest.mark.parametrize("width", [64, 576, 4096])
@pytest.mark.parametrize("vocab", VOCABULARIES)
def test_a_small_cache_does_not_lower_the_tile(vocab, width):
    assert tile_rows(MANY, vocab, width, 2, MIN_L2_BYTES - 1) == tile_rows(MANY, vocab, width, 2, 0)


@pytest.mark.parametrize("l2", CACHES)
@pytest.mark.parametrize("width", [64, 576, 4096])
@pytest.mark.parametrize("vocab", VOCABULARIES)
def test_a_tile_lowered_for_the_cache_fits_in_it_and_feeds_the_gemm(vocab, width, l2):
    height = tile_rows(MANY, vocab, width, 2, l2)
    height_without_cache = tile_rows(MANY, vocab, width, 2, 0)
    assert height <= height_without_cache
    if height < height_without_cache:
        assert height * vocab * 4 <= L2_SHARE * l2
        assert height >= MIN_L2_ROWS


def test_the_cache_size_is_read_from_the_device(monkeypatch):
    class Properties:
        L2_cache_size = 50 * MIB

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Properties)
    assert l2_bytes(torch.device("cuda")) == 50 * MIB
    assert l2_bytes(torch.device("xpu")) == 0
    assert l2_bytes(torch.device("cpu")) is None


@pytest.mark.parametrize("l2", CACHES)
@pytest.mark.parametrize("vocab", VOCABULARIES)
@pytest.mark.parametrize("free", [0, 100 * MIB, 1000 * MIB, 10**12])
def test_a_tile_takes_a_share_of_the_free_memory(free, vocab, l2):
    height = tile_rows(MANY, vocab, 4096, 2, l2, free)
    height_with_enough = tile_rows(MANY, vocab, 4096, 2, l2)
    assert height % 64 == 0
    assert MIN_ROWS <= height <= height_with_enough
    assert height == MIN_ROWS or height * vocab * 4 <= FREE_SHARE * free
    if height < height_with_enough:
        # No lower than half of what the share would allow.
        assert 2 * (height + 64) * vocab * 4 > FREE_SHARE * free


def test_heights_of_llamas_head_with_little_free_memory():
    assert tile_rows(8192, 128256, 4096, 2, 50 * MIB, 40 * 1024 * MIB) == 1024
    assert tile_rows(8192, 128256, 4096, 2, 50 * MIB, 1536 * MIB) == 512
    assert tile_rows(8192, 128256, 4096, 2, 50 * MIB, 600 * MIB) == 256
    assert tile_rows(8192, 128256, 4096, 2, 50 * MIB, 10 * MIB) == MIN_ROWS


@pytest.mark.parametrize(("vocab", "width"), [(128256, 4096), (151936, 4096), (152064, 3584)])
def test_heights_on_a_card_of_24_gib(vocab, width):
    """Llama-3-8B, Qwen3-8B and Qwen2.5-7B in 4 bits, with packs of 8,192 tokens.

    15 GiB are free if all layers are recomputed. If just 1 GiB is left, because most are kept, the tile takes a quarter.
    """
    enough = tile_rows(8192, vocab, width, 2, 72 * MIB)
    assert tile_rows(8192, vocab, width, 2, 72 * MIB, 15 * 1024 * MIB) == enough
    short = tile_rows(8192, vocab, width, 2, 72 * MIB, 1024 * MIB)
    assert enough / 3 < short <= enough / 2
    assert short * vocab * 4 <= 256 * MIB


@pytest.mark.parametrize(
    ("fraction", "free"),
    [(1.0, 13), (0.5, 10), (0.25, 0)],
    ids=["the whole device", "half of it", "less than it has"],
)
def test_memory_that_torch_may_have_and_has_not_allocated_is_free(monkeypatch, fraction, free):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (3 * MIB, 80 * MIB))
    monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", lambda device: fraction)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 40 * MIB)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 30 * MIB)
    assert free_bytes(torch.device("cuda")) == free * MIB
    assert free_bytes(torch.device("cpu")) is None
    assert free_bytes(torch.device("xpu")) is None
