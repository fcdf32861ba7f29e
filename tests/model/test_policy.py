"""Policy's packed log-probs and gradients equal those of transformers' own forward, one sequence at a time."""

from __future__ import annotations

import copy
import itertools
from functools import cache
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from attention_cases import VarlenOnCPU
from float64 import in_float64
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from tiny import KINDS_OF_LOGITS, KINDS_OF_MODEL, save_tiny_model
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, PhiConfig

from saro.config import ModelConfig
from saro.data.packs import lay_out, pack_trees
from saro.data.tree import ScoredSequence, build_tree
from saro.model.load import load_policy
from saro.model.policy import Policy
from saro.model.source import find_model
from saro.train.rw_objective import RWObjective

METHODS = ("full", "lora", "qlora")
VOCAB = 264
LOSS_BUDGET = 1e-12
GRADIENT_BUDGET = 1e-11


pytestmark = pytest.mark.usefixtures("one_thread")


def load(folder, method="full", **options):
    options = ModelConfig(name=folder, method=method, **options)
    return load_policy(find_model(options), options, torch.device("cpu"), seed=0)


def wake_adapters(policy):
    """Fill lora_B with random numbers. It starts at zero, where lora_A has no gradient."""
    rng = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in policy.trainable().items():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=rng) * 0.3)
    return policy


def unmodified(policy, folder):
    """Load the same model separately, with the policy's adapters, in float64 and with transformers' own attention."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    capped = getattr(model.config, "attn_logit_softcapping", None) is not None
    assert model.config._attn_implementation == ("eager" if capped else "sdpa")
    if isinstance(policy.model, PeftModel):
        model = get_peft_model(model, policy.model.peft_config["default"])
        model.load_state_dict(policy.model.state_dict())
    return model.double().train()


@pytest.fixture(scope="module")
def pair(tiny_model):
    """Return a function that gives (policy, unmodified model), in float64 and train mode, for a kind and method."""

    @cache
    def get(kind, method, checkpointing=False):
        folder = tiny_model(kind)
        policy = wake_adapters(load(folder, method, gradient_checkpointing=checkpointing, lora_rank=4))
        return policy.double().train(), unmodified(policy, folder)

    return get


def sequence(tokens, scored_from=1, record=0):
    tokens = np.array(tokens, np.int32)
    return ScoredSequence(tokens, scored_from, np.zeros(len(tokens) - scored_from, np.uint8), record)


def random_sequences(lengths, seed=0):
    rng = np.random.default_rng(seed)
    return [sequence(rng.integers(4, VOCAB, n), 1 + n // 4, i) for i, n in enumerate(lengths)]


def weights_of(sequences):
    """Return a different weight for each scored token, so that swapped rows are noticed."""
    return [
        0.5 + torch.arange(len(s.row_kinds), dtype=torch.float64).add(i).sin() ** 2 for i, s in enumerate(sequences)
    ]


@in_float64()
def native_run(model, sequences):
    """Run each full sequence alone. Return the log-probs and the gradients of all parameters."""
    model.zero_grad(set_to_none=True)
    logps = []
    for s, weight in zip(sequences, weights_of(sequences), strict=True):
        tokens = torch.from_numpy(s.tokens.astype(np.int64))
        logits = model(input_ids=tokens[None, :-1], use_cache=False).logits[0, s.scored_from - 1 :]
        logps.append(logits.log_softmax(-1).gather(1, tokens[s.scored_from :, None])[:, 0])
        (logps[-1] * weight).sum().neg().backward()
    return torch.cat(logps).detach(), gradients_of(model)


@in_float64()
def packed_run(policy, trees_by_pack, sequences):
    """Return the same as ``native_run``, from packs. The trees hold ``sequences`` in their order."""
    policy.zero_grad(set_to_none=True)
    weights = iter(weights_of(sequences))
    logps = []
    for trees in trees_by_pack:
        pack = lay_out(trees)
        rows = policy(pack)
        assert rows.shape == (pack.rows,)
        entries = rows.index_select(0, pack.entry_row)
        (entries * torch.cat([next(weights) for _ in pack.records])).sum().neg().backward()
        logps.append(entries.detach())
    return torch.cat(logps), gradients_of(policy.model)


def gradients_of(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


def assert_equal_runs(packed, native, sequences):
    """Check that the loss is within LOSS_BUDGET and each gradient within GRADIENT_BUDGET, both relative."""
    weight = torch.cat(weights_of(sequences))
    loss, expected = ((logps * weight).sum() for logps in (packed[0], native[0]))
    assert abs(loss - expected) <= LOSS_BUDGET * abs(expected)
    # Check each row too, so that errors cannot cancel: 1e-11 nats, where rows are 1 to 20 nats.
    assert (packed[0] - native[0]).abs().max() <= 1e-11
    assert packed[1].keys() == native[1].keys()
    for name, gradient in packed[1].items():
        assert native[1][name].norm() > 0, name
        error = (gradient - native[1][name]).norm() / native[1][name].norm()
        assert error <= GRADIENT_BUDGET, f"{name}: {error:.1e}"


# Packs equal the unmodified model.


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
@pytest.mark.parametrize("method", ["full", "lora"])
@pytest.mark.parametrize("kind", [*KINDS_OF_MODEL, *KINDS_OF_LOGITS])
def test_a_pack_of_single_sequences_equals_each_sequence_alone(pair, kind, method, checkpointing):
    policy, model = pair(kind, method, checkpointing)
    sequences = random_sequences([13, 2, 30, 5])  # 30 is well beyond the window of 8
    packed = packed_run(policy, [[build_tree([s]) for s in sequences]], sequences)
    assert_equal_runs(packed, native_run(model, sequences), sequences)


def ladder(depth):
    """Make sequences whose tree has paths of 1 to ``depth`` nodes below the root; one branches off at each step."""
    rng = np.random.default_rng(depth)
    trunk = rng.integers(4, VOCAB, 3 + 4 * depth)
    rows = [trunk]
    for step in range(depth):
        cut = 3 + 4 * step
        rows.append(np.concatenate([trunk[:cut], (trunk[cut : cut + 1] + 1) % VOCAB, rng.integers(4, VOCAB, 5)]))
    return [sequence(row, 2, i) for i, row in enumerate(rows)]


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
@pytest.mark.parametrize("depth", [1, 2, 3, 4])
@pytest.mark.parametrize("kind", KINDS_OF_MODEL)
def test_shared_prefixes_equal_each_full_sequence_alone(pair, kind, depth, checkpointing):
    policy, model = pair(kind, "lora", checkpointing)
    sequences = ladder(depth)
    tree = build_tree(sequences)
    assert max(map(len, tree.paths)) == depth + 1
    assert tree.tokens < sum(len(s.tokens) - 1 for s in sequences)
    assert_equal_runs(packed_run(policy, [[tree]], sequences), native_run(model, sequences), sequences)


ROOT = [10, 11, 12, 13, 14, 15, 16, 17, 18, 19]
SPECIAL_TREES = {
    "children of one token": [[*ROOT, 30], [*ROOT, 31], [*ROOT, 32, 33]],
    "only children of one token": [[*ROOT, 30], [*ROOT, 31]],
    "identical responses": [[*ROOT, 30, 31], [*ROOT, 30, 31]],
    "a response that is the start of another": [[*ROOT, 30, 31], [*ROOT, 30, 31, 32, 33]],
    "a fork at the second token": [[10, 11, 12, 13], [10, 21, 22, 23]],
    "nothing in common": [[10, 11, 12], [20, 21, 22]],
    "the shortest sequences": [[10, 11], [10, 12]],
}


@pytest.mark.parametrize("rows", SPECIAL_TREES.values(), ids=SPECIAL_TREES)
@pytest.mark.parametrize("kind", ["llama", "mistral"])
def test_special_trees_equal_each_full_sequence_alone(pair, kind, rows):
    policy, model = pair(kind, "full")
    sequences = [sequence(row, record=i) for i, row in enumerate(rows)]
    packed, native = packed_run(policy, [[build_tree(sequences)]], sequences), native_run(model, sequences)
    assert_equal_runs_in_all(packed, native, sequences)


def assert_equal_runs_in_all(packed, native, sequences):
    """Check as above, but all gradients as one vector: a sequence of two tokens gives its queries and keys almost none.

    A single parameter may be off by ten times the budget, relative to its norm or to a hundredth of the largest norm.
    """
    largest = max(gradient.norm() for gradient in native[1].values())
    errors = {name: (gradient - native[1][name]).norm() for name, gradient in packed[1].items()}
    assert packed[1].keys() == native[1].keys()
    for name, error in errors.items():
        assert error <= 10 * GRADIENT_BUDGET * max(native[1][name].norm(), largest / 100), name
    total = torch.stack([gradient.norm() for gradient in native[1].values()]).norm()
    assert torch.stack(list(errors.values())).norm() <= GRADIENT_BUDGET * total
    assert_equal_runs((packed[0], {}), (native[0], {}), sequences)


@st.composite
def forests(draw):
    """Draw 1 to 3 trees of 1 to 4 sequences. Each branches off an earlier sequence at any token, or repeats it."""
    trees = []
    token = st.integers(4, 12)
    for _ in range(draw(st.integers(1, 3))):
        rows = [draw(st.lists(token, min_size=2, max_size=14))]
        for _ in range(draw(st.integers(0, 3))):
            base = draw(st.sampled_from(rows))
            tail = draw(st.lists(token, min_size=0, max_size=8))
            rows.append(base[: draw(st.integers(2 - min(1, len(tail)), len(base)))] + tail)
        trees.append([sequence(row, draw(st.integers(1, len(row) - 1))) for row in rows])
    return trees


@pytest.mark.parametrize("kind", KINDS_OF_MODEL)
def test_any_forest_equals_each_full_sequence_alone(pair, kind):
    @settings(deadline=None, max_examples=15)
    @given(forest=forests(), method=st.sampled_from(["full", "lora"]))
    def check(forest, method):
        policy, model = pair(kind, method)
        sequences = list(itertools.chain(*forest))
        packed = packed_run(policy, [[build_tree(tree) for tree in forest]], sequences)
        assert_equal_runs_in_all(packed, native_run(model, sequences), sequences)

    check()


@pytest.mark.parametrize("kind", KINDS_OF_MODEL)
def test_a_pack_without_isolation_is_noticed(pair, kind):
    policy, model = pair(kind, "full")
    sequences = random_sequences([13, 30])
    with torch.no_grad(), in_float64():
        pack = lay_out([build_tree([s]) for s in sequences])
        leaky = policy(pack, isolated=False).index_select(0, pack.entry_row)
    native = native_run(model, sequences)[0]
    rows = len(sequences[0].row_kinds)
    assert (leaky[:rows] - native[:rows]).abs().max() <= 1e-11  # nothing comes before the first sequence
    assert (leaky[rows:] - native[rows:]).abs().mean() > 1e-2


def test_checkpointing_does_recompute_the_layers(pair):
    policy, _ = pair("llama", "lora", True)
    calls = []
    layers = policy.causal_lm.get_decoder().layers
    handles = [layer.input_layernorm.register_forward_hook(lambda *_: calls.append(1)) for layer in layers]
    try:
        policy(lay_out([build_tree([s]) for s in random_sequences([9])])).sum().backward()
    finally:
        for handle in handles:
            handle.remove()
    assert len(calls) == 2 * len(layers)


@pytest.mark.parametrize("kind", KINDS_OF_MODEL)
def test_varlen_backend_trains_like_the_sdpa_backend(pair, kind, monkeypatch):
    monkeypatch.setattr(torch.nn.attention.varlen, "varlen_attn", VarlenOnCPU())
    policy, model = pair(kind, "full")
    monkeypatch.setattr(policy, "attention", "varlen")
    sequences = ladder(3)
    packed = packed_run(policy, [[build_tree(sequences)]], sequences)
    assert_equal_runs(packed, native_run(model, sequences), sequences)


# Invariance.


@pytest.mark.parametrize("method", ["full", "lora"])
def test_gradients_do_not_depend_on_the_pack_size(pair, method):
    policy, _ = pair("llama", method)
    sequences = random_sequences([13, 2, 30, 5, 22, 9])
    trees = [build_tree([s]) for s in sequences]
    objective = RWObjective(np.zeros(len(sequences), np.uint8))
    rows = objective.counts(trees)["rows"]

    def run(pack_tokens):
        policy.zero_grad(set_to_none=True)
        packs = list(pack_trees(trees, pack_tokens))
        loss = 0.0
        for pack in packs:
            share = objective(policy(pack), pack).losses["rows"] / rows
            share.backward()
            loss += share.item()
        return len(packs), loss, gradients_of(policy.model)

    # A budget of 30 fits the longest by itself, or two of the others.
    (many, loss, gradients), (few, loss_few, gradients_few), (one, loss_one, gradients_one) = map(run, (30, 48, 1000))
    assert many > few > one == 1
    for other_loss, others in ((loss_few, gradients_few), (loss_one, gradients_one)):
        assert abs(loss - other_loss) <= LOSS_BUDGET * abs(loss)
        for name, gradient in gradients.items():
            assert (gradient - others[name]).norm() <= GRADIENT_BUDGET * gradient.norm(), name


def test_gradients_do_not_depend_on_the_order_in_a_pack(pair):
    policy, model = pair("mistral", "lora")
    sequences = random_sequences([13, 2, 30])[::-1]
    packed = packed_run(policy, [[build_tree([s]) for s in sequences]], sequences)
    assert_equal_runs(packed, native_run(model, sequences), sequences)


@pytest.mark.parametrize("method", METHODS)
def test_the_same_pack_gives_the_same_bits(tiny_model, method):
    policy = wake_adapters(load(tiny_model("llama"), method))
    trees = [build_tree(ladder(3)), build_tree([random_sequences([17])[0]])]
    runs = []
    for _ in range(2):
        policy.zero_grad(set_to_none=True)
        logps = policy(lay_out(trees))
        logps.sum().backward()
        runs.append([logps.detach(), *gradients_of(policy.model).values()])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("kind", ["llama", "gemma3 with a softcap", "cohere"])
def test_statistics_equal_those_of_the_models_own_distributions(pair, kind):
    policy, model = pair(kind, "lora")
    tree, n = ladder(3), 0
    got = policy.statistics(lay_out([build_tree([s]) for s in tree]))
    for s in tree:
        tokens = torch.from_numpy(s.tokens.astype(np.int64))
        with torch.no_grad():
            logits = model(input_ids=tokens[None, :-1], use_cache=False).logits[0, s.scored_from - 1 :]
        logps, rows = logits.log_softmax(-1), slice(n, n := n + len(logits))
        torch.testing.assert_close(got.entropy[rows], -(logps.exp() * logps).sum(1), rtol=1e-6, atol=1e-6)
        assert torch.equal(got.top1[rows], logits.argmax(1) == tokens[s.scored_from :])
    assert len(got.entropy) == n


@pytest.mark.parametrize("method", METHODS)
def test_statistics_have_the_log_probs_of_the_forward_bit_for_bit_without_gradient(tiny_model, method):
    policy = wake_adapters(load(tiny_model("llama"), method))
    pack = lay_out([build_tree(ladder(3))])
    logps = policy.statistics(pack).logps
    assert not logps.requires_grad
    assert torch.equal(logps, policy(pack).detach())


# The empty pack, which a rank without work runs.


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", KINDS_OF_MODEL)
def test_the_empty_pack_has_a_zero_gradient_for_every_trainable_parameter(tiny_model, kind, method, checkpointing):
    policy = wake_adapters(load(tiny_model(kind), method, gradient_checkpointing=checkpointing)).train()
    pack = lay_out([])
    logps = policy(pack)
    assert logps.shape == (0,)
    RWObjective(np.zeros(1, np.uint8))(logps, pack).losses["rows"].backward()
    assert policy.trainable()
    for name, parameter in policy.trainable().items():
        assert parameter.grad is not None, name
        assert not parameter.grad.any(), name


# Precision: packing must not add to the rounding error of the dtype.


@pytest.mark.parametrize(
    ("method", "dtype"), [("full", "float32"), ("full", "bfloat16"), ("lora", "float32"), ("lora", "bfloat16")]
)
@pytest.mark.parametrize("kind", ["llama", "gemma3", *KINDS_OF_LOGITS])
def test_the_error_against_float64_is_at_most_twice_that_of_the_plain_forward(pair, tiny_model, kind, method, dtype):
    policy = wake_adapters(load(tiny_model(kind), method, dtype=dtype, lora_rank=4))
    sequences = random_sequences([60, 40, 50])
    truth = native_run(pair(kind, method)[1], sequences)[0]
    plain_model = AutoModelForCausalLM.from_pretrained(tiny_model(kind), dtype=policy.causal_lm.dtype)
    if method == "lora":
        plain_model = get_peft_model(plain_model, policy.model.peft_config["default"])
        plain_model.load_state_dict(policy.model.state_dict())
    plain = []
    with torch.no_grad():
        for s in sequences:
            tokens = torch.from_numpy(s.tokens.astype(np.int64))
            with policy.precision():
                logits = plain_model(input_ids=tokens[None, :-1]).logits[0, s.scored_from - 1 :]
            plain.append(logits.float().log_softmax(-1).gather(1, tokens[s.scored_from :, None])[:, 0])
        pack = lay_out([build_tree([s]) for s in sequences])
        packed = policy(pack).index_select(0, pack.entry_row)
    assert packed.dtype == torch.float32
    error, plain_error = ((logps - truth).abs().mean() for logps in (packed, torch.cat(plain)))
    assert 0 < error <= 2 * plain_error


def test_autocast_keeps_gradients_of_fp32_masters_in_fp32(tiny_model):
    policy = load(tiny_model("llama"), "full", dtype="bfloat16")
    logps = policy(lay_out([build_tree([s]) for s in random_sequences([20])]))
    logps.sum().backward()
    assert logps.dtype == torch.float32
    for name, parameter in policy.trainable().items():
        assert parameter.dtype == parameter.grad.dtype == torch.float32, name
    with policy.precision():
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.bfloat16


def test_attention_dropout_is_on_in_train_mode_and_off_in_eval_mode(tmp_path):
    policy = load(str(save_tiny_model(tmp_path, "llama", attention_dropout=0.5)), "full", dropout=True)
    pack = lay_out([build_tree([s]) for s in random_sequences([20])])
    with torch.no_grad():
        policy.train()
        assert not torch.equal(policy(pack), policy(pack))
        policy.eval()
        assert torch.equal(policy(pack), policy(pack))


# Rows that reach the LM head.


class _LargestOverVocabulary(TorchDispatchMode):
    """Record the most rows of any tensor over the vocabulary that is made inside, except views of the weight."""

    def __init__(self, weight):
        super().__init__()
        self.rows = 0
        self._weight = weight.untyped_storage().data_ptr()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(output):
            made = isinstance(leaf, torch.Tensor) and leaf.untyped_storage().data_ptr() != self._weight
            if made and leaf.ndim and leaf.shape[-1] == VOCAB:
                self.rows = max(self.rows, leaf.numel() // VOCAB)
        return output


def test_only_scored_rows_reach_the_head(tiny_model):
    policy = load(tiny_model("llama"), "lora")
    tokens = np.random.default_rng(0).integers(4, VOCAB, 300)
    pack = lay_out([build_tree([sequence(tokens, 297)])])
    assert (pack.tokens, pack.rows) == (299, 3)
    with _LargestOverVocabulary(policy.causal_lm.get_output_embeddings().weight) as seen:
        policy(pack).sum().backward()
    assert seen.rows == 3


class _RowsOfGradientProducts(TorchDispatchMode):
    """Counts the rows of products whose first factor is a gradient of logits."""

    def __init__(self):
        super().__init__()
        self.rows = 0

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        if operator.overloadpacket.__name__ in ("mm", "addmm", "addmm_"):
            left = [x for x in args if isinstance(x, torch.Tensor)][-2]
            self.rows += len(left) if left.shape[1] == VOCAB else 0
        return operator(*args, **(kwargs or {}))


@pytest.mark.parametrize("method", ["lora", "full"])
def test_rows_without_gradient_are_scored_and_cost_no_gradient_product(pair, method):
    policy, _ = pair("llama", method)
    pack = lay_out([build_tree([sequence([5, 6, 7, 8, 9], 1), sequence([5, 6, 7, 10, 11], 1)])])
    assert (pack.margin_rows, pack.rows) == (4, 6)
    upstream = torch.tensor([1.0, -2.0, 0.5, 3.0, 0.0, 0.0], dtype=torch.float64)
    runs = []
    for rows in (pack.rows, pack.margin_rows):
        with _RowsOfGradientProducts() as products:
            logps = policy(pack, gradient_rows=rows)
            gradients = torch.autograd.grad((logps * upstream).sum(), list(policy.trainable().values()))
        assert products.rows == rows
        runs.append([logps.detach(), *gradients])
    for ours, full in zip(*reversed(runs), strict=True):
        assert (ours - full).norm() <= 1e-12 * full.norm()


def test_two_rows_that_read_the_same_hidden_state_both_train_it(pair):
    """The gradients of a repeated row index add up."""
    policy, model = pair("llama", "full")
    sequences = [sequence([5, 6, 7, 8], 3), sequence([5, 6, 7, 9], 3)]
    pack = lay_out([build_tree(sequences)])
    assert pack.row_hidden.tolist() == [2, 2]
    assert_equal_runs(packed_run(policy, [[build_tree(sequences)]], sequences), native_run(model, sequences), sequences)


def test_the_heads_bias_is_scored_and_trained():
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = AutoModelForCausalLM.from_config(PhiConfig(vocab_size=VOCAB, eos_token_id=2, **shape))
    rng = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=rng) * 0.2)
    native = copy.deepcopy(model).double().eval()
    policy = Policy(model.double()).eval()
    assert policy.causal_lm.lm_head.bias.any()
    sequences = ladder(2)
    packed = packed_run(policy, [[build_tree(sequences)]], sequences)
    assert "lm_head.bias" in packed[1]
    assert_equal_runs_in_all(packed, native_run(native, sequences), sequences)


# The module.


def test_a_tied_head_is_one_trainable_parameter(tiny_model):
    tied, untied = (load(tiny_model(kind), "full").trainable() for kind in ("llama", "qwen3"))
    assert not any("lm_head" in name for name in tied)
    assert any("lm_head" in name for name in untied)
    assert len({id(p) for p in tied.values()}) == len(tied)


@pytest.mark.parametrize("method", ["full", "lora"])
def test_causal_lm_is_the_inner_transformers_model(tiny_model, method):
    assert type(load(tiny_model("llama"), method).causal_lm).__name__ == "LlamaForCausalLM"


@pytest.mark.parametrize("training", [True, False])
def test_evaluating_keeps_the_mode_even_after_an_exception(tiny_model, training):
    policy = load(tiny_model("llama"), "lora").train(training)
    with pytest.raises(RuntimeError, match="inside"), policy.evaluating():
        raise RuntimeError("inside" if not policy.training else "still training")
    assert policy.training == training


@pytest.mark.parametrize(("method", "stored"), [("full", torch.float32), ("lora", torch.bfloat16)])
def test_the_compute_dtype_is_that_of_the_products(tiny_model, method, stored):
    policy = load(tiny_model("llama"), method, dtype="bfloat16")
    assert policy.compute_dtype == torch.bfloat16
    assert policy.causal_lm.dtype == stored
    assert load(tiny_model("llama"), method).compute_dtype == torch.float32


def test_prompt_learning_is_refused(tiny_model):
    model = AutoModelForCausalLM.from_pretrained(tiny_model("llama"))
    model = get_peft_model(model, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    with pytest.raises(ValueError, match=r"prompt-learning adapters .* use LoRA"):
        Policy(model)


def test_other_adapters_are_not_mistaken_for_prompt_learning(tiny_model):
    model = AutoModelForCausalLM.from_pretrained(tiny_model("llama"))
    assert Policy(get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]))).trainable()


def test_a_target_outside_the_vocabulary_is_an_error(tiny_model):
    with pytest.raises(ValueError, match=f"targets range from 5 to {VOCAB}, outside"):
        load(tiny_model("llama"), "lora")(lay_out([build_tree([sequence([5, 5, VOCAB])])]))


def test_an_unknown_head_is_an_error(tiny_model):
    model = AutoModelForCausalLM.from_pretrained(tiny_model("llama"))
    with pytest.raises(ValueError, match=r"impl 'tield' is unknown; did you mean 'tiled'\?"):
        Policy(model, head="tield")(lay_out([build_tree([sequence([5, 6])])]))


@pytest.mark.parametrize("method", ["full", "lora"])
def test_the_reference_head_and_the_tiled_head_give_equal_gradients(pair, method, monkeypatch):
    policy, _ = pair("qwen3", method)
    sequences = ladder(2)
    runs = []
    for head in ("reference", "tiled"):
        monkeypatch.setattr(policy, "head", head)
        runs.append(packed_run(policy, [[build_tree(sequences)]], sequences))
    assert_equal_runs(*runs, sequences)


def test_the_plan_and_its_window_reach_every_layer(tiny_model, monkeypatch):
    """transformers' decoders must not silently drop an argument on the way to attention."""
    from saro.model import attention

    seen = []
    original = attention.packed_attention

    def spy(module, *args, **kwargs):
        seen.append(SimpleNamespace(layer=module.layer_idx, plan=kwargs["plan"], window=kwargs.get("sliding_window")))
        return original(module, *args, **kwargs)

    monkeypatch.setattr(attention, "packed_attention", spy)
    policy = load(tiny_model("gemma3"), "lora")
    with torch.no_grad():
        policy(lay_out([build_tree([s]) for s in random_sequences([9])]))
    assert [(s.layer, s.window) for s in seen] == [(0, 8), (1, None)]
    assert seen[0].plan is seen[1].plan
