"""Ends a run before it spends more than it may, and before it draws from a server that reads prompts differently."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from saro.data.chat_format import ChatFormat
from saro.draws.request import Draw, Generator, Request
from saro.errors import SaroError


@dataclass
class Budget:
    """Counts what one rank of a run has drawn, by generator and judges together.

    Attributes:
        tokens: most tokens to draw; None for no limit.
        calls: most texts to draw; None for no limit.
        drawn_tokens, drawn_calls: what was drawn so far, failures included.
    """

    tokens: int | None = None
    calls: int | None = None
    drawn_tokens: int = 0
    drawn_calls: int = 0

    @classmethod
    def of_rank(cls, tokens: int | None, calls: int | None, rank: int, processes: int) -> Budget:
        """Return one rank's part of a budget. The parts are equal up to one, and their sum is the budget.

        Raises SaroError on every rank if one of them would get nothing, and could never draw its part of the texts.
        """
        for name, limit in (("tokens", tokens), ("calls", calls)):
            if limit is not None and limit < processes:
                raise SaroError(
                    f"--budget.{name} is {limit:,}, which leaves none to some of {processes} ranks; give at least {processes}, "
                    "or start fewer ranks"
                )
        return cls(_part(tokens, rank, processes), _part(calls, rank, processes))

    def spend(self, draws: Sequence[Draw]) -> None:
        """Count draws that came."""
        self.drawn_calls += len(draws)
        self.drawn_tokens += sum(draw.num_tokens for draw in draws)

    def count_affordable(self, requests: Sequence[Request]) -> int:
        """Return how many of the first requests can be drawn even if each text is as long as it may be."""
        number = len(requests)
        if self.calls is not None:
            number = min(number, max(self.calls - self.drawn_calls, 0))
        if self.tokens is None:
            return number
        left = self.tokens - self.drawn_tokens
        for index, request in enumerate(requests[:number]):
            left -= request.sampling.max_tokens
            if left < 0:
                return index
        return number

    def is_spent(self) -> bool:
        """Return True if a limit is reached."""
        reached = [
            limit is not None and drawn >= limit
            for limit, drawn in ((self.tokens, self.drawn_tokens), (self.calls, self.drawn_calls))
        ]
        return any(reached)

    def check_covers(self, request: Request) -> None:
        """Raise SaroError if even an untouched budget does not cover a text: another run would stop at it too."""
        longest = request.sampling.max_tokens
        if self.tokens is not None and self.tokens < longest:
            raise SaroError(
                f"--budget.tokens leaves {self.tokens:,} tokens to a rank, and one text may have {longest:,}; raise it, or "
                "lower --max_tokens"
            )

    def stop(self, missing: int) -> SaroError:
        """Return the error that ends the run; ``missing`` texts of this round are not drawn."""
        limits = {"tokens": (self.tokens, self.drawn_tokens), "calls": (self.calls, self.drawn_calls)}
        spent = [
            f"--budget.{name} {limit:,} ({drawn:,} drawn)"
            for name, (limit, drawn) in limits.items()
            if limit is not None
        ]
        return SaroError(
            f"the budget is spent: {' and '.join(spent)}, and this round lacks {missing:,} texts more; all that was drawn "
            "is stored, so give the same command again, which goes on from here with a new budget"
        )


def _part(limit: int | None, rank: int, processes: int) -> int | None:
    return None if limit is None else limit // processes + (rank < limit % processes)


class BudgetedGenerator(Generator):
    """A generator that stops with a ``SaroError`` when a budget is spent. What was drawn before is stored.

    A server cannot take back what it is asked: it gets only as many requests as the budget affords at their longest, and
    more of them when texts turn out shorter, so that the budget is never exceeded and no text is paid for and lost. A
    model on this machine draws its groups whole: where they begin and end decides a text's last bit, and a
    budget must not. So it may exceed the budget by a part of one group.

    Args:
        inner: the generator.
        budget: shared by all generators of a run.
        is_server: says which of the two rules holds.
        chat: format of a server's model, if its tokenizer is known: the server must count as many tokens in each prompt.
    """

    def __init__(self, inner: Generator, budget: Budget, *, is_server: bool, chat: ChatFormat | None = None) -> None:
        self.inner, self.budget, self.is_server, self.chat = inner, budget, is_server, chat

    @property
    def identity(self) -> Mapping[str, Any]:
        """The identity of the generator: a budget changes no text."""
        return self.inner.identity

    def order(self, requests: Sequence[Request]) -> list[int]:
        """Return the generator's own order."""
        return self.inner.order(requests)

    def draw(self, requests: Sequence[Request]) -> Iterator[list[tuple[int, Draw]]]:
        """Yield the generator's groups.

        Raises:
            SaroError: the budget is spent, or a server counts other tokens in a prompt than it was sent.
        """
        return self._draw_in_waves(requests) if self.is_server else self._draw_in_groups(requests)

    def _draw_in_waves(self, requests: Sequence[Request]) -> Iterator[list[tuple[int, Draw]]]:
        start = 0
        while start < len(requests):
            number = self.budget.count_affordable(requests[start:])
            if number == 0:
                self.budget.check_covers(requests[start])
                raise self.budget.stop(len(requests) - start)
            for group in self.inner.draw(requests[start : start + number]):
                for index, draw in group:
                    self._check_count(requests[start + index], draw)
                self.budget.spend([draw for _, draw in group])
                yield [(start + index, draw) for index, draw in group]
            start += number

    def _draw_in_groups(self, requests: Sequence[Request]) -> Iterator[list[tuple[int, Draw]]]:
        missing = len(requests)
        if missing and self.budget.is_spent():
            raise self.budget.stop(missing)
        for group in self.inner.draw(requests):
            self.budget.spend([draw for _, draw in group])
            missing -= len(group)
            yield group
            if missing and self.budget.is_spent():
                raise self.budget.stop(missing)

    def _check_count(self, request: Request, draw: Draw) -> None:
        """Raise SaroError if a server read other tokens than those that we count.

        Such a server adds tokens of its own, such as a second BOS, or has another template or tokenizer. A chain that is cut
        in our tokens would then not be continued from where it was cut.
        """
        counted, expected = draw.usage.get("prompt"), self._count_prompt(request)
        if counted is None or expected is None or counted == expected:
            return
        raise SaroError(
            f"the server counts {counted:,} tokens in a prompt that has {expected:,} by --server.tokenizer; give the "
            "tokenizer and template of its model, or none in stages rw and op, which need none"
        )

    def _count_prompt(self, request: Request) -> int | None:
        if request.ids is not None:
            return len(request.ids)
        if self.chat is None or request.messages is None:
            return None
        return len(self.chat.prompt_ids(request.messages))
