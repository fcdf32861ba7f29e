"""check_packs passes on correct packing and fails on every kind of wrong packing."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from loaded import DATA, examples_of, load
from tiny import BOS, IM_END, KINDS_OF_LOGITS, KINDS_OF_MODEL, PAD, random_model, save_tiny_model, tiny_config
from transformers import (
    BertConfig,
    BloomConfig,
    CTRLConfig,
    FalconConfig,
    MambaConfig,
    ModernBertDecoderConfig,
    OPTConfig,
    RwkvConfig,
    StableLmConfig,
)
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaForCausalLM

from saro.checks import forwards
from saro.checks.check_packs import _TAIL, check_packs, choose_sequences
from saro.data.dataset import PairSet
from saro.errors import SaroError
from saro.model import attention, fused_lora
from saro.model import policy as policy_module
from saro.model.attention import PACKED, AttentionPlan
from saro.model.policy import Policy
from saro_kernels import LoraLinear
from saro_kernels.lora_group import LoraGroup

METHODS = ("full", "lora", "qlora")
ADAPTERS = ("lora", "qlora")


pytestmark = pytest.mark.usefixtures("one_thread")


# The choice of sequences.


@pytest.mark.parametrize(
    ("lengths", "window", "chosen"),
    [
        ((21, 12, 34), None, (12, 21)),
        ((12, 12, 34), None, (12, 34)),
        ((21, 12, 34), 8, (12, 21)),
        ((5, 6, 12, 13, 34), 8, (5, 13)),  # 13 is more than 1.5 times the window of 8
        ((5, 6, 10, 11), 8, (5, 11)),  # none is that long, so take the longest
        ((5, 6, 9), 8, (5, 6)),  # the longest reads 8 of its 9 tokens, all within the window
        ((5, 6, 9), 100, (5, 6)),
        ((40, 40), 8, (40, 30)),
        ((12,), None, (12, 9)),
        ((2, 2), None, (2, 2)),
    ],
)
def test_the_shortest_and_a_longer_sequence_are_chosen(lengths, window, chosen):
    data = examples_of(*lengths)
    sequences = choose_sequences(data, window)
    assert tuple(len(s.tokens) for s in sequences) == chosen
    assert all(s.scored_from == 1 for s in sequences)
    records = [list(data.sequence(i).tokens) for i in range(len(data))]
    for s in sequences:  # each is a record, or the beginning of one
        assert any(record[: len(s.tokens)] == list(s.tokens) for record in records)


# It passes on correct packing.


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", KINDS_OF_MODEL)
def test_passes_on_supported_models(tiny_model, kind, method, checkpointing):
    result = check_packs(load(tiny_model(kind), method, gradient_checkpointing=checkpointing), DATA)
    assert 0 < result.logps_floor < 1e-5
    assert result.layout.control > 1e-2


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", [*KINDS_OF_MODEL, *KINDS_OF_LOGITS])
def test_passes_in_bfloat16(tiny_model, kind, method):
    assert check_packs(load(tiny_model(kind), method, dtype="bfloat16"), DATA).layout.control > 0.01


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["llama", "gemma2"])
def test_passes_on_a_deep_model_that_amplifies_rounding(tmp_path, kind, dtype):
    types = {"layer_types": ["sliding_attention", "full_attention"] * 8} if kind == "gemma2" else {}
    folder = str(save_tiny_model(tmp_path, kind, num_hidden_layers=16, **types))
    for data in (DATA, PAIRS):
        assert check_packs(load(folder, "lora", dtype=dtype), data).layout.control > 0.1


@pytest.mark.parametrize("lengths", [(4, 70), (120, 121)])
@pytest.mark.parametrize("method", METHODS)
def test_passes_in_bfloat16_even_if_two_native_runs_agree_bit_for_bit(tiny_model, method, lengths):
    """Beyond the window, both native runs use the kernel with a mask and the pack uses another one.

    That one is as close to float64, but 1e-2 away from the native runs.
    """
    check_packs(load(tiny_model("mistral"), method, dtype="bfloat16"), examples_of(*lengths))


@pytest.mark.parametrize("head", ["reference", "tiled"])
def test_passes_with_each_head(tiny_model, head):
    check_packs(load(tiny_model("qwen3"), head=head), DATA)


@pytest.mark.parametrize("seed", range(5))
def test_passes_on_other_records(tiny_model, seed):
    check_packs(load(tiny_model("gemma3")), examples_of(9, 30, 17, seed=seed))


@pytest.mark.parametrize("lengths", [(12,), (12, 12), (40, 41)])
def test_passes_on_few_records(tiny_model, lengths):
    check_packs(load(tiny_model("mistral")), examples_of(*lengths))


def test_dropout_does_not_affect_it(tiny_model):
    check_packs(load(tiny_model("llama"), lora_dropout=0.5).train(), DATA)


# It fails on wrong packing.


def without_isolation(patch):
    make = AttentionPlan.of
    patch.setattr(AttentionPlan, "of", lambda pack, backend, isolated=True: make(pack, backend, False))


def without_causality(patch):
    def everything(plan, segment, window, dtype):
        keys = sum(plan.lengths[i] for i in plan.paths[segment])
        return torch.ones(plan.lengths[segment], keys, dtype=torch.bool)

    patch.setattr(AttentionPlan, "mask", everything)


def changed_attention(**changes):
    """Return a function that sabotages the arguments that ``packed_attention`` passes to its backend."""

    def sabotage(patch):
        original = attention._sdpa

        def sdpa(query, key, value, plan, scaling, dropout, window, *others):
            arguments = {"scaling": scaling, "window": window}
            arguments |= {name: change(arguments[name]) for name, change in changes.items()}
            return original(query, key, value, plan, arguments["scaling"], dropout, arguments["window"], *others)

        patch.setattr(attention, "_sdpa", sdpa)

    return sabotage


def changed_pack(**changes):
    """Return a function that sabotages the tensors of a pack."""

    def sabotage(patch):
        original = forwards.lay_out

        def lay_out(trees):
            pack = original(trees)
            return replace(pack, **{name: change(getattr(pack, name)) for name, change in changes.items()})

        patch.setattr(forwards, "lay_out", lay_out)

    return sabotage


def changed_logps(change):
    def sabotage(patch):
        original = policy_module.token_logps
        patch.setattr(policy_module, "token_logps", lambda *args, **kw: change(original(*args, **kw)))

    return sabotage


def gradient_of(name, change):
    """Return a function that sabotages one gradient of the fused LoRA layers: "rows", "a" or "b"."""

    def sabotage(patch):
        to_rows, cast = LoraGroup.backward_to_rows, LoraLinear.cast_gradients

        def cast_gradients(layer, d_a, d_b):
            gradients = {"a": d_a, "b": d_b}
            gradients[name] = change(gradients[name])
            return cast(layer, *gradients.values())

        if name == "rows":
            patch.setattr(LoraGroup, "backward_to_rows", lambda *args, **kw: change(to_rows(*args, **kw)))
        else:
            patch.setattr(LoraLinear, "cast_gradients", cast_gradients)

    return sabotage


def half_of_the_adapter(patch):
    original = fused_lora._parts
    patch.setattr(fused_lora, "_parts", lambda layer: replace(original(layer), scaling=0.5 * original(layer).scaling))


# What is wrong -> how, the error, and the methods that it concerns.
LAYOUT = "^packed {} differ from the model's own by up to .* in a small float32 .*: packed training would be wrong"
PACKS = LAYOUT.format("log-probs")
SABOTAGES = {
    "sequences see each other": (without_isolation, PACKS, METHODS),
    "tokens see later tokens": (without_causality, PACKS, METHODS),
    "scale off by one percent": (changed_attention(scaling=lambda s: s * 1.01), PACKS, METHODS),
    "positions that are all zero": (changed_pack(position_ids=torch.zeros_like), PACKS, METHODS),
    "positions that run backwards": (changed_pack(position_ids=torch.neg), PACKS, METHODS),
    "positions in steps of two": (changed_pack(position_ids=lambda p: 2 * p), PACKS, METHODS),
    "rows that read the token before": (changed_pack(row_hidden=lambda r: (r - 1).clamp_min(0)), PACKS, METHODS),
    "rows that read their own token": (changed_pack(row_hidden=lambda r: (r + 1).clamp_max(r.max())), PACKS, METHODS),
    "targets of the row before": (changed_pack(row_target=lambda t: t.roll(1)), PACKS, METHODS),
    "one wrong target": (changed_pack(row_target=lambda t: torch.cat([t[:1] - 1, t[1:]])), PACKS, METHODS),
    "one wrong input token": (changed_pack(input_ids=lambda t: torch.cat([t[:-1], t[-1:] - 1])), PACKS, METHODS),
    "log-probs in bits": (changed_logps(lambda logps: logps / np.log(2)), PACKS, METHODS),
    "log-probs off by 0.01 percent": (changed_logps(lambda logps: logps * 1.0001), PACKS, METHODS),
    "one log-prob off by 0.001 nats": (
        changed_logps(lambda logps: torch.cat([logps[:1] + 1e-3, logps[1:]])),
        PACKS,
        METHODS,
    ),
    "a missing gradient": (
        changed_logps(lambda logps: torch.cat([logps[:1].detach(), logps[1:]])),
        LAYOUT.format("gradients"),
        METHODS,
    ),
    "gradients off by 0.1 percent": (
        changed_logps(lambda x: x + 0.001 * (x - x.detach())),
        LAYOUT.format("gradients"),
        METHODS,
    ),
    "NaN": (changed_logps(lambda logps: logps * torch.nan), PACKS, METHODS),
    "half of the adapter": (half_of_the_adapter, "^the fused .* errs by", ADAPTERS),
    "a gradient of A that is off by 5 percent": (
        gradient_of("a", lambda gradient: gradient * 1.05),
        "^the fused .* errs by",
        ADAPTERS,
    ),
    "no gradient of B": (gradient_of("b", torch.zeros_like), "^the fused .* errs by", ADAPTERS),
    "a gradient of the input that lacks the adapter's": (
        gradient_of("rows", lambda gradient: gradient * 0.9),
        "^the fused .* errs by",
        ADAPTERS,
    ),
}
CASES = [
    pytest.param(sabotage, match, method, id=f"{name}-{method}")
    for name, (sabotage, match, methods) in SABOTAGES.items()
    for method in methods
]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("sabotage", "match", "method"), CASES)
def test_fails_on_wrong_packing(tiny_model, monkeypatch, method, sabotage, match, dtype):
    policy = load(tiny_model("llama"), method, dtype=dtype)
    sabotage(monkeypatch)
    with pytest.raises(SaroError, match=match):
        check_packs(policy, DATA)


# Long sequences: only some rows are compared.

LONG = examples_of(150, 400)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
@pytest.mark.parametrize("kind", KINDS_OF_MODEL)
def test_passes_on_long_sequences(tiny_model, kind, checkpointing):
    for data in (LONG, pairs_of(150, 400)):
        result = check_packs(load(tiny_model(kind), gradient_checkpointing=checkpointing), data)
        assert 0 < result.logps_floor < 1e-5
        assert result.layout.control > 1e-3


@pytest.mark.parametrize(("sabotage", "match", "method"), [case for case in CASES if case.values[2] == "lora"])
def test_fails_on_wrong_packing_of_long_sequences(tiny_model, monkeypatch, sabotage, match, method):
    policy = load(tiny_model("llama"), method)
    sabotage(monkeypatch)
    with pytest.raises(SaroError, match=match):
        check_packs(policy, LONG)


def logits_made(policy, data):
    """Return the shapes of the logits that the model's own forward makes during the check."""
    shapes = []
    handle = policy.causal_lm.register_forward_hook(lambda _, __, output: shapes.append(tuple(output.logits.shape)))
    check_packs(policy, data)
    handle.remove()
    return shapes


def test_native_runs_make_logits_for_few_rows_only(tiny_model):
    """With a large vocabulary, the logits of a full sequence take gigabytes."""
    shapes = logits_made(load(tiny_model()), LONG)
    assert len(shapes) == 5  # each sequence alone, both padded, and each alone again
    assert max(rows for _, rows, _ in shapes) <= 128


def test_a_model_that_cannot_choose_rows_makes_logits_for_all(tiny_model, monkeypatch):
    """A model with its own code may have no option for it, or may only accept a number of last rows."""
    original = LlamaForCausalLM.forward
    monkeypatch.setattr(
        LlamaForCausalLM,
        "forward",
        lambda self, input_ids=None, attention_mask=None, use_cache=None: original(
            self, input_ids=input_ids, attention_mask=attention_mask, use_cache=use_cache
        ),
    )
    assert max(rows for _, rows, _ in logits_made(load(tiny_model()), LONG)) == 2 * _TAIL - 1


def test_layers_are_recomputed_if_training_recomputes_them(tiny_model):
    """Otherwise a sequence that fits in memory in training might not fit in the check."""

    def forwards(**options):
        policy, calls = load(tiny_model(), **options), []
        for layer in policy.causal_lm.get_decoder().layers:
            layer.input_layernorm.register_forward_hook(lambda *_: calls.append(1))
        check_packs(policy, DATA)
        return len(calls)

    layers, runs = 2, 6  # five native runs and a packed one
    assert forwards() == layers * runs
    assert forwards(gradient_checkpointing=True) == 2 * layers * runs


def test_a_models_own_dropout_stays_off_in_recomputed_layers():
    """An OPT layer in train mode applies dropout to its output, even if all modules inside it are in eval mode."""
    shape = {"hidden_size": 32, "ffn_dim": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = random_model(OPTConfig(vocab_size=264, word_embed_proj_dim=32, dropout=0.5, **shape))
    model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    assert check_packs(Policy(model), DATA).logps_floor < 1e-5


def test_passes_on_a_model_that_scales_its_embeddings_in_place():
    shape = {"vocab_size": 264, "n_positions": 64, "n_embd": 32, "dff": 64, "n_layer": 2, "n_head": 4}
    assert check_packs(Policy(random_model(CTRLConfig(**shape))), DATA).logps_floor < 1e-5


def test_passes_on_a_model_without_sdpa_whose_softcap_is_off():
    """transformers then has only eager attention to compare with."""
    model = random_model(tiny_config("gemma2", attn_logit_softcapping=None))
    assert check_packs(Policy(model), DATA).logps_floor < 1e-5


# Trees of pairs.


def pairs_of(*lengths, shared=6, seed=0):
    """Make random pairs whose sides share their first tokens. The rejected side is three tokens longer."""
    chosen = examples_of(*lengths, seed=seed)
    rejected = examples_of(*(n + 3 for n in lengths), seed=seed + 1)
    for i in range(len(lengths)):
        start = rejected.offsets[i]
        rejected.tokens[start : start + shared] = chosen.sequence(i).tokens[:shared]
    return PairSet(chosen, rejected, np.arange(len(lengths), dtype=np.int32))


PAIRS = pairs_of(21, 12, 34)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", [*KINDS_OF_MODEL, "gemma2"])
def test_passes_on_trees_of_pairs(tiny_model, kind, method):
    result = check_packs(load(tiny_model(kind), method), PAIRS)
    assert 0 < result.logps_floor < 1e-5
    assert result.layout.control > 0.01


def children_that_do_not_see_what_is_shared(patch):
    original = forwards.lay_out

    def lay_out(trees):
        pack = original(trees)
        return replace(pack, segments=tuple((start, stop, -1) for start, stop, _ in pack.segments))

    patch.setattr(forwards, "lay_out", lay_out)


def children_at(move):
    """Return a function that sabotages the positions of every child segment."""

    def sabotage(patch):
        original = forwards.lay_out

        def lay_out(trees):
            pack = original(trees)
            positions = pack.position_ids.clone()
            for start, stop, parent in pack.segments:
                if parent >= 0:
                    positions[start:stop] = move(positions[start:stop])
            return replace(pack, position_ids=positions)

        patch.setattr(forwards, "lay_out", lay_out)

    return sabotage


def siblings_that_see_each_other(patch):
    original = forwards.lay_out

    def lay_out(trees):
        pack = original(trees)
        segments = list(pack.segments)
        segments[2] = (*segments[2][:2], 1)
        return replace(pack, segments=tuple(segments))

    patch.setattr(forwards, "lay_out", lay_out)


def children_predicted_from_the_wrong_hidden_state(patch):
    at_forks(patch, lambda pack, at_fork: replace(pack, row_hidden=pack.row_hidden - at_fork.long()))


def wrong_targets_at_both_sides_of_a_fork(patch):
    at_forks(patch, lambda pack, at_fork: replace(pack, row_target=pack.row_target - at_fork.long()))


def at_forks(patch, change):
    """Sabotage the rows that predict the first tokens of children: several rows read one hidden state there."""
    original = forwards.lay_out

    def lay_out(trees):
        pack = original(trees)
        at_fork = pack.row_hidden.bincount()[pack.row_hidden] > 1
        assert at_fork.sum() >= 2
        return change(pack, at_fork)

    patch.setattr(forwards, "lay_out", lay_out)


TREES = {
    "children that do not see what is shared": children_that_do_not_see_what_is_shared,
    "children that begin at position zero": children_at(lambda positions: positions - positions[:1]),
    "children that begin one position too late": children_at(lambda positions: positions + 1),
    "children that begin eight positions too late": children_at(lambda positions: positions + 8),
    "siblings that see each other": siblings_that_see_each_other,
    "children predicted from the wrong hidden state": children_predicted_from_the_wrong_hidden_state,
    "wrong targets at both sides of a fork": wrong_targets_at_both_sides_of_a_fork,
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("lengths", [(21, 12, 34), (150, 400)], ids=["short", "long"])
@pytest.mark.parametrize("sabotage", TREES.values(), ids=TREES)
def test_fails_on_wrong_trees(tiny_model, monkeypatch, sabotage, lengths, dtype):
    policy = load(tiny_model(), dtype=dtype)
    sabotage(monkeypatch)
    with pytest.raises(SaroError, match=PACKS):
        check_packs(policy, pairs_of(*lengths))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shared", [9, 11, 120])
@pytest.mark.parametrize("sabotage", list(TREES.values())[-2:], ids=list(TREES)[-2:])
def test_fails_even_if_only_the_fork_of_a_long_tree_is_wrong(tiny_model, monkeypatch, sabotage, shared, dtype):
    policy = load(tiny_model(), dtype=dtype)
    sabotage(monkeypatch)
    with pytest.raises(SaroError, match=PACKS):
        check_packs(policy, pairs_of(150, 400, shared=shared))


def test_a_tree_of_several_pairs_on_one_prompt_is_checked_too(tiny_model, monkeypatch):
    """In it, only the last child is wrong."""
    original = forwards.lay_out

    def lay_out(trees):
        pack = original(trees)
        siblings = [parent for _, _, parent in pack.segments if parent >= 0]
        if max(map(siblings.count, siblings)) < 3:
            return pack
        return replace(pack, row_target=torch.cat([pack.row_target[:-1], pack.row_target[-1:] - 1]))

    pairs = pairs_of(21, 12, 34)
    for side in (pairs.chosen, pairs.rejected):
        for i in range(3):
            side.sequence(i).tokens[:6] = pairs.chosen.sequence(0).tokens[:6]
    policy = load(tiny_model())
    monkeypatch.setattr(forwards, "lay_out", lay_out)
    check_packs(policy, pairs)
    with pytest.raises(SaroError, match=PACKS):
        check_packs(policy, replace(pairs, prompts=np.zeros(3, np.int32)))


# Adapters.


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_fails_on_wrong_adapter_outputs(tiny_model, monkeypatch, method):
    """A new adapter is zero, so the check must change it to notice a wrong factor."""
    policy = load(tiny_model(), method)
    original = fused_lora._parts
    monkeypatch.setattr(fused_lora, "_parts", lambda layer: replace(original(layer), scaling=0.0))
    with pytest.raises(SaroError, match=r"^the fused .*q_proj errs by .* set --model.fused_lora false"):
        check_packs(policy, DATA)


def test_leaves_adapters_unchanged(tiny_model):
    policy = load(tiny_model())
    before = {name: p.detach().clone() for name, p in policy.trainable().items()}
    check_packs(policy, DATA)
    assert all(torch.equal(p, before[name]) for name, p in policy.trainable().items())


WINDOWS = {
    "no window": lambda w: None,
    "one token more": lambda w: w and w + 1,
    "one token less": lambda w: w and w - 1,
}


@pytest.mark.parametrize("change", WINDOWS.values(), ids=WINDOWS)
@pytest.mark.parametrize("kind", ["mistral", "gemma3"])
def test_fails_on_a_wrong_window(tiny_model, monkeypatch, kind, change):
    changed_attention(window=change)(monkeypatch)
    with pytest.raises(SaroError, match=PACKS):
        check_packs(load(tiny_model(kind)), DATA)


def test_fails_on_a_window_in_layers_that_have_none(tiny_model, monkeypatch):
    changed_attention(window=lambda w: w or 8)(monkeypatch)
    with pytest.raises(SaroError, match=PACKS):
        check_packs(load(tiny_model("gemma3")), DATA)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("sabotage", [without_isolation, changed_attention(scaling=lambda s: s * 1.01)])
@pytest.mark.parametrize("kind", [*KINDS_OF_MODEL, "gemma2"])
def test_fails_for_every_kind_of_model(tiny_model, monkeypatch, kind, sabotage, dtype):
    policy = load(tiny_model(kind), dtype=dtype)
    sabotage(monkeypatch)
    with pytest.raises(SaroError, match=PACKS):
        check_packs(policy, DATA)


def test_fails_if_it_would_not_notice_a_leak(tiny_model, monkeypatch):
    make = AttentionPlan.of
    monkeypatch.setattr(AttentionPlan, "of", lambda pack, backend, isolated=True: make(pack, backend, True))
    with pytest.raises(SaroError, match="check of packs has no power here: without isolation"):
        check_packs(load(tiny_model("llama")), DATA)


def test_fails_on_weights_that_are_not_finite(tiny_model):
    policy = load(tiny_model("llama"))
    with torch.no_grad():
        policy.causal_lm.get_input_embeddings().weight[100:].fill_(torch.nan)
    with pytest.raises(SaroError, match=r"^the head tiled-torch gives values that are not numbers .* fetch or save"):
        check_packs(policy, DATA)


def test_fails_on_one_wrong_row_of_the_model_itself(tiny_model, monkeypatch):
    """The small model is right, and only the policy errs, in a single row."""
    policy = load(tiny_model("llama"), dtype="bfloat16")
    original = policy_module.Policy.forward

    def forward(self, pack, isolated=True):
        logps = original(self, pack, isolated)
        return torch.cat([logps[:-1], logps[-1:] - 0.5]) if self is policy else logps

    monkeypatch.setattr(policy_module.Policy, "forward", forward)
    with pytest.raises(SaroError, match=r"^packed log-probs differ from the model's own by 0\.\d+ in one row"):
        check_packs(policy, DATA)


@pytest.mark.parametrize(
    ("uses_liger", "end"),
    [
        (True, "--model.fused_lora false, set --model.liger false, and report it"),
        (False, "--model.fused_lora false, and report it"),
    ],
)
def test_the_error_says_how_to_turn_off_the_layers_of_liger_kernel(tiny_model, monkeypatch, uses_liger, end):
    """Left out, the option would leave them on."""
    monkeypatch.setattr("saro.checks.check_packs.uses_liger", lambda model: uses_liger)
    policy = load(tiny_model("llama"), dtype="bfloat16")
    original = policy_module.Policy.forward

    def forward(self, pack, isolated=True):
        return original(self, pack, isolated) - 0.5 * (self is policy)

    monkeypatch.setattr(policy_module.Policy, "forward", forward)
    with pytest.raises(SaroError, match=f"{end}$"):
        check_packs(policy, DATA)


# Models that packed training would train wrongly. Their configs are refused earlier; this check would find them too.

_SHAPE = {
    "vocab_size": 264,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "bos_token_id": BOS,
    "eos_token_id": IM_END,
    "pad_token_id": PAD,
}
_DECODER = _SHAPE | {"intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
UNFIT = {
    "alibi": (lambda: BloomConfig(**_SHAPE, n_head=4), "packed log-probs differ"),
    "attention of its own": (lambda: FalconConfig(**_SHAPE, num_attention_heads=4), "packed log-probs differ"),
    "arguments that are dropped": (
        lambda: StableLmConfig(**_DECODER),
        "does not fit this model: StableLmAttention got no plan",
    ),
    "attention in both directions": (
        lambda: BertConfig(**_SHAPE, num_attention_heads=4, intermediate_size=64),
        "does not fit this model: BertSelfAttention is not causal",
    ),
    "state space": (lambda: MambaConfig(**_SHAPE), "does not fit this model|packed log-probs differ"),
    "recurrence": (lambda: RwkvConfig(**_SHAPE), "does not fit this model|packed log-probs differ"),
    "another decoder": (
        lambda: ModernBertDecoderConfig(
            **_SHAPE, num_attention_heads=4, intermediate_size=64, cls_token_id=1, sep_token_id=1
        ),
        "does not fit this model|packed log-probs differ",
    ),
}


@pytest.mark.parametrize(("config", "message"), UNFIT.values(), ids=UNFIT)
def test_fails_on_models_that_cannot_be_packed(config, message):
    with pytest.raises(SaroError, match=message):
        check_packs(Policy(random_model(config())), DATA)


@pytest.mark.parametrize("name", ["position_bias", "attention_bias"])
def test_fails_on_an_unknown_attention_argument(tiny_model, monkeypatch, name):
    """transformers' own sdpa function swallows these; packed attention must not."""
    original = LlamaAttention.forward
    monkeypatch.setattr(LlamaAttention, "forward", lambda *args, **kw: original(*args, **kw, **{name: 30.0}))
    message = f"^packed attention does not fit this model: .* does not know the argument {name} of LlamaAttention"
    with pytest.raises(SaroError, match=message):
        check_packs(load(tiny_model("llama")), DATA)


@pytest.mark.parametrize("bug", [TypeError("unsupported operand"), ValueError("not enough values to unpack")])
def test_a_bug_of_ours_is_not_blamed_on_the_model(tiny_model, monkeypatch, bug):
    def raise_bug(*_: object) -> None:
        raise bug

    monkeypatch.setattr("saro.checks.check_packs.check_kernels", raise_bug)
    with pytest.raises(type(bug)) as caught:
        check_packs(load(tiny_model("llama")), DATA)
    assert caught.value is bug


# It leaves no trace.


@pytest.mark.parametrize("fails", [False, True], ids=["passes", "fails"])
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("method", METHODS)
def test_leaves_the_policy_as_it_was(tiny_model, monkeypatch, method, training, fails):
    policy = load(tiny_model("mistral"), method).train(training)
    before = {name: t.clone() for name, t in policy.state_dict().items()}
    for parameter in policy.trainable().values():
        parameter.grad = torch.full_like(parameter, 0.5)
    trainable = set(policy.trainable())
    random = torch.get_rng_state()
    if fails:
        without_isolation(monkeypatch)
        with pytest.raises(SaroError):
            check_packs(policy, DATA)
    else:
        check_packs(policy, DATA)
    assert policy.training == training
    assert all(module.training == training for module in policy.modules())
    assert set(policy.trainable()) == trainable
    assert all((p.grad == 0.5).all() for p in policy.trainable().values())
    assert all(torch.equal(t, before[name]) for name, t in policy.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)
    assert policy.causal_lm.config._attn_implementation == PACKED
    assert not policy.causal_lm.get_input_embeddings()._forward_hooks


@pytest.mark.parametrize("method", METHODS)
def test_gives_no_parameter_a_gradient(tiny_model, method):
    policy = load(tiny_model("llama"), method)
    check_packs(policy, DATA)
    assert all(parameter.grad is None for parameter in policy.parameters())


def test_gives_the_same_numbers_twice(tiny_model):
    policy = load(tiny_model("gemma3"), "qlora")
    assert check_packs(policy, DATA) == check_packs(policy, DATA)
