"""Find the ids that a response has after a prompt, and those of its beginning that no continuation can change."""

from __future__ import annotations

import unicodedata
from bisect import bisect_right
from dataclasses import dataclass
from functools import cached_property
from itertools import takewhile
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode

from saro.errors import SaroError

# Texts that a response is tokenized after if its first characters merge with the end of the prompt. Three, because a
# vocabulary may merge some of them too.
_ANCHORS = ("\n", ".", "a")


class StableTokens(NamedTuple):
    """The tokens of a text that no continuation can change.

    Attributes:
        ids: their ids, (n,).
        starts: the place in the text where each begins.
        characters: number of characters of the text that they are.
    """

    ids: list[int]
    starts: list[int]
    characters: int


@dataclass(frozen=True)
class ResponseTokenizer:
    """Tokenizes responses as they stand after their prompts.

    Attributes:
        tokenizer: a fast tokenizer (character offsets are needed).
    """

    tokenizer: PreTrainedTokenizerBase

    def ids(self, text: str) -> list[int]:
        """Return the ids of a text without the special tokens that a tokenizer adds: the chat template writes its own BOS."""
        return self.tokenizer(text, add_special_tokens=False).input_ids

    def locate(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Return the ids of a text and the span of characters, (start, stop), of each."""
        encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        return encoded.input_ids, encoded.offset_mapping

    def decode(self, ids: list[int]) -> str:
        """Return the text of ids, special tokens too."""
        # With the backend: transformers may leave out spaces before punctuation.
        return self.tokenizer.backend_tokenizer.decode(ids, skip_special_tokens=False)

    def continue_prompt(self, prompt: str, text: str, turn_end: str) -> tuple[list[int], list[int]]:
        """Return the ids that ``text + turn_end`` has after ``prompt``, and the position in it where each begins.

        Most tokenizers give a text the same ids wherever it stands. Those that put a space in front of every text, as
        Llama 2's does, would put it between prompt and response too. So the text is tokenized after the prompt, or after
        an anchor if its beginning merges with the end of the prompt, whose ids must stay those of inference.

        Raises SaroError if the text reads otherwise after the prompt with each of these ids.
        """
        if not self._puts_space_in_front:
            ids, spans = self.locate(text + turn_end)
            return ids, [start for start, _ in spans]
        prompt_ids = self.ids(prompt)
        for before in (prompt, "", *_ANCHORS):
            before_ids = self.ids(before)
            n = len(before_ids)
            ids, spans = self.locate(before + text + turn_end)
            # A token before the text may also take characters from it: Phi-3's <|assistant|> takes the line ends after it.
            if ids[:n] != before_ids or any(stop > len(before) for _, stop in spans[:n]):
                continue
            if before == prompt or self.decode(prompt_ids + ids[n:]).startswith(self.decode(prompt_ids) + text):
                return ids[n:], [start - len(before) for start, _ in spans[n:]]
        raise SaroError(
            "the tokenizer merges the beginning of the response with the end of the prompt; "
            "end the prompt or begin the response with another character"
        )

    def find_stable(self, prompt: str, text: str) -> StableTokens:
        """Return the tokens that ``text`` has after ``prompt``, whatever follows the text.

        A token that reaches beyond the text begins at one of a few places in it. Up to there, the text has the ids that it
        has if it ends there: BPE encodes the two sides of a boundary between tokens independently. So the
        ids before the first difference between these cases are the same in all of them.
        """
        ids, starts = self.continue_prompt(prompt, text, "")
        n = len(ids)
        for end in self._crossing_places(text):
            shorter = self.continue_prompt(prompt, text[:end], "")[0] if end else []
            same = (a == b for a, b in zip(ids[:n], shorter, strict=False))
            n = sum(takewhile(bool, same))
        return StableTokens(ids[:n], starts[:n], len(text) if n == len(ids) else max(starts[n], 0))

    def _crossing_places(self, text: str) -> set[int]:
        """Return the places in a text at which a token may begin that reaches beyond its end."""
        places: set[int] = set()
        normalizer = self.tokenizer.backend_tokenizer.normalizer
        for length in range(1, min(len(text), self._longest_token) + 1):
            end = len(text) - length
            suffix = text[end:]
            variants = {suffix} if normalizer is None else {suffix, normalizer.normalize_str(suffix)}
            if any(
                self._begins_longer_token(form) for v in variants for form in (v, v.replace(" ", "▁"), _byte_level(v))
            ):
                places.add(end)
            # A token of a byte-level vocabulary may begin inside a character. It may then also have the bytes before it.
            inside = range(1, len(suffix[0].encode()))
            if any(self._begins_longer_token(_byte_level(suffix)[skip:]) for skip in inside):
                places |= {end, max(end - 1, 0)}
        if any(token.lstrip for token in self.tokenizer.added_tokens_decoder.values()):
            places.add(len(text.rstrip()))
        if normalizer is not None and normalizer.normalize_str("e\u0301").endswith("\u00e9"):
            places.add(_last_character_that_composes(text))
        return places

    def _begins_longer_token(self, form: str) -> bool:
        """Return True if a token of the vocabulary begins with ``form`` and is longer."""
        i = bisect_right(self._vocabulary, form)
        return i < len(self._vocabulary) and self._vocabulary[i].startswith(form)

    @cached_property
    def _vocabulary(self) -> list[str]:
        return sorted(self.tokenizer.get_vocab())

    @cached_property
    def _longest_token(self) -> int:
        return max(map(len, self._vocabulary))

    @cached_property
    def _puts_space_in_front(self) -> bool:
        """Return True unless the tokenizer gives a letter the same id in front of a text and inside it."""
        letter = self.ids("a")
        return all(self.ids(anchor + "a") != self.ids(anchor) + letter for anchor in _ANCHORS)


# The characters that stand for the 256 bytes in byte-level vocabularies.
_BYTE_CHARACTERS = bytes_to_unicode()


def _byte_level(text: str) -> str:
    return "".join(_BYTE_CHARACTERS[byte] for byte in text.encode())


def _last_character_that_composes(text: str) -> int:
    """Return the place of the last character that may compose with marks after it (NFC); the end of the text if none may."""
    start = len(text) - 1
    while start > 0 and (unicodedata.category(text[start]).startswith("M") or "\u1100" <= text[start] <= "\u11ff"):
        start -= 1
    # Only letters and these three signs compose among the ASCII characters.
    last = text[start:]
    return len(text) if last.isascii() and not last.isalpha() and last not in "<=>" else start
