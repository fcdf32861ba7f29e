"""Lets lm-eval ask our models: ``SaroLM``. Importing this module makes lm-eval know it by the name "saro".

Log-likelihoods are those of lm-eval's own class for transformers models (``HFLM`` 0.4.13), and each context is read
once. Texts come from a generator, and lm-eval gets the answers without their reasoning.

lm-eval's own command line finds the model after this import:

    python -c 'import saro.evaluate.saro_lm, lm_eval.__main__ as m; m.cli_evaluate()' \
        --model saro --model_args run=output/srpo --tasks gsm8k
"""

from __future__ import annotations

import gc
import hashlib
import json
import os
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs, resolve_max_length
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window, simple_parse_args_string
from transformers import PreTrainedTokenizerBase

from saro.data.chat_format import ChatFormat
from saro.data.records import Message, Response
from saro.draws.request import Generator, Request, Sampling
from saro.draws.store import DrawStore
from saro.errors import SaroError, nearest
from saro.evaluate.continuations import (
    Continuation,
    Likelihood,
    TextEncoder,
    cut_context,
    plan_trees,
    score_continuations,
)
from saro.evaluate.options import LoadOptions
from saro.evaluate.stopped_answers import AnswerRequest, StoppedAnswer, draw_answers
from saro.evaluate.subjects import Subject, find_measured
from saro.model.architectures import most_positions, text_config
from saro.model.policy import Policy
from saro.model.source import template_hash
from saro.runs.finished import this_device

# Length of a text if neither the task nor the user names one, as in lm-eval.
_MAX_TOKENS = 256
# Stands for a question, to find what a chat template writes after one.
_PROBE = "saro-probe-question"
# Tokens of a tree of contexts, without gradients: more trees share fewer few-shot examples.
PACK_TOKENS = 8192
# Arguments of `lm_eval --model saro --model_args`.
_ARGUMENTS = ("run", "model", "no_think", "max_tokens", "pack_tokens", "store")


@register_model("saro")
class SaroLM(LM):
    """A model as lm-eval asks it.

    Args:
        chat: how conversations become tokens. Contexts that lm-eval does not render with the chat template are tokenized
            as ``HFLM`` does.
        max_length: most tokens that the model reads.
        load_policy: loads the model that scores, at the first log-likelihood.
        load_generator: loads the model that generates, at the first text. The other one is let go first.
        name: of the tokenizer, for lm-eval's cache of requests.
        no_think: end each rendered prompt with empty reasoning, so that the model answers at once.
        max_tokens: longest text, with its reasoning; None as each task says.
        pack_tokens: most tokens of a forward pass that scores.
        store: file that keeps every text, so that a measurement that was stopped draws only the others; None keeps none.

    Attributes:
        counts: what happened, by name: texts that were "cut", "unfinished" or "failed", contexts that were cut ("cut
            contexts"), "tokens read" for log-likelihoods, "texts" and "continuations".
    """

    def __init__(
        self,
        chat: ChatFormat,
        max_length: int,
        *,
        load_policy: Callable[[], Policy],
        load_generator: Callable[[], Generator],
        name: str = "",
        no_think: bool = False,
        max_tokens: int | None = None,
        pack_tokens: int = PACK_TOKENS,
        store: str | os.PathLike | None = None,
    ) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()
        self.max_length = max_length
        self._chat = chat
        self._load_policy = load_policy
        self._load_generator = load_generator
        self._name = name
        self._no_think = no_think
        self._max_tokens = max_tokens
        self._pack_tokens = pack_tokens
        self._store = store
        self._is_rendered = False
        self._policy: Policy | None = None
        self._generator: Generator | None = None

    @classmethod
    def of(cls, model: Subject, **options: Any) -> SaroLM:
        """Return the language model of a local model; ``options`` are those of the class."""
        config = model.source.config
        longest = resolve_max_length(text_config(config), model.chat.tokenizer)
        return cls(
            model.chat,
            min(longest, most_positions(config) or longest),
            load_policy=lambda: model.load_policy(this_device()),
            load_generator=lambda: model.generator(LoadOptions(), this_device()),
            name=model.name,
            **options,
        )

    @classmethod
    def create_from_arg_obj(cls, arg_dict: Mapping[str, Any], additional_config: dict | None = None) -> SaroLM:
        """Make the model that ``--model_args`` name; lm-eval's own options of batch and device mean nothing here.

        Raises:
            SaroError: an argument is unknown, or there is no such model.
        """
        for name in arg_dict:
            if name not in _ARGUMENTS:
                raise SaroError(f"--model_args: unknown argument {name}{nearest(name, _ARGUMENTS)}")
        options = {name: value for name, value in arg_dict.items() if name not in ("run", "model")}
        return cls.of(find_measured(arg_dict.get("run"), arg_dict.get("model")), **options)

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: dict | None = None) -> SaroLM:
        """Make the model that ``--model_args`` name as a string."""
        return cls.create_from_arg_obj(simple_parse_args_string(arg_string), additional_config)

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's tokenizer, of which lm-eval records the special tokens."""
        return self._chat.tokenizer

    @property
    def tokenizer_name(self) -> str:
        """Name of all that decides a rendered prompt, under which lm-eval may keep requests."""
        decides = {
            "template": template_hash(self.tokenizer.chat_template),
            "date": self._chat.template_date.isoformat(),
            "variables": dict(self._chat.template_variables or {}),
            "tags": self._chat.think_tags,
            "no_think": self._no_think,
        }
        digest = hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()
        return f"{self._name.strip('/').replace('/', '__')}-{digest[:16]}"

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """Return the template of ``apply_chat_template``, None if it is not wanted.

        Raises:
            SaroError: another template is asked for by name.
        """
        if isinstance(chat_template, str):
            raise SaroError(f"--apply_chat_template {chat_template}: a run has one template; give no name")
        template = self.tokenizer.chat_template
        chosen = template.get("default") if isinstance(template, dict) else template
        return chosen if chat_template else None

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Render a conversation as in training: with the run's template, date, variables and think tags.

        Args:
            add_generation_prompt: False if the last message is the beginning of an answer. The reasoning is then over:
                the answer stands where a training answer without reasoning would.

        Raises:
            SaroError: the template refuses the conversation.
        """
        self._is_rendered = True
        messages = [Message(turn["role"], turn["content"]) for turn in chat_history]
        begun = "" if add_generation_prompt else messages.pop().content
        rendered = self._chat.render_prompt(messages)
        if not begun and not self._no_think:
            return rendered
        reasoning = "" if self._no_think and not self._chat.closes_reasoning(rendered) else None
        text = self._chat.completion_text(rendered, Response(reasoning, begun))
        return rendered + self._chat.answer_start + text

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Return (log-probability in nats, is what greedy decoding gives) of each continuation of a context.

        Raises:
            SaroError: a continuation cannot be scored, or would be scored within the reasoning.
        """
        encoder = TextEncoder(self.tokenizer, self._is_rendered)
        continuations = []
        for request in requests:
            context, continuation = request.args
            if self._chat.opens_reasoning(context):
                raise SaroError(
                    f"{_where(request)}: the chat template opens the reasoning, so that choices would be scored as "
                    "reasoning; give --no_think"
                )
            if self._lacks_start(context):
                raise SaroError(
                    f"{_where(request)}: a model begins its answers with {self._chat.answer_start}, which choices do not "
                    "have; give --no_think"
                )
            try:
                continuations.append(encoder.encode_pair(context, continuation))
            except SaroError as error:
                raise SaroError(f"{_where(request)}: {error}") from error
        likelihoods = self._score(continuations, requests)
        answers = [(likelihood.logp, likelihood.is_greedy) for likelihood in likelihoods]
        for request, answer in zip(requests, answers, strict=True):
            self.cache_hook.add_partial("loglikelihood", request.args, answer)
        return answers

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Return the log-probability of each text, nats. A long one is scored in windows, each token once."""
        encoder = TextEncoder(self.tokenizer)
        windows: list[Continuation] = []
        texts: list[int] = []  # (windows,) number of the text that a window is of
        for number, request in enumerate(requests):
            parts = get_rolling_token_windows(
                token_list=encoder.encode(request.args[0]),
                prefix_token=encoder.prefix_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            for context, tokens in map(make_disjoint_window, parts):
                windows.append(Continuation(tuple(context), tuple(tokens)))
                texts.append(number)
        totals = [0.0] * len(requests)
        for number, likelihood in zip(texts, self._score(windows, [requests[n] for n in texts]), strict=True):
            totals[number] += likelihood.logp
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Return the answer to each context, up to the task's stop strings. The reasoning is not part of it.

        An answer is empty if the limit of tokens came within the reasoning; ``counts`` says how often.

        Raises:
            SaroError: a task asks for something that is not supported, or for longer texts than the model can write.
        """
        encoder = TextEncoder(self.tokenizer, self._is_rendered)
        repeats: Counter[Request] = Counter()
        wanted = []
        num_cut = 0
        for request in requests:
            context, gen_kwargs = request.args
            sampling, stop = self._read_sampling(gen_kwargs, _where(request))
            ids = encoder.encode(context)
            room = self.max_length - sampling.max_tokens
            num_cut += len(ids) > room
            asked = Request(sampling, ids=tuple(ids[-room:]))
            # lm-eval repeats a request to have several draws. Greedy ones are all the same.
            number = repeats[asked] if sampling.temperature > 0 else 0
            repeats[asked] += 1
            may_think = self._chat.opens_reasoning(context) or (self._is_rendered and not self._no_think)
            wanted.append(AnswerRequest(replace(asked, number=number), stop, may_think))
        self._count_cut_contexts(num_cut, len(requests))
        answers = self._draw(wanted)
        self._count_answers(answers)
        for request, answer in zip(requests, answers, strict=True):
            self.cache_hook.add_partial("generate_until", request.args, answer.text)
        return [answer.text for answer in answers]

    def _draw(self, wanted: Sequence[AnswerRequest]) -> list[StoppedAnswer]:
        generator = self._generating()
        if self._store is None:
            return draw_answers(generator, self._chat, wanted)
        with DrawStore.open(self._store) as store:
            return draw_answers(generator, self._chat, wanted, store)

    def _read_sampling(self, gen_kwargs: Mapping[str, Any], where: str) -> tuple[Sampling, tuple[str, ...]]:
        """Return how a task wants its texts drawn, and the strings that end its answers."""
        wanted = dict(normalize_gen_kwargs(dict(gen_kwargs), _MAX_TOKENS))
        stop = tuple(text for text in wanted.pop("until") if text)
        max_tokens = self._max_tokens or wanted.pop("max_gen_toks")
        wanted.pop("max_gen_toks", None)
        if max_tokens >= self.max_length:
            raise SaroError(
                f"{where}: texts of {max_tokens:,} tokens leave no room for a prompt in the model's "
                f"{self.max_length:,}; give a smaller --max_tokens"
            )
        is_greedy = not wanted.pop("do_sample")
        temperature = float(wanted.pop("temperature", 1.0))
        top_p, top_k = float(wanted.pop("top_p", 1.0)), int(wanted.pop("top_k", 0))
        if wanted.pop("num_beams", 1) != 1 or wanted:
            unknown = next(iter(wanted), "num_beams")
            raise SaroError(f"{where}: generation_kwargs has {unknown}, which is not supported; leave the task out")
        if is_greedy or temperature == 0:
            return Sampling(max_tokens), stop
        return Sampling(max_tokens, temperature, top_p, top_k), stop

    def _score(self, continuations: Sequence[Continuation], requests: Sequence[Instance]) -> list[Likelihood]:
        """Return the likelihoods of continuations; each request is the one that its continuation is of."""
        cut = []
        for continuation, request in zip(continuations, requests, strict=True):
            try:
                cut.append(cut_context(continuation, self.max_length))
            except SaroError as error:
                raise SaroError(f"{_where(request)}: {error}") from error
        num_cut = sum(short != whole for short, whole in zip(cut, continuations, strict=True))
        self._count_cut_contexts(num_cut, len(cut))
        trees = list(plan_trees(cut, self._pack_tokens))
        self.counts["tokens read"] += sum(tree.tokens for tree in trees)
        self.counts["continuations"] += len(cut)
        scored = score_continuations(self._scoring(), trees)
        return [scored[i] for i in range(len(cut))]

    def _lacks_start(self, context: str) -> bool:
        """Return True if a rendered context ends before the control tokens with which a model begins its answer."""
        if not self._is_rendered or not self._chat.answer_start.strip():
            return False
        prompt_end = self._chat.render_prompt([Message("user", _PROBE)]).rpartition(_PROBE)[2]
        return context.endswith(prompt_end)

    def _scoring(self) -> Policy:
        """Return the model that scores. Only one of the two is in memory, because they have the same weights."""
        if self._policy is None:
            self._generator = None
            gc.collect()
            self._policy = self._load_policy()
        return self._policy

    def _generating(self) -> Generator:
        if self._generator is None:
            self._policy = None
            gc.collect()
            self._generator = self._load_generator()
        return self._generator

    def _count_cut_contexts(self, number: int, total: int) -> None:
        self.counts["cut contexts"] += number
        if number:
            _warn(
                f"{number:,} of {total:,} contexts are longer than the {self.max_length:,} tokens that the model reads; "
                "their beginnings were cut off"
            )

    def _count_answers(self, answers: Sequence[StoppedAnswer]) -> None:
        states = Counter(answer.state for answer in answers)
        self.counts.update({"texts": len(answers)} | {s: states[s] for s in ("cut", "unfinished", "failed")})
        if states["unfinished"]:
            _warn(
                f"{states['unfinished']:,} of {len(answers):,} texts reached the limit before their reasoning ended, and "
                "count as empty answers; raise --max_tokens"
            )
        if states["failed"]:
            _warn(f"{states['failed']:,} of {len(answers):,} texts could not be generated, and count as empty answers")


def _where(request: Instance) -> str:
    return f"task {request.task_name}, document {request.doc_id}"


def _warn(line: str) -> None:
    print(f"warning: {line}", file=sys.stderr, flush=True)
