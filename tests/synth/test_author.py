"""An author keeps what stages read of a text, and no more."""

from __future__ import annotations

from dataclasses import fields

from selection_cases import HELP, SHORT, make_author, make_prompt, write

from saro.draws.request import Draw, Sampling
from saro.synth.author import Drawn, Task


def test_a_text_keeps_its_key_and_leaves_its_ids_to_the_store(tmp_path, runtime):
    author, _ = make_author(tmp_path, runtime, lambda *_: write(SHORT, HELP))
    prompt = make_prompt("q1", "harmless")
    with author.store as store:
        (drawn,) = author.write([Task(prompt, "plain", prompt.item.prompt)], Sampling(200))
        stored = store.get([drawn.key])[drawn.key]
    assert isinstance(stored, Draw)
    assert stored.ids
    assert (drawn.answer.think, drawn.answer.answer) == (SHORT, HELP)
    assert [field.name for field in fields(Drawn)] == ["task", "answer"]
