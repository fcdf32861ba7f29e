"""Count the kernels that one training step launches, and its autograd nodes, in each decoder layer. It needs no GPU.

    python benchmarks/launch_counts.py [--gradient_checkpointing true] [--method qlora]

A small pack's step is bound by the launches of kernels: each costs Python and C++ the same time, however small the tensors
are. So they can be counted on tiny ones. A dispatch mode counts the operators of torch that compute something; views and new
memory are free. What one of our Triton kernels does on a GPU, or one product with a float32 result, counts as one, although a
CPU takes several operators for it. Norms and rotary embedding are transformers' own, for which liger-kernel launches fewer.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from unittest import mock

import torch
from jsonargparse import auto_cli
from rich.console import Console
from rich.table import Table
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM

from saro.config import ModelConfig
from saro.data.packs import Pack
from saro.data.random_packs import random_pack
from saro.model.load import load_policy
from saro.model.policy import Policy
from saro.model.source import ModelSource
from saro.train.losses import nll_sum
from saro_kernels import lora_group, lora_mlp, nf4

# Operators that launch nothing, although they are not views.
_FREE = {
    "aten::_unsafe_view",
    "aten::empty",
    "aten::empty_like",
    "aten::empty_strided",
    "aten::new_empty",
    "aten::new_empty_strided",
}
# Functions that are one kernel on a GPU, with the modules in which LoRA layers find them.
_ONE_KERNEL = (
    (nf4, "dequantize"),
    (lora_mlp, "gated_product"),
    (lora_mlp, "gated_product_backward"),
    (lora_group, "_outer"),
)


@dataclass(frozen=True)
class Counts:
    """What a step does.

    Attributes:
        forward, backward: operators that launch a kernel, by name.
        nodes: nodes of the autograd graph, without those that add to a parameter's gradient.
    """

    forward: Counter[str]
    backward: Counter[str]
    nodes: int

    @property
    def launches(self) -> int:
        return self.forward.total() + self.backward.total()


class LaunchCounter(TorchDispatchMode):
    """Counts operators that launch a kernel, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.launches: Counter[str] = Counter()
        self._is_inside_kernel = False

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if not self._is_inside_kernel and not _is_free(function):
            self.launches[function._schema.name] += 1
        return function(*args, **kwargs or {})

    def as_one_kernel(self, name: str, function: Callable) -> Callable:
        """Return the function, such that one call counts as one launch of this name."""

        def run(*args: object, **kwargs: object) -> object:
            was_inside, self._is_inside_kernel = self._is_inside_kernel, True
            try:
                result = function(*args, **kwargs)
                if isinstance(result, torch.Tensor):
                    result = result.contiguous()  # as a GPU's kernel returns it
            finally:
                self._is_inside_kernel = was_inside
            if not was_inside:
                self.launches[name] += 1
            return result

        return run


def _is_free(operator: torch._ops.OpOverload) -> bool:
    """Return True for views and new memory: an operator whose result is a part of its argument that it does not write to."""
    returns = operator._schema.returns
    is_view = any(value.alias_info is not None and not value.alias_info.is_write for value in returns)
    return is_view or operator._schema.name in _FREE


@contextmanager
def counting() -> Iterator[LaunchCounter]:
    """Count the launches in this context."""
    with ExitStack() as stack:
        counter = LaunchCounter()
        for owner, name in _ONE_KERNEL:
            one = counter.as_one_kernel(name, getattr(owner, name))
            stack.enter_context(mock.patch.object(owner, name, one))
        stack.enter_context(counter)
        yield counter


def count_step(policy: Policy, pack: Pack) -> Counts:
    """Run forward and backward of a pack, and count."""
    with counting() as forward:
        loss = nll_sum(policy(pack)) / pack.rows
    nodes = _count_nodes(loss.grad_fn)
    with counting() as backward:
        loss.backward()
    policy.zero_grad(set_to_none=True)
    return Counts(forward.launches, backward.launches, nodes)


def _count_nodes(root: torch.autograd.graph.Node) -> int:
    seen, left = {root}, [root]
    while left:
        parents = {node for node, _ in left.pop().next_functions if node is not None} - seen
        seen |= parents
        left += parents
    return sum(type(node).__name__ != "AccumulateGrad" for node in seen)


def count_per_layer(**options: object) -> Counts:
    """Count what one decoder layer of a tiny Llama adds to a step; ``options`` are those of ``ModelConfig``."""
    few, many = (_count_model(layers, **options) for layers in (1, 2))
    return Counts(many.forward - few.forward, many.backward - few.backward, many.nodes - few.nodes)


def _count_model(layers: int, **options: object) -> Counts:
    config = LlamaConfig(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    with tempfile.TemporaryDirectory() as folder:
        LlamaForCausalLM(config).save_pretrained(folder)
        model = ModelConfig(name=folder, dtype="bfloat16", **options)
        source = ModelSource(folder, config, tokenizer=None, stop_ids=frozenset())  # a step reads no text
        policy = load_policy(source, model, torch.device("cpu"), seed=0).train()
    return count_step(policy, random_pack(64, config.vocab_size, 64, 0.75))


def main(method: str = "qlora", gradient_checkpointing: bool = False, fused_lora: bool = True) -> None:
    """Count the kernels that one decoder layer launches in a training step.

    Args:
        method: qlora or lora.
        gradient_checkpointing: Recompute activations.
        fused_lora: false counts PEFT's own layers.
    """
    counts = count_per_layer(method=method, gradient_checkpointing=gradient_checkpointing, fused_lora=fused_lora)
    table = Table(title=f"one decoder layer of Llama, {method}, one sequence, SDPA")
    for column in ("operator", "forward", "backward"):
        table.add_column(column, justify="left" if column == "operator" else "right")
    for name, _ in (counts.forward + counts.backward).most_common():
        table.add_row(name, str(counts.forward[name]), str(counts.backward[name]))
    table.add_section()
    table.add_row("launches", str(counts.forward.total()), str(counts.backward.total()))
    console = Console()
    console.print(table)
    console.print(
        f"{counts.launches} launches and {counts.nodes} autograd nodes a layer; 32 layers: {32 * counts.launches:,}"
    )


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
