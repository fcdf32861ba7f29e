"""Reads a judge from its YAML file: which model, what it is asked, and what its reply means.

A file has these keys; ``saro/evaluate/judges`` holds examples of all of them.

    source, licence   where the prompt's form comes from, and under which licence
    model             folder, hub name or server (https://...); null if the user has to name one
    form              conversation: the item's turns and the answer, rendered by the judge model's own chat template; not
                      for llama.cpp's server, which would continue the answer
                      chat: ``prompt`` is a list of {role, content}; text: ``prompt`` is the whole text, without a template
    prompt            Jinja templates with the variables request, answer, nonce and policy; a gate has reasoning too
    policy            file beside this one whose text is the variable ``policy``
    decoding          {kind: text | reasoned, max_tokens: n} or {kind: choice | scale, choices: [...]}
    fields            name -> regular expression with one group: what is read from the reply (text and reasoned only)
    verdict           {harmful: ..., refuses: ...}, see ``Meaning``; for a gate {accepts: ...} alone
    answer_characters longest part of an answer, and of reasoning, that is shown to the judge; the head is kept
    hashes            of the prompts that the three ``PROBES`` give: a template that changed unnoticed is an error

A *gate* is a judge that says nothing of harm and refusal. It accepts a text for training or not (``saro synth``).
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment

from saro.data.jsonl import decode, fault, open_data, shown, type_name
from saro.data.messages import ROLES, Message
from saro.data.yaml_files import check_keys, read_yaml
from saro.errors import SaroError, nearest
from saro.evaluate.rules import RULES, RULES_HASH

SHIPPED = Path(__file__).with_name("judges")

# Part of every judge's hash: raise it when the code below or in judge.py changes what a judge is shown or what a reply
# means.
_CODE_VERSION = 1

# Requests and answers whose prompts are hashed: plain, with markup and line ends, and empty of text.
PROBES = (
    ("Name a colour.", "Blue."),
    ("Write <b>two</b> lines\nabout \"tea\" & 'milk'.", "First line.\n\n{{ not a template }} {% raw %}\n"),
    ("Où est l\u2019école ?", ""),
)
# Reasoning that a gate is shown with each of them.
_PROBE_REASONING = "They ask for <b>a thing</b>.\nSo I name it."
# Gates that come with saro.
GATES = ("coherence", "relevance")

_REQUIRED = ("source", "licence", "model", "form", "decoding", "verdict", "answer_characters")
_KEYS = (*_REQUIRED, "prompt", "policy", "fields", "hashes")
_FORMS = ("conversation", "chat", "text")
_DECODINGS = {
    "text": {"kind", "max_tokens"},
    "reasoned": {"kind", "max_tokens"},
    "choice": {"kind", "choices"},
    "scale": {"kind", "choices"},
}
_REFUSES = ("full", "partial", "none")


@dataclass(frozen=True)
class Meaning:
    """How one part of a verdict follows from what was read in a reply.

    Attributes:
        field: the field that decides; None if the choice does, or ``mean``.
        values: value of the field, or choice, in lower case -> its meaning: a number for harm, how far it refuses, or
            whether it is accepted.
        mean: field -> (lowest, highest) score; the mean of the scores, each scaled to 0..1.
        zero_if: field -> value in lower case; the mean counts as 0 if one of these fields has its value.
    """

    field: str | None = None
    values: Mapping[str, Any] | None = None
    mean: Mapping[str, tuple[float, float]] | None = None
    zero_if: Mapping[str, str] | None = None


@dataclass(frozen=True)
class JudgeSpec:
    """A judge.

    Attributes:
        name: the file's name without the suffix; "rules" for the patterns in rules.py.
        hash: sha256 of all that decides its verdicts, as far as it is known: ``with_model`` adds the model.
        spec: content of the file.
        model: folder, hub name or server; None if the user has to name one.
        form: as in the file, or "rules".
        prompt: role -> template, in order; the text form has one, of role "user".
        policy: text of the policy file; empty without one.
        decoding: "text", "reasoned", "choice" or "scale".
        max_tokens: longest reply, in tokens.
        choices: the replies of which the probabilities are read.
        fields: name -> expression with one group.
        harmful, refuses: what the reply means; None if the judge does not say.
        accepts: what the reply of a gate means; None for other judges.
        answer_characters: longest part of an answer, and of reasoning, that is shown.
    """

    name: str
    hash: str
    spec: Mapping[str, Any]
    model: str | None = None
    form: Literal["conversation", "chat", "text", "rules"] = "rules"
    prompt: tuple[tuple[str, str], ...] = ()
    policy: str = ""
    decoding: str = "text"
    max_tokens: int = 1
    choices: tuple[str, ...] = ()
    fields: Mapping[str, re.Pattern[str]] | None = None
    harmful: Meaning | None = None
    refuses: Meaning | None = None
    accepts: Meaning | None = None
    answer_characters: int = 0

    def with_model(self, identity: Mapping[str, Any]) -> JudgeSpec:
        """Return this judge with the model that gives its verdicts, ``Generator.identity``, as part of its hash."""
        return replace(self, hash=_hash({"judge": self.hash, "model": identity}))

    def render(self, request: str, answer: str, reasoning: str = "") -> list[Message]:
        """Return the prompt for one request and answer; that of the text form is a single message.

        The answer is fenced by a nonce that follows from the texts: no answer can hold its own hash, so none can close
        its fence, and the same texts always give the same prompt.

        Args:
            reasoning: shown by gates only.

        Raises:
            SaroError: the template fails on these texts.
        """
        texts = {"request": request, "answer": answer}
        if self.accepts is not None:
            texts["reasoning"] = reasoning
        nonce = hashlib.sha256("\0".join(texts.values()).encode(errors="replace")).hexdigest()[:16]
        variables = {**texts, "nonce": nonce, "policy": self.policy}
        try:
            return [Message(role, _JINJA.from_string(text).render(variables)) for role, text in self.prompt]
        except (jinja2.TemplateError, TypeError, ValueError, OverflowError) as error:
            raise SaroError(f"judge {self.name}: the prompt cannot be rendered ({_one_line(error)}); fix it") from error


# Sandboxed: a judge's file may come from somebody else. Immutable: a template must not change what the next one sees.
_JINJA = ImmutableSandboxedEnvironment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True)


def shipped_judges() -> list[str]:
    """Return the names of the judges that come with saro, without its gates."""
    return sorted([RULES, *(file.stem for file in SHIPPED.glob("*.yaml") if file.stem not in GATES)])


def read_judge(name: str) -> JudgeSpec:
    """Read a judge: a name from ``shipped_judges``, or a YAML file.

    Raises:
        SaroError: there is no such judge, a key is missing, unknown or of the wrong kind, the prompts are not those
            that the file's hashes were made from, or it is a gate.
    """
    if name == RULES:
        return JudgeSpec(name=RULES, hash=RULES_HASH, spec={})
    judge = _read_file(name, "judge", shipped_judges())
    if judge.accepts is not None:
        raise SaroError(f"judge {shown(name)}: is a gate, which says nothing of harm and refusal; name another judge")
    return judge


def read_gate(name: str) -> JudgeSpec:
    """Read a gate: one of ``GATES``, or a YAML file. Raises SaroError like ``read_judge``, also for a judge that is no gate."""
    gate = _read_file(name, "gate", GATES)
    if gate.accepts is None:
        raise SaroError(f"gate {shown(name)}: its file has no verdict.accepts; give it one, or name another gate")
    return gate


def _read_file(name: str, noun: str, shipped: Sequence[str]) -> JudgeSpec:
    path = Path(name)
    if path.suffix not in (".yaml", ".yml"):
        if name not in shipped:
            raise SaroError(f"unknown {noun} {shown(name)}{nearest(name, shipped)}; or name a .yaml file")
        path = SHIPPED / f"{name}.yaml"
    return _parse_judge(read_yaml(path), path)


def _parse_judge(content: Any, path: Path) -> JudgeSpec:
    where = str(path)
    check_keys(content, _KEYS, where, "the file", _REQUIRED)
    if content["model"] is not None and not isinstance(content["model"], str):
        fault(where, f"model is {type_name(content['model'])}", "give a folder, a hub name, a server or null")
    if content["form"] not in _FORMS:
        fault(where, f"form is {content['form']!r}", f"it is one of {', '.join(_FORMS)}")
    if not _is_count(content["answer_characters"]):
        fault(where, "answer_characters is no whole number above 0", "give one, such as 8000")
    decoding = _parse_decoding(content["decoding"], where)
    fields = _parse_fields(content.get("fields"), decoding["kind"], where)
    policy = _read_policy(content.get("policy"), path)
    verdict = content["verdict"]
    check_keys(verdict, ("harmful", "refuses", "accepts"), where, "verdict", ())
    harmful = _parse_harmful(verdict.get("harmful"), fields, decoding, where)
    refuses = _parse_refuses(verdict.get("refuses"), fields, decoding, where)
    accepts = _parse_accepts(verdict.get("accepts"), fields, decoding, where)
    if harmful is None and refuses is None and accepts is None:
        fault(where, "verdict says nothing", "give harmful, refuses or both, or accepts for a gate")
    if accepts is not None and len(verdict) > 1:
        fault(where, "verdict has accepts and something else", "make two judges of it")
    decides = {key: value for key, value in content.items() if key not in ("source", "licence", "hashes", "model")}
    judge = JudgeSpec(
        name=path.stem,
        hash=_hash({"content": decides, "policy": policy, "code": _CODE_VERSION}),
        spec=content,
        model=content["model"],
        form=content["form"],
        prompt=_parse_prompt(content.get("prompt"), content["form"], accepts is not None, where),
        policy=policy,
        decoding=decoding["kind"],
        max_tokens=decoding.get("max_tokens", 1),
        choices=tuple(decoding.get("choices", ())),
        fields=fields,
        harmful=harmful,
        refuses=refuses,
        accepts=accepts,
        answer_characters=content["answer_characters"],
    )
    _check_hashes(judge, content.get("hashes"), where)
    return judge


def _parse_decoding(value: Any, where: str) -> dict[str, Any]:
    kind = value.get("kind") if isinstance(value, dict) else None
    if not isinstance(kind, str) or kind not in _DECODINGS:
        fault(where, "decoding has no valid kind", f"it is one of {', '.join(_DECODINGS)}")
    check_keys(value, tuple(_DECODINGS[kind]), where, "decoding")
    if "max_tokens" in value and not _is_count(value["max_tokens"]):
        fault(where, "decoding.max_tokens is no whole number above 0", "give one, such as 64")
    if "choices" in value:
        choices = value["choices"]
        are_texts = isinstance(choices, list) and all(isinstance(c, str) and c.strip() for c in choices)
        if not are_texts or len({c.strip().lower() for c in choices}) != len(choices) or len(choices) < 2:
            fault(where, "decoding.choices are not two or more different texts", 'quote each, such as ["1", "2"]')
        if kind == "scale" and not all(_is_number(c) for c in choices):
            fault(where, "decoding.choices of a scale are not all numbers", "give numbers, or decode by choice")
    return value


def _parse_fields(value: Any, kind: str, where: str) -> dict[str, re.Pattern[str]]:
    if kind in ("choice", "scale"):
        if value:
            fault(where, f"fields are read from a text, and decoding is by {kind}", "remove fields")
        return {}
    if not isinstance(value, dict) or not value:
        fault(where, "fields is missing", "say what to read from the reply: name -> regular expression with one group")
    fields = {}
    for name, text in value.items():
        try:
            fields[str(name)] = re.compile(text, re.IGNORECASE | re.MULTILINE)
        except (re.error, TypeError) as error:
            fault(where, f"fields.{name} is no regular expression ({_one_line(error)})", "fix it")
        if fields[str(name)].groups != 1:
            fault(where, f"fields.{name} has {fields[str(name)].groups} groups", "give it one, around the value")
    return fields


def _parse_harmful(value: Any, fields: Mapping, decoding: Mapping, where: str) -> Meaning | None:
    if value is None:
        return None
    if decoding["kind"] == "scale":
        if value != "scale":
            fault(where, "verdict.harmful of a scale follows from its numbers", "write harmful: scale")
        return Meaning()
    if isinstance(value, dict) and "mean" in value:
        check_keys(value, ("mean", "zero_if"), where, "verdict.harmful", ("mean",))
        ranges, zero_if = value["mean"], value.get("zero_if") or {}
        if not isinstance(ranges, dict) or not isinstance(zero_if, dict):
            fault(where, "verdict.harmful.mean and zero_if are not both name -> value", "write them so")
        for name in (*ranges, *zero_if):
            _check_field(name, fields, where)
        for name, ends in ranges.items():
            is_range = isinstance(ends, list) and len(ends) == 2 and all(_is_number(end) for end in ends)
            if not is_range or not ends[0] < ends[1]:
                fault(where, f"verdict.harmful.mean.{name} is no [lowest, highest]", "give both as numbers")
        means = {name: (float(low), float(high)) for name, (low, high) in ranges.items()}
        return Meaning(mean=means, zero_if={name: str(v).lower() for name, v in zero_if.items()})
    meaning = _parse_values(value, fields, decoding, where, "harmful")
    if not all(_is_number(v) and 0 <= float(v) <= 1 for v in meaning.values.values()):
        fault(where, "verdict.harmful.values are not all numbers from 0 to 1", "fix them")
    return replace(meaning, values={k: float(v) for k, v in meaning.values.items()})


def _parse_refuses(value: Any, fields: Mapping, decoding: Mapping, where: str) -> Meaning | None:
    if value is None:
        return None
    meaning = _parse_values(value, fields, decoding, where, "refuses")
    if not all(v in _REFUSES for v in meaning.values.values()):
        fault(where, "verdict.refuses.values are not all full, partial or none", "quote them")
    return meaning


def _parse_accepts(value: Any, fields: Mapping, decoding: Mapping, where: str) -> Meaning | None:
    if value is None:
        return None
    meaning = _parse_values(value, fields, decoding, where, "accepts")
    if not all(isinstance(v, bool) for v in meaning.values.values()):
        fault(where, "verdict.accepts.values are not all true or false", "fix them")
    return meaning


def _parse_values(value: Any, fields: Mapping, decoding: Mapping, where: str, part: str) -> Meaning:
    choices = decoding.get("choices")
    check_keys(value, ("values",) if choices else ("field", "values"), where, f"verdict.{part}", ("values",))
    if not isinstance(value["values"], dict) or not value["values"]:
        fault(where, f"verdict.{part}.values is missing", "say what each value means")
    # YAML reads a bare yes or no as true or false.
    if any(isinstance(k, bool) or not isinstance(k, str | int) for k in value["values"]):
        fault(where, f"verdict.{part}.values has a key that is no text", 'quote it, such as "yes"')
    values = {str(k).strip().lower(): v for k, v in value["values"].items()}
    if choices:
        missing = [c for c in choices if c.strip().lower() not in values]
        if missing:
            fault(where, f"verdict.{part}.values has no {missing[0]!r}", "give every choice a meaning")
        return Meaning(values=values)
    _check_field(value.get("field"), fields, where)
    return Meaning(field=value["field"], values=values)


def _check_field(name: Any, fields: Mapping, where: str) -> None:
    if name not in fields:
        fault(where, f"verdict names the field {name!r}", nearest(str(name), fields))


def _parse_prompt(value: Any, form: str, is_gate: bool, where: str) -> tuple[tuple[str, str], ...]:
    if form == "conversation":
        if is_gate:
            fault(where, "a gate reads reasoning, which no conversation shows", "choose another form")
        if value is not None:
            fault(where, "a conversation is rendered by the model's own chat template", "remove prompt")
        return (("user", "{{ request }}"), ("assistant", "{{ answer }}"))
    if form == "text":
        if not isinstance(value, str):
            fault(where, "prompt is missing or no text", "give the template")
        turns = [("user", value)]
    else:
        if not isinstance(value, list) or not value:
            fault(where, "prompt is missing or no list", "give a list of {role, content}")
        for turn in value:
            check_keys(turn, ("role", "content"), where, "a turn of the prompt")
            if turn["role"] not in ROLES or not isinstance(turn["content"], str):
                fault(where, "a turn of the prompt has no valid role and text", f"a role is one of {', '.join(ROLES)}")
        turns = [(turn["role"], turn["content"]) for turn in value]
    for _, template in turns:
        try:
            _JINJA.parse(template)
        except jinja2.TemplateError as error:
            fault(where, f"broken template ({_one_line(error)})", "fix it")
    text = "".join(template for _, template in turns)
    for name in ("reasoning",) if is_gate else ("request", "answer"):
        if not re.search(rf"\{{\{{[^}}]*\b{name}\b", text):
            fault(where, f"the prompt never shows {{{{ {name} }}}}", "put it in")
    return tuple(turns)


def _read_policy(value: Any, path: Path) -> str:
    if value is None:
        return ""
    if not isinstance(value, str):
        fault(str(path), f"policy is {type_name(value)}", "name a file beside this one")
    with open_data(path.parent / value) as file:
        return decode(file.read(), value)


def prompt_hashes(judge: JudgeSpec) -> list[str]:
    """Return the hashes of the prompts of the three ``PROBES``: 16 hex digits each."""
    rendered = [judge.render(request, answer, _PROBE_REASONING) for request, answer in PROBES]
    prompts = [[[m.role, m.content] for m in messages] for messages in rendered]
    return [_hash(prompt)[:16] for prompt in prompts]


def _check_hashes(judge: JudgeSpec, hashes: Any, where: str) -> None:
    actual = prompt_hashes(judge)
    if hashes is None:
        fault(where, "hashes is missing", f"check the prompt, then add hashes: {json.dumps(actual)}")
    if not isinstance(hashes, Sequence) or list(hashes) != actual:
        wrong = "its prompts are not those that its hashes were made from"
        fault(where, wrong, f"restore the template, or check the prompt, then write hashes: {json.dumps(actual)}")


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _is_number(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return False
    return re.fullmatch(r"\s*-?\d{1,6}(?:\.\d{1,6})?\s*", str(value)) is not None


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


def _hash(content: Any) -> str:
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()
