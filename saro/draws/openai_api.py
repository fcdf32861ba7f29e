"""Writes requests as the OpenAI API takes them, and reads its replies and errors as draws. Opens no connection."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from saro.draws.request import Draw, Request

CHAT, COMPLETIONS = "chat/completions", "completions"
THINK_TAGS = ("<think>", "</think>")

# The API lists at most this many candidates for a token.
_TOP_LOGPROBS = 20
# How servers name the end of a text. vLLM, SGLang and llama.cpp keep to the first; others have names of their own.
_STOPPED = ("stop", "eos", "eos_token", "end_turn", "stop_sequence")
_TOO_LONG = re.compile(
    r"context.?(length|size|window)|exceed_context|maximum (model|sequence|input) length|prompt is too long|too many tokens",
    re.IGNORECASE,
)
_REFUSED = re.compile(
    r"content.?(filter|policy|management)|responsible.?ai|moderation|safety.?system|flagged", re.IGNORECASE
)
# Longest message of a server that is kept, and the shortest piece of a prompt that is recognised in one, in characters.
_MESSAGE, _PIECE = 200, 20


def make_identity(
    host: str, model: str, revision: str | None, think_tags: tuple[str, str] = THINK_TAGS, extra: Mapping | None = None
) -> dict[str, Any]:
    """Return the ``Generator.identity`` of a server's model.

    Args:
        host: host and port, and the path if it says which server answers.
        revision: the user's label for what the server cannot tell: weights, quantization, template.
        think_tags, extra: as in ``EndpointOptions``; they decide the text too.
    """
    identity = {"kind": "endpoint", "host": host, "model": model, "revision": revision, "think_tags": [*think_tags]}
    return identity | ({"extra": dict(extra)} if extra else {})


def render_body(request: Request, identity: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """Return the path under /v1/ to which a request goes, and its body.

    Messages go to the chat endpoint. Text and ids go to the completions endpoint as they are, because many servers'
    chat endpoints break the beginning of an answer that the model is to continue.

    The key of the draw seeds the server, so that several draws of one prompt differ. Servers do not promise to give the
    same text for the same seed.
    """
    sampling = request.sampling
    body: dict[str, Any] = {"model": identity["model"]}
    if request.messages is not None:
        path = CHAT
        body["messages"] = [{"role": message.role, "content": message.content} for message in request.messages]
    else:
        path = COMPLETIONS
        body["prompt"] = request.text if request.ids is None else list(request.ids)
    # top_p is sent even if it is 1: some servers' default is in the model's generation_config.json.
    body |= {"max_tokens": sampling.max_tokens, "temperature": sampling.temperature, "top_p": sampling.top_p}
    if sampling.choices:
        listed = {"logprobs": True, "top_logprobs": _TOP_LOGPROBS} if path == CHAT else {"logprobs": _TOP_LOGPROBS}
        body |= {"max_tokens": 1, "temperature": 0.0, "top_p": 1.0} | listed
    elif sampling.temperature > 0:
        # 31 bits: some servers hold seeds in a signed 32-bit integer.
        body["seed"] = int(request.key(identity)[:8], 16) & 0x7FFFFFFF
    # Sent only if given: not every server knows it.
    if sampling.top_k and not sampling.choices:
        body["top_k"] = sampling.top_k
    if sampling.stop:
        body["stop"] = list(sampling.stop)
    body |= identity.get("extra", {})
    return path, {name: value for name, value in body.items() if value is not None}


def parse_reply(request: Request, identity: Mapping[str, Any], status: int, reply: Any) -> Draw:
    """Read a server's reply as a draw. Never raises, whatever the reply is.

    Args:
        status: HTTP status.
        reply: the reply's JSON value; None if it was none.
    """
    error = _find_error(reply)
    if status == 200 and not error:
        return _parse_text(request, identity, reply)
    if status == 200:
        # Some servers report an error in a reply that says 200.
        code = error.get("code") if isinstance(error, dict) else None
        status = code if isinstance(code, int) and 400 <= code < 600 else 500
    message, kind = _describe_error(error)
    detail = _one_line(f"HTTP {status}", message, request)
    if _TOO_LONG.search(f"{message} {kind}"):
        return Draw(failure="length", detail=detail)
    if _REFUSED.search(f"{message} {kind}"):
        return Draw(failure="refused", detail=detail)
    return Draw(failure="http", detail=detail)


def is_quota_error(reply: Any) -> bool:
    """Return True for an error that says that the account has nothing left, which waiting does not change."""
    return "insufficient_quota" in _describe_error(_find_error(reply))[1]


def _parse_text(request: Request, identity: Mapping[str, Any], reply: Any) -> Draw:
    """Read a reply with HTTP status 200."""
    choice = _first(reply.get("choices")) if isinstance(reply, dict) else None
    if not isinstance(choice, dict):
        return Draw(failure="parse", detail="the reply has no choices")
    known = {"usage": _parse_usage(reply.get("usage")), "versions": _parse_versions(reply, identity)}
    if request.sampling.choices:
        return _parse_choices(request, choice, known)
    finish = choice.get("finish_reason")
    if finish == "content_filter":
        return Draw(failure="refused", detail="finish_reason content_filter", **known)
    if finish not in (*_STOPPED, "length"):
        shown = finish if isinstance(finish, str) and re.fullmatch(r"\w{1,40}", finish) else "not known"
        return Draw(failure="parse", detail=f"finish_reason is {shown}", **known)
    finish = "length" if finish == "length" else "stop"
    text = _find_text(request, choice, finish, identity["think_tags"])
    if text is None:
        return Draw(failure="parse", detail="the reply has no text", **known)
    if not text:
        return Draw(failure="empty", detail=f"no text, finish_reason {finish}", **known)
    return Draw(ids=_parse_ids(choice.get("token_ids")), text=text, finish=finish, **known)


def _find_text(request: Request, choice: dict[str, Any], finish: str, think_tags: list[str]) -> str | None:
    """Return the text of a choice with its reasoning in front, in tags; None if it has no text field."""
    if request.messages is None:
        return _clean(choice.get("text"))
    message = choice.get("message")
    if not isinstance(message, dict):
        return None
    # A model's own refusal has a field of its own in some APIs: it is an answer.
    content = _clean(message.get("content")) or _clean(message.get("refusal")) or ""
    # The first name is DeepSeek's, which SGLang and llama.cpp took over; the second is that of vLLM and OpenRouter.
    reasoning = _clean(message.get("reasoning_content")) or _clean(message.get("reasoning"))
    if not reasoning:
        is_known = any(name in message for name in ("content", "refusal", "reasoning_content", "reasoning"))
        return content if is_known else None
    opening, closing = think_tags
    text = f"{opening}\n" + reasoning.strip("\n")
    if not content and finish == "length":
        return text  # Cut in the reasoning, which is therefore open.
    return f"{text}\n{closing}\n\n" + content.lstrip("\n")


def _parse_choices(request: Request, choice: dict[str, Any], known: dict[str, Any]) -> Draw:
    """Read the log-probs of ``Sampling.choices``.

    A choice that the server does not list gets the lowest log-prob listed, which is the most that it can have.
    """
    listed = _listed_logprobs(choice.get("logprobs"))
    if not listed:
        return Draw(failure="parse", detail="the server gives no log-probs (top_logprobs)", **known)
    wanted = request.sampling.choices
    if not any(text in listed for text in wanted):
        return Draw(failure="parse", detail=f"no choice is among the {len(listed)} likeliest tokens", **known)
    lowest = min(listed.values())
    text = _find_text(request, choice, "stop", list(THINK_TAGS)) or ""
    return Draw(text=text, finish="stop", choices=tuple(listed.get(text, lowest) for text in wanted), **known)


def _listed_logprobs(logprobs: Any) -> dict[str, float]:
    """Return token -> log-prob for the first token of a reply, from either of the API's two forms."""
    if not isinstance(logprobs, dict):
        return {}
    listed: dict[str, float] = {}
    # Chat, and llama.cpp's completions: {"content": [{"top_logprobs": [{"token", "logprob"}, ...]}]}.
    if isinstance(first := _first(logprobs.get("content")), dict):
        candidates = first.get("top_logprobs")
        rows = [row for row in candidates if isinstance(row, dict)] if isinstance(candidates, list) else []
        pairs = [(row.get("token"), row.get("logprob")) for row in rows]
    # Completions: {"top_logprobs": [{token: logprob, ...}]}.
    elif isinstance(first := _first(logprobs.get("top_logprobs")), dict):
        pairs = list(first.items())
    else:
        return {}
    for token, logprob in pairs:
        # Not NaN and not infinite; and log-probs are not positive.
        is_number = isinstance(logprob, int | float) and not isinstance(logprob, bool)
        if isinstance(token, str) and is_number and -1e5 < logprob <= 1e-3:
            # Two tokens may be the same text, such as parts of a character: the likelier counts.
            listed[token] = max(float(logprob), listed.get(token, float("-inf")))
    return listed


def _parse_usage(usage: Any) -> dict[str, int]:
    """Return the numbers of tokens that a server reports; "reasoning" is a part of "completion"."""
    if not isinstance(usage, dict):
        return {}
    details = usage.get("completion_tokens_details")
    numbers = {
        "prompt": usage.get("prompt_tokens"),
        "completion": usage.get("completion_tokens"),
        "reasoning": details.get("reasoning_tokens") if isinstance(details, dict) else None,
    }
    return {name: n for name, n in numbers.items() if isinstance(n, int) and not isinstance(n, bool) and n >= 0}


def _parse_versions(reply: dict[str, Any], identity: Mapping[str, Any]) -> dict[str, str]:
    """Return what the server says of itself, and its model's name if that is more exact than the one asked for."""
    versions = {"server": reply.get("system_fingerprint"), "model": reply.get("model")}
    if versions["model"] == identity["model"]:
        del versions["model"]
    return {name: _clean(text)[:_MESSAGE] for name, text in versions.items() if isinstance(text, str) and text}


def _parse_ids(ids: Any) -> tuple[int, ...] | None:
    """Return the token ids that vLLM adds if ``extra`` asks for them with return_token_ids."""
    is_ids = isinstance(ids, list) and all(isinstance(i, int) and not isinstance(i, bool) for i in ids)
    return tuple(ids) if is_ids and ids else None


def _find_error(reply: Any) -> Any:
    """Return the innermost error of a reply, or None. Some servers wrap it twice."""
    if not isinstance(reply, dict):
        return None
    if reply.get("object") == "error" or (reply.get("detail") and "choices" not in reply):
        return reply
    error = reply.get("error")
    while isinstance(error, dict) and error.get("error"):
        error = error["error"]
    return error


def _describe_error(error: Any) -> tuple[str, str]:
    """Return the message of an error, and its type and codes as one string."""
    if isinstance(error, str):
        return error, ""
    if not isinstance(error, dict):
        return "", ""
    message = next((error[name] for name in ("message", "detail", "msg") if isinstance(error.get(name), str)), "")
    inner = error.get("innererror")
    kinds = [error.get("type"), error.get("code"), inner.get("code") if isinstance(inner, dict) else None]
    return message, " ".join(kind for kind in kinds if isinstance(kind, str))


def _one_line(status: str, message: str, request: Request) -> str:
    """Return the status and the server's message as one line, without the message if it repeats the prompt."""
    message = " ".join("".join(c if c.isprintable() else " " for c in message).split())[:_MESSAGE]
    if not message:
        return status
    prompts = [m.content for m in request.messages] if request.messages is not None else [request.text or ""]
    if any(_shares_a_piece(message, " ".join(prompt.split())) for prompt in prompts):
        return f"{status}: the server's message repeats the prompt"
    return f"{status}: {_clean(message)}"


def _shares_a_piece(message: str, prompt: str) -> bool:
    length = min(_PIECE, len(prompt))
    if not length:
        return False
    message, prompt = message.lower(), prompt.lower()
    return any(message[start : start + length] in prompt for start in range(len(message) - length + 1))


def _clean(text: Any) -> str | None:
    """Return text without halves of surrogate pairs, which UTF-8 cannot hold; None for anything but a string."""
    if not isinstance(text, str):
        return None
    return text.encode("utf-8", "surrogatepass").decode("utf-8", "replace")


def _first(items: Any) -> Any:
    return items[0] if isinstance(items, list) and items else None
