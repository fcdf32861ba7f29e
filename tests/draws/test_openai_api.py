"""Replies of servers as draws, whatever they hold."""

from __future__ import annotations

import json

from draw_cases import chat_request
from hypothesis import given, settings
from hypothesis import strategies as st

from saro.draws.openai_api import make_identity, parse_reply
from saro.draws.request import FAILURES, Draw, Request, Sampling

IDENTITY = make_identity("h", "m", None)
# Names that the parser looks at, so that random values reach its branches.
NAMES = (
    *("choices", "message", "text", "content", "refusal", "reasoning", "reasoning_content", "finish_reason", "usage"),
    *("logprobs", "top_logprobs", "token", "logprob", "error", "code", "type", "detail", "innererror", "object"),
    *("prompt_tokens", "completion_tokens_details", "token_ids", "system_fingerprint", "model"),
)
leaves = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(st.characters(), max_size=5)
    | st.sampled_from(["stop", "length", "content_filter", "error", "Count"])
)
values = st.recursive(
    leaves,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(NAMES) | st.text(max_size=3), inner, max_size=4)
    ),
    max_leaves=15,
)
choices = st.fixed_dictionaries(
    {"finish_reason": st.sampled_from(["stop", "length"]) | values},
    optional={"message": values, "text": values, "logprobs": values, "token_ids": values},
)
replies = values | st.fixed_dictionaries(
    {"choices": st.lists(choices | values, max_size=2)}, optional={"usage": values}
)
requests = st.sampled_from(
    [
        chat_request(),
        chat_request(choices=("Count", "no")),
        Request(Sampling(1), ids=(1,)),
        Request(Sampling(1, choices=("stop",)), text="?"),
    ]
)


@settings(max_examples=500)
@given(request_=requests, status=st.sampled_from([200, 400, 403, 429, 500]), reply=replies)
def test_any_reply_is_a_text_or_a_failure(request_, status, reply):
    draw = parse_reply(request_, IDENTITY, status, reply)
    assert isinstance(draw, Draw)
    if draw.failure is None:
        assert status == 200
        assert draw.finish in ("stop", "length")
        assert len(draw.choices) == len(request_.sampling.choices)
        assert draw.text or draw.choices
        draw.text.encode()
    else:
        assert draw.failure in FAILURES
        assert draw.detail.isprintable()
        assert draw.text is None
    # It can be stored.
    json.dumps([draw.text, draw.detail, draw.usage, draw.versions, draw.choices, draw.ids], allow_nan=False)
