"""Tests that data.train_on all trains each assistant turn as inference would see it, and that sharing changes nothing."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from chat_cases import CHATS, MISTRAL, OPENS_THINK, TEMPLATES, TOKENS, chat_of
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import CHATML, tiny_tokenizer

from saro.checks.check_masks import check_masks
from saro.checks.check_packs import check_packs
from saro.config import DataConfig, ModelConfig, RWConfig, SRPOConfig, TrainConfig
from saro.data.dataset import ExampleSet
from saro.data.encode_files import encode_files
from saro.data.packs import lay_out
from saro.data.records import Message, Response, read_example_files
from saro.data.steps import Schedule
from saro.data.tree import build_tree
from saro.errors import SaroError
from saro.model.architectures import TokenLimits
from saro.model.load import load_policy
from saro.model.policy import Policy
from saro.model.source import find_model
from saro.train.rw_objective import RWObjective

ALL = DataConfig(pack_tokens=1024, train_on="all")
THINK = {"role": "assistant", "content": "Hello", "reasoning_content": "Greet them."}
MESSAGES = [
    {"role": "user", "content": "Hi"},
    THINK,
    {"role": "user", "content": "Why?"},
    {"role": "assistant", "content": "<think>\nHm.\n</think>\n\nSo."},
    {"role": "user", "content": "Oh."},
    {"role": "assistant", "content": "Yes."},
]
every_template = pytest.mark.parametrize("name", TEMPLATES)


@pytest.fixture
def conversations(records_file) -> str:
    long = [{**turn, "content": turn["content"] + " more" * 9} for turn in MESSAGES[:2]]
    return records_file(
        [{"id": "a", "messages": MESSAGES}, {"prompt": "Hi", "answer": "Hello"}, {"messages": long + MESSAGES}]
    )


@pytest.fixture
def policy(tiny_model) -> Policy:
    options = ModelConfig(name=tiny_model(), method="full")
    return load_policy(find_model(options), options, torch.device("cpu"), seed=0)


def test_each_assistant_turn_is_an_example_after_the_turns_before_it(conversations):
    one, two, three, *others = read_example_files([conversations], "all")
    assert [example.id for example in (one, two, three)] == ["a:message-2", "a:message-4", "a"]
    assert [example.response for example in (one, two, three)] == [
        Response("Greet them.", "Hello"),
        Response(None, MESSAGES[3]["content"]),
        Response(None, "Yes."),
    ]
    assert one.prompt == (Message("user", "Hi"),)
    assert [len(example.prompt) for example in (two, three)] == [3, 5]
    assert two.where == f"{conversations}:1, message 4"
    # The second record is no conversation, the third has four turns.
    assert [example.conversation for example in others] == [None] + [f"{conversations}:3"] * 4


def test_only_the_last_turn_is_an_example_by_default(conversations):
    assert [example.id for example in read_example_files([conversations])] == ["a", "records:2", "records:3"]


@every_template
def test_each_turn_has_the_tokens_that_it_has_as_a_record_of_its_own(records_file, name):
    """A template that drops the reasoning of earlier turns drops it from later prompts, and from no response."""
    chat = CHATS[name]
    together = encode_files([records_file([{"messages": MESSAGES}])], chat, ALL)
    alone = encode_files(
        [records_file([{"messages": MESSAGES[: i + 1]} for i in (1, 3, 5)], "alone.jsonl")], chat, DataConfig()
    )
    for turn in range(3):
        ours, theirs = together.sequence(turn), alone.sequence(turn)
        assert ours.tokens.tolist() == theirs.tokens.tolist()
        assert (ours.scored_from, ours.row_kinds.tolist()) == (theirs.scored_from, theirs.row_kinds.tolist())
    check_masks(together, chat, read_example_files([records_file([{"messages": MESSAGES}])], "all"), TokenLimits(1000))


def test_turns_of_a_conversation_share_one_tree_and_records_share_none(conversations):
    data = encode_files([conversations], CHATS["chatml"], ALL)
    trees = data.trees(range(len(data)), 1024)
    assert [[s.record for s in tree.sequences] for tree in trees] == [[0, 1, 2], [3], [4, 5, 6, 7]]
    # ChatML keeps the answers as they are: all turns are one chain, except that the first one's reasoning is not shown.
    assert trees[0].tokens < sum(len(s.tokens) for s in trees[0].sequences) - 1


def test_a_tree_of_turns_stays_within_the_budget(conversations):
    data = encode_files([conversations], CHATS["chatml"], ALL)
    longest = int(data.lengths.max())
    trees = data.trees(range(len(data)), longest)
    assert max(tree.tokens for tree in trees) <= longest
    assert sorted(s.record for tree in trees for s in tree.sequences) == list(range(len(data)))


def test_a_turn_that_a_step_draws_twice_is_in_two_trees(conversations):
    """In one tree, two copies of an example would look like the sides of a pair."""
    data = encode_files([conversations], CHATS["chatml"], ALL)
    trees = data.trees([0, 1, 0, 2, 1], 1024)
    assert [sorted(s.record for s in tree.sequences) for tree in trees] == [[0, 1, 2], [0, 1]]
    assert lay_out(trees).margin_rows == lay_out(trees).rows == 2 * data.scored_tokens[:2].sum() + data.scored_tokens[2]


said = st.text("ab <>\n", min_size=1, max_size=6).filter(str.strip)


@every_template
@settings(max_examples=15, deadline=None)
@given(texts=st.lists(said, min_size=2, max_size=8).filter(lambda t: len(t) % 2 == 0), order=st.randoms())
def test_each_scored_token_of_a_shared_tree_is_a_row_once_with_its_kind(name, texts, order, tmp_path_factory):
    messages = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]
    path = tmp_path_factory.mktemp("talk") / "talk.jsonl"
    path.write_text(json.dumps({"messages": messages}) + "\n")
    data = encode_files([path], CHATS[name], ALL)
    turns = list(range(len(data)))
    order.shuffle(turns)
    (tree,) = data.trees(turns, 4096)
    pack = lay_out([tree])
    assert pack.rows == len(pack.entry_row) == pack.margin_rows == data.scored_tokens.sum()
    for number, record in enumerate(pack.records):
        sequence, rows = data.sequence(record), pack.entry_row[pack.entry_sequence == number]
        assert pack.row_target[rows].tolist() == sequence.tokens[sequence.scored_from :].tolist()
        assert pack.row_kind[rows].tolist() == sequence.row_kinds.tolist()


@pytest.mark.parametrize("template", [CHATML, OPENS_THINK, MISTRAL], ids=["keeps", "drops", "mistral"])
def test_shared_turns_have_the_loss_and_gradients_of_turns_alone(template, records_file, policy):
    # The model embeds a few special tokens only.
    chat = chat_of(template, extra=TOKENS[2:])
    data = encode_files([records_file([{"messages": MESSAGES}])], chat, ALL)
    objective = RWObjective(data.kinds)

    def run(packs) -> tuple[torch.Tensor, torch.Tensor]:
        policy.model.zero_grad()
        total = sum(objective(policy(pack), pack).losses["rows"] for pack in packs)
        total.backward()
        return total.detach(), torch.cat([p.grad.flatten() for p in policy.trainable().values()])

    shared, shared_gradient = run([lay_out(data.trees(range(3), 1024))])
    alone, gradient = run([lay_out([build_tree([data.sequence(i)])]) for i in range(3)])
    torch.testing.assert_close(shared, alone, rtol=1e-6, atol=0)
    assert (shared_gradient - gradient).norm() < 1e-5 * gradient.norm()


def test_the_start_checks_try_a_tree_of_turns(policy, conversations):
    assert check_packs(policy, encode_files([conversations], chat_of(extra=()), ALL)).logps < 1e-4


def test_turns_of_a_conversation_are_drawn_next_to_each_other(conversations):
    data = encode_files([conversations], CHATS["chatml"], ALL)
    drawn = Schedule.of(data, ALL, TrainConfig(records_per_step=100)).records(0)
    runs = np.flatnonzero(np.diff(data.conversations[drawn])) + 1
    assert len(runs) == 2


def test_the_mask_of_all_turns_is_that_of_transformers_where_the_template_keeps_every_turn(records_file):
    """As TRL's assistant_only_loss, by a template with {% generation %} in which the end token is trained."""
    marked = (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' }}{% if m['role'] == 'assistant' %}"
        "{% generation %}{{ m['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\\n' }}"
        "{% else %}{{ m['content'] + '<|im_end|>\\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    )
    messages = [{name: turn[name] for name in ("role", "content")} for turn in MESSAGES]
    whole = tiny_tokenizer(marked).apply_chat_template(
        messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    chat = chat_of(CHATML, extra=())
    (tree,) = encode_files([records_file([{"messages": messages}])], chat, ALL).trees(range(3), 1024)
    longest = tree.sequences[-1].tokens
    scored = np.zeros(len(longest), int)
    for sequence in tree.sequences:
        assert sequence.tokens.tolist() == longest[: len(sequence.tokens)].tolist()
        scored[sequence.scored_from : len(sequence.tokens)] = 1
    # transformers' ids end with the line end after the last turn, which is not scored.
    assert longest.tolist() == whole["input_ids"][: len(longest)]
    assert scored.tolist() == whole["assistant_masks"][: len(longest)]
    assert not any(whole["assistant_masks"][len(longest) :])


@pytest.mark.parametrize(
    ("messages", "expected"),
    [
        (MESSAGES[1:], "message 1: the turns before it: there are none; add the user turn to answer"),
        (
            [MESSAGES[0], THINK, THINK, *MESSAGES[2:]],
            "message 3: the turns before it: the last turn is the assistant's",
        ),
        (
            [MESSAGES[0], {"role": "assistant", "content": "a<|im_end|>b"}, *MESSAGES[2:]],
            "message 2: the response holds the model's control token '<|im_end|>' as text",
        ),
    ],
)
def test_a_turn_that_cannot_be_trained_is_named(records_file, messages, expected):
    file = records_file([{"messages": messages}])
    encode_files([file], CHATS["chatml"], replace(ALL, train_on="last"))
    with pytest.raises(SaroError) as caught:
        encode_files([file], CHATS["chatml"], ALL)
    assert str(caught.value).startswith(f"{file}:1, {expected}")


def test_a_turn_that_is_too_long_is_dropped_and_the_turns_before_it_are_kept(records_file):
    messages = [*MESSAGES, MESSAGES[0], {"role": "assistant", "content": "x" * 300}]
    data: ExampleSet = encode_files(
        [records_file([{"id": "a", "messages": messages}])],
        CHATS["chatml"],
        DataConfig(pack_tokens=256, too_long="drop", train_on="all"),
    )
    assert (data.ids, data.dropped) == (("a:message-2", "a:message-4", "a:message-6"), ("a",))


def test_train_on_all_is_for_examples():
    assert RWConfig(data=ALL).data.train_on == "all"
    with pytest.raises(SaroError, match=r"data\.train_on is for RW; a pair differs only in its last turn"):
        SRPOConfig(data=ALL)
