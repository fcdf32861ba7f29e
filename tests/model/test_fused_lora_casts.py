"""A forward casts all adapters at once. The casts are those of the parameters, and nothing changes them until the backward."""

from __future__ import annotations

import copy
import gc
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import nullcontext

import pytest
import torch
import torch.distributed as dist
from loaded import a_pack, load
from peft import LoraConfig, get_peft_model_state_dict, set_peft_model_state_dict
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

import saro.model.fused_lora
import saro.model.policy
from saro.model.fused_lora import cast_adapters, lora_layers
from saro.model.policy import Policy
from saro.model.unmodified import own_layers
from saro_kernels import LoraLinear

pytestmark = pytest.mark.usefixtures("one_thread")

RANK = 5  # no other dimension of the model is 5
CHECKPOINTED = pytest.mark.parametrize("checkpointed", [False, True], ids=["kept", "recomputed"])


def make_policy(folder: str, method: str = "lora", **options: object) -> Policy:
    """Load a policy in bfloat16 with random adapters, in training mode."""
    policy = load(folder, method, **{"dtype": "bfloat16", "lora_rank": RANK} | options)
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in policy.trainable().values():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return policy.train()


def gradients(policy: Policy) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in policy.trainable().items() if p.grad is not None}


def outcome(policy: Policy, module: nn.Module | None = None) -> dict[str, torch.Tensor]:
    """Return the log-probs of a pack, and the gradients of their sum."""
    policy.zero_grad(set_to_none=True)
    logps = (module or policy)(a_pack())
    logps.sum().backward()
    return {"logps": logps.detach()} | gradients(policy)


def is_equal(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


@pytest.fixture
def expected(monkeypatch) -> Callable[[Policy], dict[str, torch.Tensor]]:
    """Return a function that gives a policy's ``outcome`` if each layer casts its adapter itself."""

    def run(policy: Policy) -> dict[str, torch.Tensor]:
        with monkeypatch.context() as patch:
            patch.setattr(saro.model.policy, "cast_adapters", lambda *_: nullcontext())
            return outcome(policy)

    return run


@pytest.fixture
def layers_seen(monkeypatch) -> list[LoraLinear]:
    """Record each layer that a forward or a recomputation reads."""
    seen: list[LoraLinear] = []
    original = saro.model.fused_lora._parts

    def parts(layer: nn.Module) -> LoraLinear:
        seen.append(original(layer))
        return seen[-1]

    monkeypatch.setattr(saro.model.fused_lora, "_parts", parts)
    return seen


class CastCounter(TorchDispatchMode):
    """Counts casts to bfloat16 of matrices of an adapter, and of lists of matrices."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten._foreach_copy_.default:
            self.calls["all"] += 1
        elif function is torch.ops.aten._to_copy.default and kwargs.get("dtype") is torch.bfloat16:
            self.calls["one"] += RANK in args[0].shape
        return function(*args, **kwargs or {})


@CHECKPOINTED
@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_a_forward_and_its_backward_cast_all_adapters_in_one_call(tiny_model, method, checkpointed):
    policy = make_policy(tiny_model(), method, gradient_checkpointing=checkpointed)
    with CastCounter() as counter:
        outcome(policy)
    assert +counter.calls == {"all": 1}


def test_the_counter_sees_casts_one_by_one(tiny_model, expected):
    policy = make_policy(tiny_model(), gradient_checkpointing=True)
    with CastCounter() as counter:
        expected(policy)
    # 2 layers of 7 linears with 2 matrices: each is cast in the forward and in the backward, most in the recomputation too.
    assert counter.calls["all"] == 0
    assert counter.calls["one"] > 2 * 2 * 7 * 2


@CHECKPOINTED
@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma3"])
def test_log_probs_and_gradients_have_the_bits_of_casts_one_by_one(tiny_model, kind, checkpointed, expected):
    policy = make_policy(tiny_model(kind), gradient_checkpointing=checkpointed)
    assert is_equal(outcome(policy), expected(policy))


def test_adapters_in_the_dtype_of_the_products_are_not_copied(tiny_model, layers_seen):
    policy = make_policy(tiny_model(), dtype="float32")
    with CastCounter() as counter:
        outcome(policy)
    assert not +counter.calls
    assert all(layer.a_cast is None and layer.b_cast is None for layer in layers_seen)


def test_a_of_layers_with_one_input_are_cast_into_one_stack(tiny_model):
    policy = make_policy(tiny_model())
    layer = policy.causal_lm.get_decoder().layers[0]
    attention = (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj)
    with cast_adapters(lora_layers(policy.model), torch.bfloat16):
        for members in (attention, (layer.mlp.gate_proj, layer.mlp.up_proj)):
            parts = [saro.model.fused_lora._parts(member) for member in members]
            stack = saro.model.fused_lora._find_stack(members, parts)
            assert torch.equal(stack, torch.cat([part.a_cast for part in parts]))
            assert stack.data_ptr() == parts[0].a_cast.data_ptr()


def test_a_parameter_that_is_exchanged_after_the_casts_is_read_itself(tiny_model):
    """Where ranks share parameters, a layer's are put in its place just before its forward."""
    policy = make_policy(tiny_model())
    attention = policy.causal_lm.get_decoder().layers[0].self_attn
    x = torch.randn(1, 30, 32, dtype=torch.bfloat16)
    with cast_adapters(lora_layers(policy.model), torch.bfloat16):
        matrix = attention.k_proj.lora_A["default"]
        matrix.weight = nn.Parameter(matrix.weight.detach() * -3)
        inside = saro.model.fused_lora.project(attention, x)
    outside = saro.model.fused_lora.project(attention, x)
    assert all(torch.equal(ours, expected) for ours, expected in zip(inside, outside, strict=True))


def make_step(policy: Policy) -> None:
    optimizer = torch.optim.AdamW(policy.trainable().values(), lr=0.1, fused=True)
    optimizer.step()


def make_8_bit_step(policy: Policy) -> None:
    import bitsandbytes.optim

    bitsandbytes.optim.AdamW8bit(policy.trainable().values(), lr=0.1).step()


def edit_in_place(policy: Policy) -> None:
    with torch.no_grad():
        for parameter in policy.trainable().values():
            parameter.mul_(-3)


def edit_data(policy: Policy) -> None:
    """Change the parameters without a trace: their versions stay."""
    for parameter in policy.trainable().values():
        version = parameter._version
        parameter.data.mul_(-3)
        assert parameter._version == version


def exchange_data(policy: Policy) -> None:
    for parameter in policy.trainable().values():
        parameter.data = parameter.data * -3


def replace_parameter(policy: Policy) -> None:
    matrix = policy.causal_lm.get_decoder().layers[1].mlp.down_proj.lora_B["default"]
    matrix.weight = nn.Parameter(matrix.weight.detach() * -3)


def load_weights(policy: Policy) -> None:
    weights = {name: -3 * weight for name, weight in get_peft_model_state_dict(policy.model).items()}
    set_peft_model_state_dict(policy.model, weights)


def choose_another_adapter(policy: Policy) -> None:
    policy.model.add_adapter("second", LoraConfig(r=RANK, target_modules=["q_proj"], init_lora_weights=False))
    policy.model.set_adapter("second")


EDITS = [
    make_step,
    make_8_bit_step,
    edit_in_place,
    edit_data,
    exchange_data,
    replace_parameter,
    load_weights,
    choose_another_adapter,
]


@pytest.mark.parametrize("edit", EDITS, ids=lambda edit: edit.__name__)
def test_the_next_forward_sees_every_change_of_the_adapters(tiny_model, edit, expected):
    policy = make_policy(tiny_model())
    before = outcome(policy)
    edit(policy)
    after = outcome(policy)
    assert not torch.equal(after["logps"], before["logps"])
    assert is_equal(after, expected(policy))


@pytest.mark.parametrize("edit", EDITS[:-1], ids=lambda edit: edit.__name__)
def test_a_layer_that_is_called_outside_a_forward_sees_every_change_too(tiny_model, edit):
    """Generation reads its prompt so."""
    policy, x = make_policy(tiny_model()), torch.randn(1, 30, 32, dtype=torch.bfloat16)
    outcome(policy)
    mlp = policy.causal_lm.get_decoder().layers[1].mlp
    before = mlp(x)
    edit(policy)
    after = mlp(x)
    assert not torch.equal(after, before)
    assert torch.equal(after, load_copy(policy, tiny_model()).causal_lm.get_decoder().layers[1].mlp(x))


def load_copy(policy: Policy, folder: str) -> Policy:
    """Load the policy again, with the adapter that it has now."""
    loaded = load(folder, dtype="bfloat16", lora_rank=RANK)
    set_peft_model_state_dict(loaded.model, get_peft_model_state_dict(policy.model))
    return loaded


def test_the_casts_follow_the_adapters_to_another_device(tiny_model):
    policy = make_policy(tiny_model())
    outcome(policy)
    policy.to("meta")
    layers = lora_layers(policy.model)
    with cast_adapters(layers, torch.bfloat16):
        casts = [saro.model.fused_lora._parts(layer) for layer in layers]
    assert all((c.a_cast.device.type, c.b_cast.device.type) == ("meta", "meta") for c in casts)


@CHECKPOINTED
def test_another_forward_before_the_backward_changes_nothing(tiny_model, checkpointed):
    policy = make_policy(tiny_model(), gradient_checkpointing=checkpointed)
    alone = outcome(policy)
    policy.zero_grad(set_to_none=True)
    logps = policy(a_pack())
    policy.statistics(a_pack((13,)))
    policy(a_pack((17, 8)))
    logps.sum().backward()
    assert is_equal(gradients(policy) | {"logps": logps.detach()}, alone)


def test_a_change_between_forward_and_backward_is_refused(tiny_model):
    policy = make_policy(tiny_model())
    logps = policy(a_pack())
    edit_in_place(policy)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        logps.sum().backward()


@CHECKPOINTED
def test_forward_recomputation_and_backward_read_the_same_casts(tiny_model, checkpointed):
    """Even if the parameters change in between without a trace, and another forward casts them."""
    policy = make_policy(tiny_model(), gradient_checkpointing=checkpointed)
    unchanged = outcome(policy)
    policy.zero_grad(set_to_none=True)
    logps = policy(a_pack())
    edit_data(policy)
    policy(a_pack())
    logps.sum().backward()
    assert is_equal(gradients(policy) | {"logps": logps.detach()}, unchanged)


def test_a_second_backward_recomputes_with_the_same_casts(tiny_model):
    policy = make_policy(tiny_model(), gradient_checkpointing=True)
    once = outcome(policy)
    policy.zero_grad(set_to_none=True)
    logps = policy(a_pack())
    logps.sum().backward(retain_graph=True)
    policy.zero_grad(set_to_none=True)
    logps.sum().backward()
    assert is_equal(gradients(policy) | {"logps": logps.detach()}, once)


@CHECKPOINTED
def test_casts_take_two_bytes_a_parameter_until_the_backward_is_done(tiny_model, checkpointed, layers_seen):
    policy = make_policy(tiny_model(), gradient_checkpointing=checkpointed)
    logps = policy(a_pack())
    casts = {cast.data_ptr(): cast for layer in layers_seen for cast in (layer.a_cast, layer.b_cast)}
    assert sum(c.nbytes for c in casts.values()) == 2 * sum(p.numel() for p in policy.trainable().values())
    alive = [weakref.ref(cast) for cast in casts.values()]
    del casts
    layers_seen.clear()
    assert all(cast() is not None for cast in alive)
    logps.sum().backward()
    layers_seen.clear()
    del logps
    assert not any(cast() is not None for cast in alive)


@pytest.mark.parametrize("reason", ["disabled", "merged", "own forward", "dropout"])
def test_nothing_is_cast_at_once_where_peft_computes_the_layers(tiny_model, reason):
    policy = make_policy(tiny_model(), lora_dropout=0.5 if reason == "dropout" else None)
    if reason == "merged":
        policy.model.merge_adapter()
    contexts = {"disabled": policy.model.disable_adapter(), "own forward": own_layers(policy.causal_lm)}
    with torch.no_grad(), contexts.get(reason, nullcontext()), CastCounter() as counter:
        policy(a_pack())
    assert counter.calls["all"] == 0


def test_a_layer_that_is_replaced_is_freed(tiny_model):
    """Merging an adapter replaces all layers, and the memory may hold no second model."""
    policy = make_policy(tiny_model())
    outcome(policy)
    decoder = policy.causal_lm.get_decoder()
    replaced = weakref.ref(decoder.get_submodule("layers.0.self_attn.q_proj"))
    decoder.set_submodule("layers.0.self_attn.q_proj", nn.Linear(32, 32, dtype=torch.bfloat16))
    gc.collect()
    assert replaced() is None
    outcome(policy)


def test_a_deep_copy_computes_with_its_own_adapters(tiny_model, expected):
    policy = make_policy(tiny_model())
    copied = copy.deepcopy(policy)
    edit_in_place(copied)
    outcome(policy)
    assert is_equal(outcome(copied), expected(copied))
    assert not torch.equal(outcome(copied)["logps"], outcome(policy)["logps"])


@pytest.fixture
def process_group(tmp_path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'rendezvous'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@CHECKPOINTED
@pytest.mark.usefixtures("process_group")
def test_distributed_data_parallel_trains_the_same(tiny_model, checkpointed):
    runs = []
    for wrap in (lambda policy: policy, DistributedDataParallel):
        policy = make_policy(tiny_model(), gradient_checkpointing=checkpointed)
        module = wrap(policy)
        optimizer = torch.optim.AdamW(policy.trainable().values(), lr=0.1, fused=True)
        steps = []
        for _ in range(2):
            steps.append(outcome(policy, module))
            optimizer.step()
        runs.append(steps)
    assert all(is_equal(*steps) for steps in zip(*runs, strict=True))
    assert not torch.equal(runs[0][0]["logps"], runs[0][1]["logps"])
