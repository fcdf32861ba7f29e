"""Layers are recomputed by number, and their inputs may be kept on the host: neither changes a bit of a gradient."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from loaded import a_pack, load, refused
from tiny import save_tiny_model

from saro.config import ModelConfig
from saro.errors import SaroError
from saro.model.load import load_policy
from saro.model.policy import Policy
from saro.model.recompute import InputsOnHost, count_recomputed, recomputable_layers, recompute_layers
from saro.model.source import find_model

pytestmark = pytest.mark.usefixtures("one_thread")

LAYERS = 3


@pytest.fixture(scope="session")
def three_layers(tmp_path_factory) -> str:
    return str(save_tiny_model(tmp_path_factory.mktemp("three") / "model", num_hidden_layers=LAYERS))


def wake(policy: Policy) -> Policy:
    """Give adapters random values, in training mode: new ones compute nothing."""
    torch.manual_seed(3)
    with torch.no_grad():
        for name, parameter in policy.trainable().items():
            if "lora_" in name:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return policy.train()


def outcome(policy: Policy) -> dict[str, torch.Tensor]:
    """Return the log-probs of a pack, and the gradients of their sum."""
    policy.zero_grad(set_to_none=True)
    torch.manual_seed(5)  # of the dropout
    logps = policy(a_pack())
    logps.sum().backward()
    return {"logps": logps.detach()} | {name: p.grad.clone() for name, p in policy.trainable().items()}


def is_equal(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


WAYS = {
    "full": {"method": "full"},
    "full in bfloat16": {"method": "full", "dtype": "bfloat16"},
    "lora": {"method": "lora"},
    "lora with cast adapters": {"method": "lora", "dtype": "bfloat16"},
    "lora by peft, with dropout": {"method": "lora", "fused_lora": False, "lora_dropout": 0.5},
    "qlora": {"method": "qlora"},
    "qlora with cast adapters": {"method": "qlora", "dtype": "bfloat16"},
}


@pytest.mark.parametrize("offloading", [False, True], ids=["on the device", "on the host"])
@pytest.mark.parametrize("way", WAYS)
def test_no_number_of_recomputed_layers_changes_a_bit(three_layers, way, offloading):
    kept = outcome(wake(load(three_layers, **WAYS[way])))
    for number in (1, 2, True):
        options = {"gradient_checkpointing": number, "activation_offloading": offloading}
        policy = wake(load(three_layers, **WAYS[way], **options))
        assert count_recomputed(policy.causal_lm) == (LAYERS if number is True else number)
        assert is_equal(outcome(policy), kept), number


def forwards(policy: Policy) -> list[int]:
    """Return how often each layer computes its MLP in a forward and its backward."""
    calls = [0] * LAYERS
    handles = []
    for index, layer in enumerate(recomputable_layers(policy.causal_lm)):

        def count(*_: object, index: int = index) -> None:
            calls[index] += 1

        handles.append(layer.mlp.register_forward_pre_hook(count))
    outcome(policy)
    for handle in handles:
        handle.remove()
    return calls


@pytest.mark.parametrize("number", range(LAYERS + 1))
def test_the_first_layers_are_recomputed_and_the_others_are_not(three_layers, number):
    policy = load(three_layers, gradient_checkpointing=number).train()
    assert forwards(policy) == [2] * number + [1] * (LAYERS - number)


def test_the_number_can_be_changed_later(three_layers):
    policy = load(three_layers, gradient_checkpointing=True).train()
    for number in (0, 3, 1):
        recompute_layers(policy.causal_lm, number)
        assert forwards(policy) == [2] * number + [1] * (LAYERS - number)


def test_the_summary_says_how_many_layers_are_recomputed(three_layers):
    assert "2 of 3 layers recomputed" in load(three_layers, gradient_checkpointing=2).summary()
    assert "recomputed" not in load(three_layers).summary()


@pytest.mark.parametrize("number", [LAYERS + 1, 1000])
def test_more_layers_than_the_model_has_are_refused(three_layers, number):
    refused(three_layers, f"is {number}; the model has 3 layers; give at most 3", gradient_checkpointing=number)


def test_a_model_that_cannot_be_recomputed_is_refused(three_layers, monkeypatch):
    monkeypatch.setattr("transformers.LlamaForCausalLM.supports_gradient_checkpointing", False)
    refused(three_layers, "cannot recompute the layers of LlamaForCausalLM; leave it out", gradient_checkpointing=True)


def test_a_negative_number_is_refused():
    with pytest.raises(SaroError, match=r"^model.gradient_checkpointing is -1; it must be at least 0$"):
        ModelConfig(gradient_checkpointing=-1)


@pytest.mark.parametrize("number", [False, 0])
def test_inputs_cannot_be_on_the_host_if_no_layer_is_recomputed(number):
    with pytest.raises(SaroError, match=r"none is recomputed; set --model.gradient_checkpointing true"):
        ModelConfig(gradient_checkpointing=number, activation_offloading=True)


# What is kept, and where.


class Parked:
    """Records every tensor that is parked on the host."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.tensors: list[torch.Tensor] = []
        original = InputsOnHost._park

        def park(hooks: InputsOnHost, tensor: torch.Tensor) -> object:
            parked = original(hooks, tensor)
            if parked is not tensor:
                self.tensors.append(tensor)
            return parked

        monkeypatch.setattr(InputsOnHost, "_park", park)


def test_the_inputs_of_recomputed_layers_and_nothing_else_go_to_the_host(three_layers, monkeypatch):
    parked = Parked(monkeypatch)
    policy = load(three_layers, gradient_checkpointing=2, activation_offloading=True).train()
    pack = a_pack()
    policy(pack)
    width = policy.causal_lm.config.hidden_size
    assert [tuple(tensor.shape) for tensor in parked.tensors] == [(1, pack.tokens, width)] * 2


def test_without_a_gradient_nothing_goes_to_the_host(three_layers, monkeypatch):
    parked = Parked(monkeypatch)
    policy = load(three_layers, gradient_checkpointing=True, activation_offloading=True).train()
    with torch.no_grad():
        policy(a_pack())
    assert not parked.tensors


def test_each_tensor_of_a_layer_with_two_is_fetched_once_and_waited_for(tmp_path, monkeypatch):
    """A layer of Gemma 4 also gets an embedding of each token for itself."""
    types = ["sliding_attention", "full_attention"] * 2
    folder = save_tiny_model(tmp_path, "gemma4", num_hidden_layers=4, layer_types=types)
    expected = outcome(wake(load(folder)))
    parked = Parked(monkeypatch)
    events: dict[int, list[str]] = {}
    alive = []  # so that no two have the same id
    copy, wait = InputsOnHost._fetch, InputsOnHost._wait_for

    def fetch(hooks: InputsOnHost, tensor: object) -> None:
        if tensor.on_device is None:
            alive.append(tensor)
            events.setdefault(id(tensor), []).append("fetched")
        copy(hooks, tensor)

    def wait_for(hooks: InputsOnHost, tensor: object) -> None:
        if id(tensor) in events:
            events[id(tensor)].append("waited for")
        wait(hooks, tensor)

    monkeypatch.setattr(InputsOnHost, "_fetch", fetch)
    monkeypatch.setattr(InputsOnHost, "_wait_for", wait_for)
    assert is_equal(outcome(wake(load(folder, gradient_checkpointing=True, activation_offloading=True))), expected)
    assert len(parked.tensors) == 2 * 4
    # The last two layers have not left the device when the backward begins.
    assert list(events.values()) == [["fetched", "waited for"]] * 4


def chain(hooks: InputsOnHost, links: int) -> tuple[torch.Tensor, torch.Tensor, list[weakref.ref]]:
    """Multiply a number of tensors, each saved under the hooks. Return leaf, result, and references to what was saved."""
    leaf = torch.linspace(0.5, 1.5, 8, dtype=torch.float64, requires_grad=True)
    x, saved = leaf * 1, []
    for _ in range(links):
        with hooks:
            y = x**2
        saved.append(weakref.ref(x))
        x = y
    return leaf, x, saved


def test_saved_tensors_leave_the_device_while_the_forward_runs():
    _, result, saved = chain(InputsOnHost(), 6)
    gc.collect()
    # detach() makes another tensor of the same memory, so look at what the graph holds.
    parked = [node._raw_saved_self.data for node in graph(result)]
    on_device = [entry.on_device is not None for entry in parked][::-1]
    assert on_device == [False] * 4 + [True] * 2
    assert all(reference() is None for reference in saved)


def graph(result: torch.Tensor) -> list:
    """Return the nodes of a chain of powers, the last one first."""
    nodes, node = [], result.grad_fn
    while node is not None and "Pow" in node.name():
        nodes.append(node)
        node = node.next_functions[0][0]
    return nodes


def test_tensors_come_back_one_before_they_are_read_and_are_let_go():
    leaf, result, _ = chain(InputsOnHost(), 6)
    parked = [node._raw_saved_self.data for node in graph(result)][::-1]
    held: list[list[int]] = []
    for node in graph(result):
        node.register_hook(lambda *_: held.append([i for i, p in enumerate(parked) if p.on_device is not None]))
    result.sum().backward()
    # After the backward of link 5: 4 has not left yet. After that of 4: 3 is on its way back, and so on.
    assert held == [[4], [3], [2], [1], [0], []]
    expected = leaf.detach().clone().requires_grad_()
    (expected ** (2**6)).sum().backward()
    torch.testing.assert_close(leaf.grad, expected.grad)


def test_a_graph_can_be_read_twice():
    leaf, result, _ = chain(InputsOnHost(), 4)
    (first,) = torch.autograd.grad(result.sum(), leaf, retain_graph=True)
    (second,) = torch.autograd.grad(result.sum(), leaf)
    assert torch.equal(first, second)


def test_a_forward_whose_graph_is_dropped_holds_no_memory():
    hooks = InputsOnHost()
    _, result, _ = chain(hooks, 3)
    parked = [weakref.ref(node._raw_saved_self.data) for node in graph(result)]
    del result
    gc.collect()
    assert all(reference() is None for reference in parked)
    leaf, again, _ = chain(hooks, 3)
    again.sum().backward()
    assert leaf.grad is not None


# On a GPU the copies run on a stream of their own.

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="copies to pinned memory need CUDA")


@needs_cuda
def test_on_a_gpu_copies_beside_the_computation_have_the_right_values():
    """Each link computes for long on a busy stream, so that a copy that was not waited for would be seen."""
    torch.manual_seed(0)
    weight = torch.randn(2048, 2048, device="cuda") / 2048**0.5
    start = torch.randn(4096, 2048, device="cuda")

    def run(hooks: InputsOnHost | None) -> torch.Tensor:
        leaf = start.clone().requires_grad_()
        x = leaf
        for _ in range(12):
            y = x @ weight
            if hooks is None:
                x = y.sin()
            else:
                with hooks:
                    x = y.sin()
        x.sum().backward()
        return leaf.grad

    expected = run(None)
    hooks = InputsOnHost()
    for _ in range(5):
        assert torch.equal(run(hooks), expected)


@needs_cuda
def test_on_a_gpu_saved_tensors_are_in_pinned_memory_and_their_memory_is_free():
    n = 4 * 2**20  # 16 MiB

    def peak(hooks: InputsOnHost | None) -> int:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        x = torch.rand(n, device="cuda", requires_grad=True)
        for _ in range(16):
            if hooks is None:
                x = x.sin()
            else:
                with hooks:
                    x = x.sin()
        x.sum().backward()
        return torch.cuda.max_memory_allocated() - before

    bytes_of_one = 4 * n
    assert peak(None) > 16 * bytes_of_one
    assert peak(InputsOnHost()) < 8 * bytes_of_one
    with InputsOnHost():
        result = torch.rand(n, device="cuda", requires_grad=True).sin()
    assert result.grad_fn._raw_saved_self.data.host.is_pinned()


@needs_cuda
@pytest.mark.parametrize("number", [1, True])
def test_on_a_gpu_no_bit_of_a_gradient_changes(three_layers, number):
    device = torch.device("cuda")

    def run(**recomputation: object) -> dict[str, torch.Tensor]:
        options = ModelConfig(name=three_layers, method="lora", dtype="float32", **recomputation)
        policy = wake(load_policy(find_model(options), options, device, 0))
        policy(a_pack().to(device)).sum().backward()
        return {name: p.grad for name, p in policy.trainable().items()}

    kept = run()
    assert is_equal(run(gradient_checkpointing=number), kept)
    assert is_equal(run(gradient_checkpointing=number, activation_offloading=True), kept)
