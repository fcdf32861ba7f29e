"""Make a policy of fake tensors, which have sizes but no numbers, and count the memory that its steps allocate.

The project's own code runs forward and backward. Kernels that a CPU does not have (Triton's, liger-kernel's) are replaced by
stand-ins that make the tensors that they make. Not seen is what a kernel takes inside, such as the workspaces of cuBLAS and of
attention's backward, and what the allocator loses to gaps.
"""

from __future__ import annotations

import math
import sys
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from unittest import mock

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PretrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights
from transformers.integrations import moe

from saro.config import ModelConfig
from saro.distributed.shard import local
from saro.model.adapter import new_adapter
from saro.model.architectures import auto_class, fully_trained_parts
from saro.model.fused_lora import fuse_lora
from saro.model.policy import Policy
from saro.model.recompute import enable_recomputation, recompute_layers
from saro_kernels import FrozenLinear, lora_group, lora_mlp, tiled

# CUDA's allocator rounds up to this.
BLOCK_BYTES = 512
# Bytes of scales per weight in NF4: an 8-bit scale for 64 weights, and a 32-bit scale for 256 such scales.
NF4_SCALE_BYTES = 1 / 64 + 4 / (64 * 256)
# Bytes of the second-level cache of an H100, by which the head chooses its tiles.
H100_L2_BYTES = 50 * 2**20


class MemoryMeter(TorchDispatchMode):
    """Counts the bytes of all storages that operators allocate in this context, until they are freed.

    Attributes:
        now: bytes of those that live.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self._peak = 0
        self._is_paused = False
        self._ignored: weakref.WeakSet = weakref.WeakSet()
        self._sizes: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()
        self._resize = mock.patch.object(torch.UntypedStorage, "resize_", _resize_noted(self))

    def __enter__(self) -> MemoryMeter:
        self._resize.start()
        return super().__enter__()

    def __exit__(self, *exception: object) -> None:
        self._resize.stop()
        super().__exit__(*exception)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **kwargs or {})
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor) and not self._is_paused:
                self._see(local(leaf).untyped_storage())
        return result

    def _see(self, storage: torch.UntypedStorage) -> None:
        if storage not in self._sizes and storage not in self._ignored:
            self._sizes[storage] = size = [0]
            weakref.finalize(storage, self._change, size, 0)
            self._change(size, storage.nbytes())

    def _change(self, size: list[int], to: int) -> None:
        """Count ``to`` bytes, in whole blocks, for a storage of this size. The size is in a list, so that it can change."""
        rounded = -(-to // BLOCK_BYTES) * BLOCK_BYTES
        self.now += rounded - size[0]
        size[0] = rounded
        self._peak = max(self._peak, self.now)

    def note_resize(self, storage: torch.UntypedStorage) -> None:
        """Count the new size of a storage. Sharding frees gathered weights by resizing their storages to nothing."""
        if storage in self._sizes:
            self._change(self._sizes[storage], storage.nbytes())

    def ignore(self, tensors: Iterable[torch.Tensor]) -> None:
        """Leave these tensors and their views out of the count. They were not allocated here."""
        self._ignored.update(local(tensor).untyped_storage() for tensor in tensors)

    def make_ignored(self, like: torch.Tensor) -> torch.Tensor:
        """Make a tensor that is not counted, because it stands for one in host memory."""
        self._is_paused = True
        made = torch.empty_like(like)
        self._is_paused = False
        self.ignore([made])
        return made

    def take_peak(self) -> int:
        """Return the peak of the counted bytes since the last call."""
        peak, self._peak = self._peak, self.now
        return peak


def _resize_noted(meter: MemoryMeter) -> Callable[[torch.UntypedStorage, int], torch.UntypedStorage]:
    resize = torch.UntypedStorage.resize_

    def resize_(storage: torch.UntypedStorage, size: int) -> torch.UntypedStorage:
        resized = resize(storage, size)
        meter.note_resize(storage)
        return resized

    return resize_


def make_policy(
    config: PretrainedConfig, options: ModelConfig, *, recomputed: int, dtype: torch.dtype, attention: str, head: str
) -> Policy:
    """Make a policy of random weights as ``load_policy`` does, in train mode.

    With ``fake_tensors``, 4-bit weights are tensors of their size. Real tensors need ``model.method`` full or lora.

    Args:
        recomputed: how many of the first layers are recomputed; ``options`` say whether their inputs are offloaded.
        dtype: dtype that the model computes in.
    """
    torch.set_default_dtype(torch.float32 if options.method == "full" else dtype)
    try:
        model = auto_class(config).from_config(
            config, attn_implementation="eager", trust_remote_code=options.trust_remote_code
        )
    finally:
        torch.set_default_dtype(torch.float32)
    # Tie the weights here: transformers does it during initialization, which ``fake_tensors`` leaves out.
    model.tie_weights()
    model.requires_grad_(False)
    if options.method == "full":
        for part in fully_trained_parts(model):
            part.requires_grad_(True)
    else:
        if options.method == "qlora":
            for module in model.get_decoder().modules():
                if isinstance(module, nn.Linear):
                    _quantize(module)
        model = new_adapter(model, options, seed=0)
        if options.fused_lora:
            fuse_lora(model)
    if recomputed:
        lm = model if options.method == "full" else model.get_base_model()
        enable_recomputation(lm, options.activation_offloading)
        recompute_layers(lm, recomputed)
    autocast = dtype if options.method == "full" and dtype != torch.float32 else None
    return Policy(model, attention=attention, head=head, autocast=autocast).train()


@dataclass(frozen=True)
class _QuantState:
    """A stand-in for bitsandbytes' state of a 4-bit weight."""

    shape: torch.Size


def _quantize(layer: nn.Linear) -> None:
    """Let a layer hold as many bytes as its weight has in NF4, without the scales, in the dtype that ranks can share."""
    layer.quant_state = _QuantState(layer.weight.shape)
    packed = torch.empty(math.ceil(layer.weight.numel() / 4), 1, dtype=torch.bfloat16)
    layer.weight = nn.Parameter(packed, requires_grad=False)
    # PEFT's own forward calls the layer.
    layer.forward = lambda x: _QuantizedLinear.apply(x, layer)


class _QuantizedLinear(torch.autograd.Function):
    """bitsandbytes' linear layer: it dequantizes the weight in the forward, and again in the backward."""

    @staticmethod
    def forward(ctx, x, layer):
        ctx.shape = layer.quant_state.shape
        return nn.functional.linear(x, x.new_empty(ctx.shape), layer.bias)

    @staticmethod
    def backward(ctx, gradient):
        return gradient @ gradient.new_empty(ctx.shape), None


class _GroupedProduct(torch.autograd.Function):
    """The products of sorted tokens with their experts, which are frozen."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(weight)
        return x.new_empty(len(x), weight.shape[-1])

    @staticmethod
    def backward(ctx, gradient):
        (weight,) = ctx.saved_tensors
        return gradient.new_empty(len(gradient), weight.shape[-2]), None


def _grouped_product(x: torch.Tensor, weight: torch.Tensor, offs: torch.Tensor) -> torch.Tensor:
    return _GroupedProduct.apply(x.to(weight.dtype), weight)


def scale_bytes(policy: Policy) -> int:
    """Return the bytes of the scales of all 4-bit weights. Each rank holds all of them."""
    shapes = [m.quant_state.shape for m in policy.modules() if isinstance(getattr(m, "quant_state", None), _QuantState)]
    return round(NF4_SCALE_BYTES * sum(shape.numel() for shape in shapes))


@contextmanager
def fake_tensors() -> Iterator[None]:
    """Make all new tensors in this context fake."""
    with (
        FakeTensorMode(allow_non_fake_inputs=True),
        # Some initializers draw values until none is far off. That reads them.
        no_init_weights(),
        # The check of a CPU's targets reads them.
        mock.patch.object(sys.modules["saro_kernels.token_logps"], "_check_tensors"),
        # A fake module cannot be moved, and need not be.
        mock.patch.object(BaseTunerLayer, "_move_adapter_to_device_of_base_layer"),
        mock.patch.object(nn.Module, "to", lambda self, *_, **__: self),
        mock.patch.object(FrozenLinear, "dense", _dense),
        # torch knows the shapes of grouped products in bfloat16 only.
        mock.patch.object(moe, "_grouped_mm", _grouped_product),
    ):
        yield


def _dense(layer: FrozenLinear, dtype: torch.dtype) -> torch.Tensor:
    if layer.quant_state is None:
        return layer.weight.to(dtype)
    return layer.weight.new_empty(layer.quant_state.shape, dtype=dtype)


# Stand-ins for kernels. Each allocates what its kernel allocates.


@contextmanager
def as_on_gpu() -> Iterator[None]:
    """Let the project's kernels make the tensors that they make on a GPU, in this context."""
    with ExitStack() as stack:
        for owner, name, replacement in (
            (lora_group, "_outer", _outer),
            (lora_mlp, "gated_product", lambda activation, gated, lifted: torch.empty_like(gated)),
            (lora_mlp, "gated_product_backward", _gated_product_backward),
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
        _, weight, _ = ctx.saved_tensors
        return gradient, torch.empty_like(weight) if ctx.needs_input_grad[1] else None


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

    file = sys.modules[type(lm).__module__]
    norms = [module for module in lm.modules() if type(module).__name__.endswith("RMSNorm")]
    for norm in norms:
        norm.forward = _norm_forward(norm)
    try:
        with mock.patch.object(file, "apply_rotary_pos_emb", rotate):
            yield
    finally:
        for norm in norms:
            del norm.forward


def _norm_forward(norm: nn.Module) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda x: _Norm.apply(x, norm.weight)
