"""Compile every Triton kernel for each GPU generation, on any x86 Linux machine, and report the resources it needs.

    python benchmarks/compile_matrix.py [--write] [--json FILE]

It compiles exactly what a run would launch: the functions that launch a kernel run on CPU tensors, and instead of each
launch the kernel is specialised to its arguments and compiled for the target. cuobjdump, which comes with Triton, reads registers, stack
(where spilled registers go), local and shared memory from the machine code. The width of memory accesses is read from
the PTX.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import tempfile
from argparse import ArgumentParser
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from itertools import product
from pathlib import Path
from types import ModuleType

# Turn off the interpreter, which the tests use and which compiles nothing. Triton reads this when it is imported.
os.environ["TRITON_INTERPRET"] = "0"

import torch
import triton
from bitsandbytes.functional import QuantState
from rich.console import Console
from rich.table import Table
from triton.backends.compiler import GPUTarget

from saro_kernels import triton_gate, triton_nf4, triton_tile
from saro_kernels.gated_activation import ACTIVATIONS

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),  # A100
    "sm_86": GPUTarget("cuda", 86, 32),  # RTX 3090
    "sm_89": GPUTarget("cuda", 89, 32),  # RTX 4090, L4
    "sm_90": GPUTarget("cuda", 90, 32),  # H100
    "sm_120": GPUTarget("cuda", 120, 32),  # RTX 5090
    "gfx942": GPUTarget("hip", "gfx942", 64),  # MI300X
}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# GPT-2's vocabulary: an odd number, so that no row length is aligned by chance.
VOCABULARY = 50257
README = Path(__file__).with_name("README.md")
BEGIN, END = "<!-- compile matrix: written by compile_matrix.py -->", "<!-- end of the compile matrix -->"


@dataclass(frozen=True)
class Build:
    """One compiled kernel.

    Attributes:
        target: GPU generation, a key of TARGETS.
        kernel: name of the kernel function.
        variant: what the kernel computes, see `build`.
        dtype: dtype of the hidden states, which the gradient has (products are float32); or of the other kernels' results.
        vocab: columns of the tile; None for other kernels.
        registers: 32-bit registers per thread.
        stack_bytes: stack per thread; registers that do not fit are spilled there.
        local_bytes: local memory per thread, also for spilled registers.
        shared_bytes: shared memory per program.
        access_bytes: width of the widest load from memory.
        wide_offsets: True if the address of a row is computed in 64 bits; a tile may have more than 2^31 logits.
        waits: True if the threads of a program wait for each other between blocks.
    """

    target: str
    kernel: str
    variant: str
    dtype: str
    vocab: int | None
    registers: int
    stack_bytes: int
    local_bytes: int
    shared_bytes: int
    access_bytes: int
    wide_offsets: bool
    waits: bool


@dataclass(frozen=True)
class _Driver:
    """Replaces a GPU's driver: it tells Triton which target to compile for. Nothing is launched."""

    target: GPUTarget

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> str:
        return str(self.target)

    def get_current_stream(self, device: str) -> int:
        return 0


class _Compiled(list):
    """Replaces a kernel: each launch appends the compiled kernel to this list instead of running it."""

    def __init__(self, kernel: triton.JITFunction) -> None:
        super().__init__()
        self.kernel = kernel

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *args, **options: self.append(self.kernel.warmup(*args, grid=grid, **options))


def _variants() -> Iterator[tuple[str, dict[str, object], Callable[..., object]]]:
    """Yield (name, options of the tile, function that runs the tile) for all variants of the tile op."""
    targets, upstream = torch.zeros(2, dtype=torch.int64), torch.ones(2)
    for softcap in (None, 30.0):
        capped = ", softcap" if softcap else ""
        options = {"softcap": softcap, "scale": 1.0, "gradient": False}
        yield "log-probs" + capped, options, lambda tile: tile.run(targets)
        yield "statistics" + capped, options, lambda tile: tile.statistics(targets)
        options = options | {"gradient": True}
        yield "gradient" + capped, options, lambda tile: tile.run(targets)
        yield "gradient, upstream" + capped, options, lambda tile: tile.run(targets, upstream)


def build(name: str) -> list[Build]:
    """Compile all variants of all kernels for one target, a key of TARGETS."""
    triton.runtime.driver.set_active(_Driver(TARGETS[name]))
    builds = []
    cases = list(product((VOCABULARY, 1), DTYPES))
    for (vocab, dtype), (variant, options, call) in product(cases, list(_variants())):
        if dtype != torch.float32 and not options["gradient"]:
            continue  # the same kernel as for float32
        tile = triton_tile.TritonTile(2, torch.empty(0, dtype=dtype), vocab, **options)
        compiled = _compile(triton_tile, "tile_kernel", partial(call, tile))
        builds.append(_describe(compiled, name, variant, dtype, vocab))
    for dtype, double in product(DTYPES, (False, True)):
        packed, state = _nf4_weight(dtype, double)
        compiled = _compile(triton_nf4, "nf4_kernel", partial(triton_nf4.dequantize_nf4, packed, state))
        builds.append(_describe(compiled, name, "NF4, 8-bit scales" if double else "NF4", dtype))
    for dtype, activation in product(DTYPES, ACTIVATIONS):
        x = torch.zeros(2, triton_gate.BLOCK, dtype=dtype)
        forward = partial(triton_gate.triton_gated_product, activation, x, x)
        backward = partial(triton_gate.triton_gated_product_backward, activation, x, x, x)
        compiled = _compile(triton_gate, "gate_kernel", forward)
        builds.append(_describe(compiled, name, f"gated product, {activation}", dtype))
        compiled = _compile(triton_gate, "gate_backward_kernel", backward)
        builds.append(_describe(compiled, name, f"gated product, {activation}, backward", dtype))
    return builds


def _nf4_weight(dtype: torch.dtype, double: bool) -> tuple[torch.Tensor, QuantState]:
    """Return an NF4 weight of zeros with bitsandbytes' block sizes, whose scales are quantized if `double`."""
    packed, scales = torch.zeros(2048, 1, dtype=torch.uint8), torch.zeros(64)
    state = QuantState(scales, torch.Size((64, 64)), torch.zeros(16), blocksize=64, quant_type="nf4", dtype=dtype)
    if double:
        state.absmax, state.offset, state.nested = scales.to(torch.uint8), torch.tensor(0.0), True
        state.state2 = QuantState(torch.zeros(1), code=torch.zeros(256), blocksize=256, dtype=torch.float32)
    return packed, state


def _compile(module: ModuleType, kernel: str, launch: Callable[[], object]) -> triton.compiler.CompiledKernel:
    """Return what `launch` would run of a kernel, compiled for the active target."""
    original = getattr(module, kernel)
    launches = _Compiled(original)
    setattr(module, kernel, launches)
    try:
        launch()
    finally:
        setattr(module, kernel, original)
    (compiled,) = launches
    return compiled


def _describe(
    compiled: triton.compiler.CompiledKernel, target: str, variant: str, dtype: torch.dtype, vocab: int | None = None
) -> Build:
    usage = _nvidia_usage(compiled) if TARGETS[target].backend == "cuda" else _amd_usage(compiled)
    return Build(
        target=target,
        kernel=compiled.name,
        variant=variant,
        dtype=str(dtype).removeprefix("torch."),
        vocab=vocab,
        waits="barrier" in compiled.asm["ttir"],
        wide_offsets=re.search(r"arith\.muli .*: i64", compiled.asm["ttir"]) is not None,
        **usage,
    )


def _nvidia_usage(compiled: triton.compiler.CompiledKernel) -> dict[str, int]:
    """Read the resource fields of `Build` from a cubin and its PTX."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    usage = {key: int(value) for key, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", printed)}
    loads = re.findall(r"ld\.global(?:\.\w+)*?(?:\.v(\d))?\.b(\d+)", compiled.asm["ptx"])
    return {
        "registers": usage["REG"],
        "stack_bytes": usage["STACK"],
        "local_bytes": usage["LOCAL"],
        "shared_bytes": compiled.metadata.shared,
        "access_bytes": max(int(count or 1) * int(bits) // 8 for count, bits in loads),
    }


def _amd_usage(compiled: triton.compiler.CompiledKernel) -> dict[str, int]:
    """Read the resource fields of `Build` from AMD assembly."""
    code = compiled.asm["amdgcn"]
    usage = {key: int(value) for key, value in re.findall(r"\.(\w+):\s+(\d+)\s", code)}
    loads = re.findall(r"(?:global|buffer)_load_(?:(dword)(?:x(\d))?|ushort|short)\b", code)
    return {
        "registers": usage["vgpr_count"],
        "stack_bytes": 4 * (usage["vgpr_spill_count"] + usage["sgpr_spill_count"]),
        "local_bytes": usage["private_segment_fixed_size"],
        "shared_bytes": compiled.metadata.shared,
        "access_bytes": max(4 * int(count or 1) if word else 2 for word, count in loads),
    }


def build_all() -> list[Build]:
    """Compile for all targets, on all cores."""
    with ProcessPoolExecutor(min(os.cpu_count() or 1, len(TARGETS))) as pool:
        return [result for builds in pool.map(build, TARGETS) for result in builds]


def rows(builds: list[Build]) -> Iterator[list[str]]:
    """Yield the heading of the table, then a row for each variant and dtype, of the tile op at VOCABULARY."""
    yield ["kernel", "dtype", *TARGETS, "stack, local", "shared", "load (sm)"]
    shown = [b for b in builds if b.vocab in (VOCABULARY, None)]
    for variant, dtype in dict.fromkeys((b.variant, b.dtype) for b in shown):
        by_target = {b.target: b for b in shown if (b.variant, b.dtype) == (variant, dtype)}
        stack_bytes = max(b.stack_bytes for b in by_target.values())
        local_bytes = max(b.local_bytes for b in by_target.values())
        shared_bytes = max(b.shared_bytes for b in by_target.values())
        access_bytes = min(b.access_bytes for name, b in by_target.items() if name.startswith("sm_"))
        yield [
            variant,
            dtype,
            *(str(by_target[target].registers) for target in TARGETS),
            f"{stack_bytes}, {local_bytes} B",
            f"{shared_bytes} B",
            f"{access_bytes} B",
        ]


def markdown(builds: list[Build]) -> str:
    """Return the table for benchmarks/README.md, with its markers."""
    head, *body = rows(builds)
    aligned = ["---", "---", *["---:"] * (len(head) - 2)]
    lines = ["| " + " | ".join(row) + " |" for row in (head, aligned, *body)]
    warps = f"{triton_tile.WARPS} warps, {triton_nf4.WARPS} for NF4, {triton_gate.WARPS} for the gated product"
    version = f"Triton {triton.__version__}, {warps}, vocabulary {VOCABULARY}"
    return "\n".join([BEGIN, "", f"Registers per thread ({version}):", "", *lines, "", END])


def write_table(builds: list[Build], file: Path) -> None:
    """Write the table between the markers in ``file``; end the program if they are missing."""
    text = file.read_text(encoding="utf-8")
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise SystemExit(f"{file}: the markers of the compile matrix are missing; add the lines\n{BEGIN}\n{END}")
    file.write_text(before + markdown(builds) + after, encoding="utf-8")


def main() -> None:
    """Compile all kernels and print the table."""
    parser = ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--write", action="store_true", help="Also write the table into benchmarks/README.md.")
    parser.add_argument("--json", metavar="FILE", help="Also write all figures to this file.")
    options = parser.parse_args()
    builds = build_all()
    head, *body = rows(builds)
    table = Table(title="Registers per thread, and memory")
    for i, name in enumerate(head):
        table.add_column(name, justify="left" if i < 2 else "right")
    for row in body:
        table.add_row(*row)
    Console().print(table)
    if options.write:
        write_table(builds, README)
    if options.json:
        Path(options.json).write_text(json.dumps([asdict(b) for b in builds], indent=1) + "\n")


if __name__ == "__main__":
    main()
