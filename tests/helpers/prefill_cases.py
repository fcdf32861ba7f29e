"""Chat formats of every make, and beginnings of responses with what may follow them."""

from __future__ import annotations

import chat_cases
import tokenizer_cases
from hypothesis import strategies as st

CHATS = {
    **{f"bytes, {name}": chat for name, chat in chat_cases.CHATS.items()},
    **{" ".join(names): chat for names, chat in tokenizer_cases.CHATS.items()},
    **{f"byte-level {name}": chat for name, chat in tokenizer_cases.BYTE_LEVEL_CHATS.items()},
}
# What vocabularies, normalizers and regexes join with what comes before.
joining = st.sampled_from(
    ["", " ", "  ", "\n", "\n\n", ".", "\u0301", "\u1161", "a", "\u00e9", "think", "/", "is", "So", "1", ":", "\u2603"]
)
beginnings = st.builds(lambda a, b, c: a + b + c, tokenizer_cases.texts, joining, joining).filter(
    lambda t: t.strip() and "think>" not in t
)
continuations = st.builds(lambda a, b: a + b, joining, tokenizer_cases.texts).filter(lambda t: "think>" not in t)
