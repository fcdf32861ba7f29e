"""How many rows of products a tile has: a pure function of sizes, so that no device is needed to test it."""

import torch

# Bytes of one tile, as the tile op counts them: the most there may be.
CPU_TILE_BYTES = 256 * 2**20
ACCELERATOR_TILE_BYTES = 512 * 2**20
# A lower tile starves the GEMM, which reads (on a CPU: packs) the whole weight for each tile. On 2 cores of an AMD EPYC
# both GEMMs of the heads of SmolLM2 and Llama-3-8B reach 0.65 of the rate of a square one with 128 rows, 0.8 with 256,
# 0.9 with 512 and no more with 1,024. On an accelerator reading the weight takes longer than the products below 256
# rows; beyond 2,048 nothing is gained.
MIN_ROWS = 128
MAX_CPU_ROWS = 512
MAX_ACCELERATOR_ROWS = 2048
# A tile that stays in the L2 cache saves its passage to memory and back. Only a large cache holds enough rows, and the
# weight streams through it too.
MIN_L2_BYTES = 32 * 2**20
L2_SHARE = 0.75
MIN_L2_ROWS = 256
# Times that a tile in memory crosses the bus: written by the first GEMM, read twice and written by the tile op, read by
# the second GEMM. Each GEMM reads the weight once, wherever the tile is.
TILE_PASSES, WEIGHT_PASSES = 5, 2


def tile_rows(rows: int, vocab: int, width: int, logit_bytes: int, l2_bytes: int | None) -> int:
    """The height of a tile, for `rows` rows in all: a multiple of 64 unless one tile takes them all; at least 1.

    Args:
        vocab, width: V and D of the head's weight.
        logit_bytes: bytes of the tile for each of its products.
        l2_bytes: size of an accelerator's L2 cache, 0 if it is not known; None on a CPU.
    """
    row_bytes = vocab * logit_bytes
    if l2_bytes is None:
        highest = min(CPU_TILE_BYTES // row_bytes, MAX_CPU_ROWS)
    else:
        highest = min(ACCELERATOR_TILE_BYTES // row_bytes, MAX_ACCELERATOR_ROWS)
        cached = int(l2_bytes * L2_SHARE) // row_bytes
        if l2_bytes >= MIN_L2_BYTES and MIN_L2_ROWS <= cached < highest:
            # Bytes that cross the bus for each row, over those of a row of products.
            from_memory = WEIGHT_PASSES * width / highest + TILE_PASSES
            from_cache = WEIGHT_PASSES * width / cached
            highest = cached if from_cache < from_memory else highest
    highest = max(MIN_ROWS, highest // 64 * 64)
    if rows <= highest:
        return max(1, rows)
    # Of equal height: a last tile of a few rows would read the whole weight for them.
    tiles = -(-rows // highest)
    return -(-rows // (tiles * 64)) * 64


def l2_bytes(device: torch.device) -> int | None:
    """The `l2_bytes` of `tile_rows` for a device."""
    if device.type == "cpu":
        return None
    return torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else 0
