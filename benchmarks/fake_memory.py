"""Predict the peak memory of QLoRA steps on a GPU, on a machine that has none.

    PYTHONPATH=benchmarks/gpu python benchmarks/fake_memory.py benchmarks/results/fake_memory.json --into benchmarks/README.md

The project's own code runs forward and backward on fake tensors, which have sizes and no numbers. Every storage that an
operator makes counts from its birth to its end, rounded up to 512 bytes as the allocator does. Kernels that a CPU does not have
(Triton's, liger-kernel's, varlen attention) are replaced by stand-ins that make the tensors that they make. Not seen is what a
kernel takes inside, such as the workspaces of cuBLAS and of attention's backward, and what the allocator loses to gaps.

Predictions that the JSON file has already are kept: delete it after a change of the code.
"""

from __future__ import annotations

import argparse
import json
import sys
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import astuple, dataclass
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from gpu_tables import publish, table
from peft.tuners.tuners_utils import BaseTunerLayer
from random_model import SHAPES
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from train_step import random_pack
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from saro.config import ModelConfig
from saro.data.packs import Pack, lay_out
from saro.data.tree import RowKind, ScoredSequence, build_tree
from saro.files import atomic_write
from saro.model import policy as policy_module
from saro.model import recompute
from saro.model.adapter import new_adapter
from saro.model.fused_lora import fuse_lora
from saro.model.policy import Policy
from saro.model.recompute import enable_recomputation, recompute_layers
from saro_kernels import lora, tiled, token_logps

ROOT = Path(__file__).resolve().parents[1]
MARKERS = ("<!-- memory predictions: begin -->", "<!-- memory predictions: end -->")
MODELS = {"llama-8b": "Llama-3-8B", "qwen3-8b": "Qwen3-8B", "qwen2.5-7b": "Qwen2.5-7B"}
TOKENS = (2048, 4096, 8192, 16384, 24576, 32768)
TASKS = ("rw", "srpo")
# How many layers are recomputed, and in words.
LABELS = {
    "none": "no layer recomputed",
    "half": "half of the layers recomputed",
    "all": "all layers recomputed",
    "offloaded": "all, inputs on the host",
}
WAYS = tuple(LABELS)
# Memory of the card whose limit the tables show, and the size of the pack whose parts they show.
CARD_BYTES, PARTS_AT = 24 * 2**30, 8192
# Bytes of a number in NF4: half a byte, a scale of 8 bits for each 64, and one of 32 bits for each 256 of these.
NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)
# Bytes of a trained number beside its gradient: the number itself and AdamW's two moments, in float32.
TRAINED_BYTES = 12
# CUDA's allocator rounds up to this.
BLOCK_BYTES = 512
# Numbers of layers that are run: more than the two whose inputs are still on the device when they are kept on the host.
RUN_LAYERS = (4, 6)
H100_L2_BYTES = 50 * 2**20


@dataclass(frozen=True)
class Prediction:
    """Memory of a step, bytes.

    Attributes:
        model: frozen weights.
        trained: adapters and the optimizer's state.
        layers: what the decoder keeps when the head begins.
        head: what the head's forward takes at its peak beside that.
        peak: peak of the whole step, with gradients.
    """

    model: int
    trained: int
    layers: int
    head: int
    peak: int


# By shape, task, way and tokens of the pack.
Found = dict[tuple[str, str, str, int], Prediction]


class Meter(TorchDispatchMode):
    """Counts the bytes of all storages that operators make in this context, as long as they live.

    Attributes:
        now: bytes of those that live.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self._peak = 0
        self._is_paused = False
        self._seen: weakref.WeakSet = weakref.WeakSet()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **kwargs or {})
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor) and not self._is_paused and leaf.untyped_storage() not in self._seen:
                self._add(leaf.untyped_storage())
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        size = -(-storage.nbytes() // BLOCK_BYTES) * BLOCK_BYTES
        self._seen.add(storage)
        self.now += size
        self._peak = max(self._peak, self.now)
        weakref.finalize(storage, self._subtract, size)

    def _subtract(self, size: int) -> None:
        self.now -= size

    def ignore(self, tensors: Iterable[torch.Tensor]) -> None:
        """Do not count these tensors, which no operator makes here, or their views."""
        self._seen.update(tensor.untyped_storage() for tensor in tensors)

    def make_ignored(self, like: torch.Tensor) -> torch.Tensor:
        """Make a tensor that is not counted: it stands for one in host memory."""
        self._is_paused = True
        made = torch.empty_like(like)
        self._is_paused = False
        self.ignore([made])
        return made

    def take_peak(self) -> int:
        """Return the most bytes that lived at once since the last call."""
        peak, self._peak = self._peak, self.now
        return peak


def make_policy(config: PreTrainedConfig, recomputed: int, offload: bool, attention: str, dtype: torch.dtype) -> Policy:
    """Make a policy of random weights with adapters as ``load_policy`` does; its frozen weights are dense."""
    torch.set_default_dtype(dtype)
    try:
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    finally:
        torch.set_default_dtype(torch.float32)
    model.requires_grad_(False)
    model = new_adapter(model, ModelConfig(method="lora"), seed=0)
    fuse_lora(model)
    if recomputed:
        enable_recomputation(model.get_base_model(), offload)
        recompute_layers(model.get_base_model(), recomputed)
    return Policy(model, attention=attention, head="tiled-torch").train()


def measure_step(policy: Policy, pack: Pack, gradient_rows: int) -> Prediction:
    """Run forward and backward on a pack and count their memory. The tensors may be fake."""
    meter = Meter()
    meter.ignore([*policy.parameters(), *policy.buffers()])
    kept: list[int] = []
    peaks: list[int] = []
    heads: list[int] = []

    def counted_logps(**arguments: object) -> torch.Tensor:
        peaks.append(meter.take_peak())
        kept.append(meter.now)
        logps = token_logps(**arguments)
        heads.append(meter.take_peak())
        return logps

    with (
        meter,
        mock.patch.object(policy_module, "token_logps", counted_logps),
        mock.patch.object(recompute, "empty_on_host", meter.make_ignored),
    ):
        (-policy(pack, gradient_rows=gradient_rows).mean()).backward()
    peaks += [*heads, meter.take_peak()]
    trained = TRAINED_BYTES * sum(p.numel() for p in policy.trainable().values())
    frozen = {name: p for name, p in policy.model.named_parameters() if not p.requires_grad}
    model = sum(quantized_bytes(name, parameter) for name, parameter in frozen.items())
    return Prediction(
        model=model,
        trained=trained,
        layers=kept[0],
        head=max(heads) - kept[0],
        peak=model + trained + max(peaks),
    )


def quantized_bytes(name: str, parameter: nn.Parameter) -> int:
    """Return the bytes of a frozen weight under QLoRA: in NF4 if it is that of a layer with an adapter."""
    is_quantized = ".base_layer." in name and parameter.ndim == 2
    return round(parameter.numel() * (NF4_BYTES if is_quantized else parameter.element_size()))


def rw_pack(tokens: int, vocabulary: int) -> tuple[Pack, int]:
    """Make a pack of sequences of 512 tokens, three quarters of them scored. Returns it and its rows with a gradient."""
    pack = random_pack(tokens, vocabulary, min(512, tokens), 0.75)
    return pack, pack.rows


def srpo_pack(tokens: int, vocabulary: int) -> tuple[Pack, int]:
    """Make a pack of pairs that read 2,048 tokens each, or fewer in a smaller pack. Returns it and its margin rows.

    An eighth is the prompt, three sixteenths are reasoning that both sides share, the rest is half of each side.
    """
    size = min(2048, tokens)
    prompt, shared = size // 8, 3 * size // 16
    own = (size - prompt - shared) // 2
    generator = np.random.default_rng(0)
    trees = []
    for record in range(tokens // size):
        start = generator.integers(0, vocabulary, prompt + shared)
        sides = []
        for side in range(2):
            # The sides differ in their first own token. The last one is only a target.
            own_ids = generator.integers(0, vocabulary, own + 1)
            own_ids[0] = side
            ids = np.concatenate([start, own_ids]).astype(np.int32)
            kinds = np.full(len(ids) - prompt, RowKind.ANSWER, np.uint8)
            sides.append(ScoredSequence(ids, prompt, kinds, record))
        trees.append(build_tree(sides))
    pack = lay_out(trees)
    return pack, pack.margin_rows


PACKS: dict[str, Callable[[int, int], tuple[Pack, int]]] = {"rw": rw_pack, "srpo": srpo_pack}


def predict(shape: str, task: str, tokens: Sequence[int], way: str) -> list[Prediction]:
    """Predict the memory of QLoRA steps on a GPU.

    All layers are alike, so that all figures lie on a line over their number. Few layers are run, and the line is extended.

    Args:
        shape: name of a shape of ``random_model.py``.
        task: one of ``TASKS``.
        tokens: sizes of the pack.
        way: one of ``WAYS``.
    """
    layers = SHAPES[shape]().num_hidden_layers
    few, more = (run_layers(shape, task, tokens, way, number) for number in RUN_LAYERS)
    return [
        Prediction(*(extend(RUN_LAYERS, ends, layers) for ends in zip(astuple(left), astuple(right), strict=True)))
        for left, right in zip(few, more, strict=True)
    ]


def extend(at: tuple[int, int], values: tuple[int, int], to: int) -> int:
    """Return the value at ``to`` of the line through two points."""
    return values[1] + (values[1] - values[0]) * (to - at[1]) // (at[1] - at[0])


def run_layers(shape: str, task: str, tokens: Sequence[int], way: str, layers: int) -> list[Prediction]:
    """Run steps of a model with this number of layers on fake tensors; see ``predict``."""
    config = SHAPES[shape]()
    config.num_hidden_layers = layers
    # Models that list the types of their layers have the same for all.
    if getattr(config, "layer_types", None) is not None:
        config.layer_types = config.layer_types[:1] * layers
    recomputed = {"none": 0, "half": layers // 2, "all": layers, "offloaded": layers}[way]
    with fake_tensors(), as_on_gpu():
        policy = make_policy(config, recomputed, way == "offloaded", "varlen", torch.bfloat16)
        predictions = []
        with liger_stand_ins(policy.causal_lm):
            for size in tokens:
                pack, gradient_rows = PACKS[task](size, config.vocab_size)
                predictions.append(measure_step(policy, pack, gradient_rows))
                policy.zero_grad(set_to_none=True)
    return predictions


@contextmanager
def fake_tensors() -> Iterator[None]:
    """Let all tensors that are made in this context be fake."""
    with (
        FakeTensorMode(allow_non_fake_inputs=True),
        # The check of a CPU's targets reads them.
        mock.patch.object(sys.modules["saro_kernels.token_logps"], "_check_tensors"),
        # A fake module cannot be moved; it is where it belongs.
        mock.patch.object(BaseTunerLayer, "_move_adapter_to_device_of_base_layer"),
        mock.patch.object(nn.Module, "to", lambda self, *_, **__: self),
    ):
        yield


# Stand-ins. Each makes what the kernel makes whose place it takes.


@contextmanager
def as_on_gpu() -> Iterator[None]:
    """Let the project's kernels make the tensors that they make on a GPU, in this context."""
    with ExitStack() as stack:
        for owner, name, replacement in (
            (lora, "_outer", _outer),
            (lora, "gated_product", lambda activation, gated, lifted: torch.empty_like(gated)),
            (lora, "gated_product_backward", _gated_product_backward),
            (lora.FrozenLinear, "dense", lambda self, dtype: torch.empty_like(self.weight, dtype=dtype)),
            (tiled, "l2_bytes", lambda device: H100_L2_BYTES),
        ):
            stack.enter_context(mock.patch.object(owner, name, replacement))
        yield


def _outer(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    return left.new_empty(left.shape[1], right.shape[1], dtype=torch.float32)


def _gated_product_backward(
    activation: str, d_hidden: torch.Tensor, gated: torch.Tensor, lifted: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return torch.empty_like(gated), d_hidden, torch.empty_like(gated)


class _Norm(torch.autograd.Function):
    """liger-kernel's RMSNorm: it keeps its input and a number for each row, and writes the gradient over that of its output."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight, x.new_empty(x.shape[:-1], dtype=torch.float32))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx, gradient):
        # A layer is recomputed when its backward first reads what it saved.
        _ = ctx.saved_tensors
        return gradient, None


class _Rotary(torch.autograd.Function):
    """liger-kernel's rotary embedding: it writes over queries and keys, and over their gradients."""

    @staticmethod
    def forward(ctx, query, key, cos, sin):
        ctx.save_for_backward(cos, sin)
        return query.view_as(query), key.view_as(key)

    @staticmethod
    def backward(ctx, d_query, d_key):
        _ = ctx.saved_tensors
        return d_query, d_key, None, None


@contextmanager
def liger_stand_ins(lm: PreTrainedModel) -> Iterator[None]:
    """Let a model's norms and rotary embedding make what those of liger-kernel make, in this context."""

    def rotate(query, key, cos, sin, *_, **__):
        return _Rotary.apply(query, key, cos, sin)

    norms = [module for module in lm.modules() if type(module).__name__.endswith("RMSNorm")]
    for norm in norms:
        norm.forward = _norm_forward(norm)
    try:
        with mock.patch.object(sys.modules[type(lm).__module__], "apply_rotary_pos_emb", rotate):
            yield
    finally:
        for norm in norms:
            del norm.forward


def _norm_forward(norm: nn.Module) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda x: _Norm.apply(x, norm.weight)


# Tables.


def gib(size: float) -> str:
    return f"{size / 2**30:.1f}"


def tokens_at(limit: float, sizes: Sequence[int], peaks: Sequence[float]) -> int:
    """Return at how many tokens a line through the points, extended at both ends, reaches a peak of ``limit``.

    Sizes ascend, and there are at least two.
    """
    above = next((i for i, peak in enumerate(peaks) if peak > limit), len(peaks) - 1)
    left = max(0, above - 1)
    slope = (peaks[left + 1] - peaks[left]) / (sizes[left + 1] - sizes[left])
    return int(sizes[left] + (limit - peaks[left]) / slope)


def peaks_table(found: Found, task: str) -> str:
    """Return the peaks of a task by model, way and size of the pack; cells are empty for sizes that were left out."""
    sizes = sorted({size for _, of_task, _, size in found if of_task == task})
    rows = []
    for shape, way in sorted({(shape, way) for shape, of_task, way, _ in found if of_task == task}, key=_in_order):
        peaks = {size: found[shape, task, way, size].peak for size in sizes if (shape, task, way, size) in found}
        cells = [gib(peaks[size]) if size in peaks else "" for size in sizes]
        reached = f"{tokens_at(CARD_BYTES, list(peaks), list(peaks.values())):,}" if len(peaks) > 1 else ""
        rows.append([f"{MODELS.get(shape, shape)}, {LABELS[way]}", *cells, reached])
    return table([task.upper(), *(f"{size:,}" for size in sizes), "tokens at 24 GiB"], rows)


def _in_order(case: tuple[str, str]) -> tuple[int, int]:
    """Order models and ways as they are listed above; other models come first."""
    shape, way = case
    return list(MODELS).index(shape) if shape in MODELS else -1, WAYS.index(way)


def parts_table(found: Found, size: int) -> str:
    """Return the parts of the peaks of RW steps on packs of one size."""
    rows = []
    for shape, way in sorted({(shape, way) for shape, task, way, _ in found if task == "rw"}, key=_in_order):
        p = found.get((shape, "rw", way, size))
        if p is not None:
            parts = (p.model, p.trained, p.layers, p.head, p.peak)
            rows.append([f"{MODELS.get(shape, shape)}, {LABELS[way]}", *map(gib, parts)])
    header = [f"{size:,} tokens", "model", "adapters, optimizer", "kept by the layers", "head", "peak"]
    return table(header, rows)


def measured_table(found: Found, results: Sequence[Path]) -> str:
    """Return predictions beside what the GPU suite measured: ``results.json`` of its runs."""
    rows = []
    for file in results:
        matrix = json.loads(file.read_text()).get("step_matrix")
        for case in () if matrix is None else matrix["cases"]:
            way = "offloaded" if case.get("offload") else "all" if case["checkpointing"] else "none"
            key = (matrix["model"], "rw", way, case["pack_tokens"])
            # PEFT's layers, and one call of attention per segment, take other memory.
            is_ours = case["layers"] == "saro" and case["attention"] is None
            if is_ours and key in found and "liger" in matrix["policy"]:
                predicted, measured = found[key].peak / 2**30, case["allocated_gib"]
                rows.append(
                    [
                        f"{MODELS[key[0]]}, {case['pack_tokens']:,} tokens, {LABELS[key[2]]}: {matrix['device']}",
                        f"{predicted:.2f}",
                        f"{measured:.2f}",
                        f"{predicted / measured - 1:+.1%}",
                    ]
                )
    return table(["RW", "predicted GiB", "measured GiB", "difference"], rows)


def render(found: Found, results: Sequence[Path]) -> str:
    """Return all tables as Markdown."""
    size = min({size for *_, size in found}, key=lambda size: abs(size - PARTS_AT))
    parts = [peaks_table(found, task) for task in TASKS if any(task == of_task for _, of_task, _, _ in found)]
    return "\n".join([*parts, parts_table(found, size), measured_table(found, results)])


def read_found(file: Path) -> Found:
    if not file.exists():
        return {}
    return {
        (entry.pop("model_shape"), entry.pop("task"), entry.pop("way"), entry.pop("tokens")): Prediction(**entry)
        for entry in json.loads(file.read_text())
    }


def write_found(file: Path, found: Found) -> None:
    names = ("model_shape", "task", "way", "tokens")
    entries = [dict(zip(names, key, strict=True)) | vars(found[key]) for key in sorted(found)]
    with atomic_write(file) as out:
        out.write(json.dumps(entries, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("file", type=Path, help="JSON file of the predictions; those that it lacks are added.")
    parser.add_argument("--models", nargs="+", choices=sorted(SHAPES), default=list(MODELS), help="Shapes of models.")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS), help="rw, srpo or both.")
    parser.add_argument("--tokens", type=int, nargs="+", default=list(TOKENS), help="Sizes of the packs.")
    parser.add_argument("--into", type=Path, help="Document whose tables are replaced; without it they are printed.")
    options = parser.parse_args()
    found = read_found(options.file)
    for shape in options.models:
        for task in options.tasks:
            for way in WAYS:
                missing = [size for size in options.tokens if (shape, task, way, size) not in found]
                predictions = predict(shape, task, missing, way) if missing else []
                found |= {(shape, task, way, size): p for size, p in zip(missing, predictions, strict=True)}
                write_found(options.file, found)
    tables = render(found, sorted((ROOT / "benchmarks/results/gpu").glob("*/results.json")))
    publish(tables, options.into, MARKERS)


if __name__ == "__main__":
    main()
