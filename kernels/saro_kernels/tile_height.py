"""Choose how many rows a tile has: a pure function of sizes, so that tests need no device."""

import torch

# Upper limit of the bytes of one tile's logits.
CPU_TILE_BYTES = 256 * 2**20
ACCELERATOR_TILE_BYTES = 512 * 2**20
# Limits of the rows. A tile with fewer rows starves the GEMM, which reads (on a CPU: packs) the full weight for each
# tile. On 2 cores of an AMD EPYC, both GEMMs of the heads of SmolLM2 and Llama-3-8B reach 0.65 of the rate of a square
# GEMM with 128 rows, 0.8 with 256, 0.9 with 512, and no more with 1,024. On an accelerator, reading the weight takes
# longer than the products below 256 rows; more than 2,048 rows gain nothing.
MIN_ROWS = 128
MAX_CPU_ROWS = 512
MAX_ACCELERATOR_ROWS = 2048
# A tile that stays in the L2 cache saves its way to memory and back. Only a cache of at least MIN_L2_BYTES holds enough
# rows. The tile gets L2_SHARE of it, since the weight streams through the cache too.
MIN_L2_BYTES = 32 * 2**20
L2_SHARE = 0.75
MIN_L2_ROWS = 256
# A tile takes at most this share of an accelerator's free memory: the gradient of the hidden states comes beside it.
FREE_SHARE = 0.25
# A logit is at least a float32.
MIN_LOGIT_BYTES = 4
# How often a tile in memory crosses the bus: the first GEMM writes the logits and the tile op reads them twice; it writes
# their gradient and the second GEMM reads that. Each of the two GEMMs reads the weight once, whether the tile is in
# memory or in the cache.
LOGIT_PASSES, GRADIENT_PASSES, WEIGHT_PASSES = 3, 2, 2


def tile_rows(
    rows: int, vocab: int, width: int, element_bytes: int, l2_bytes: int | None, free_bytes: int | None = None
) -> int:
    """Return the rows of one tile: a multiple of 64, or `rows` if one tile holds them all; at least 1.

    Args:
        rows: rows of the batch.
        vocab: V of the head's weight.
        width: D of the head's weight.
        element_bytes: size of a number of the hidden states, the weight and the gradient. The tile takes as much for
            each logit, but at least MIN_LOGIT_BYTES: the gradient is written over the logits. The slope of a softcap,
            which only the torch tile op keeps, is not counted.
        l2_bytes: size of an accelerator's L2 cache, 0 if unknown; None on a CPU.
        free_bytes: free memory of an accelerator; None if unknown. Little of it makes the tile lower, but never lower
            than MIN_ROWS.
    """
    logit_bytes = max(element_bytes, MIN_LOGIT_BYTES)
    row_bytes = vocab * logit_bytes
    if l2_bytes is None:
        highest = min(CPU_TILE_BYTES // row_bytes, MAX_CPU_ROWS)
    else:
        highest = min(ACCELERATOR_TILE_BYTES // row_bytes, MAX_ACCELERATOR_ROWS)
        cached = int(l2_bytes * L2_SHARE) // row_bytes
        if l2_bytes >= MIN_L2_BYTES and MIN_L2_ROWS <= cached < highest:
            # Bytes that cross the bus for each logit.
            weight_bytes = WEIGHT_PASSES * width * element_bytes
            tile_bytes = LOGIT_PASSES * logit_bytes + GRADIENT_PASSES * element_bytes
            if weight_bytes / cached < weight_bytes / highest + tile_bytes:
                highest = cached
    highest = max(MIN_ROWS, highest // 64 * 64)
    if free_bytes is not None:
        # Halve it until a tile fits, so that steps with a little more or less free memory have tiles of the same height.
        while highest > MIN_ROWS and highest * row_bytes > FREE_SHARE * free_bytes:
            highest = max(MIN_ROWS, highest // 128 * 64)
    if rows <= highest:
        return max(1, rows)
    # Make tiles of equal height: a last tile of few rows would still read the full weight.
    tiles = -(-rows // highest)
    return -(-rows // (tiles * 64)) * 64


def l2_bytes(device: torch.device) -> int | None:
    """Return the `l2_bytes` argument of `tile_rows` for a device."""
    if device.type == "cpu":
        return None
    return torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else 0


def free_bytes(device: torch.device) -> int | None:
    """Return the `free_bytes` argument of `tile_rows` for a device: what the driver and torch's allocator can give.

    `torch.cuda.set_per_process_memory_fraction` limits what the allocator may have of the device.
    """
    if device.type != "cuda":
        return None
    free, total = torch.cuda.mem_get_info(device)
    reserved = torch.cuda.memory_reserved(device)
    allowed = int(torch.cuda.get_per_process_memory_fraction(device) * total)
    return max(0, min(free + reserved, allowed) - torch.cuda.memory_allocated(device))
