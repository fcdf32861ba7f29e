"""Reads the templates of what models are asked in data construction: Jinja turns in YAML, rendered in a sandbox.

A file in ``saro/synth/prompt_templates`` has these keys:

    variables         names that ``render`` must be given, one by one used in the turns
    turns             a list of {role, content}; each content is a Jinja template

A template may also use ``nonce``, which follows from the variables: no text among them can hold it, so none can close a
fence that is made with it.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import jinja2
import jinja2.meta
from jinja2.sandbox import ImmutableSandboxedEnvironment

from saro.data.jsonl import fault, shown
from saro.data.messages import ROLES, Message
from saro.data.yaml_files import check_keys, read_yaml
from saro.errors import SaroError, nearest

_FOLDER = Path(__file__).with_name("prompt_templates")
# Immutable: a template must not change what the next one sees. Lines of tags alone leave no empty lines behind.
_JINJA = ImmutableSandboxedEnvironment(
    undefined=jinja2.StrictUndefined, keep_trailing_newline=True, trim_blocks=True, lstrip_blocks=True
)


@dataclass(frozen=True)
class Template:
    """A request to a model, with gaps.

    Attributes:
        name: name of the file without the suffix.
        variables: what the gaps are called.
        turns: (role, Jinja template) of each turn.
    """

    name: str
    variables: tuple[str, ...]
    turns: tuple[tuple[str, str], ...]

    @cached_property
    def hash(self) -> str:
        """The sha256 of the turns; 64 hex digits."""
        return hashlib.sha256(json.dumps(self.turns).encode()).hexdigest()

    def render(self, **variables: Any) -> tuple[Message, ...]:
        """Return the turns with their gaps filled, without white space around each turn.

        Texts are put in as they are: nothing in them is executed.

        Args:
            variables: exactly those that the file names; strings, or lists of strings.

        Raises:
            TypeError: a variable is missing or unknown.
            SaroError: the template fails on these variables.
        """
        if set(variables) != set(self.variables):
            given, wanted = ", ".join(sorted(variables)), ", ".join(sorted(self.variables))
            raise TypeError(f"template {self.name} takes {wanted}; it was given {given}")
        content = json.dumps(variables, sort_keys=True)
        nonce = hashlib.sha256(content.encode()).hexdigest()[:16]
        try:
            return tuple(
                Message(role, _JINJA.from_string(text).render(variables, nonce=nonce).strip())
                for role, text in self.turns
            )
        except (jinja2.TemplateError, ArithmeticError, LookupError, TypeError, ValueError) as error:
            raise SaroError(f"template {self.name}: it cannot be rendered ({_one_line(error)}); fix it") from error


def shipped_templates() -> list[str]:
    """Return the names of the templates."""
    return sorted(file.stem for file in _FOLDER.glob("*.yaml"))


@cache
def read_template(name: str) -> Template:
    """Read a template by its name, one of ``shipped_templates``. ``policy`` is what ``SafetyPolicy.for_writer`` returns.

    - ``guided`` asks for short reasoning and an answer with the policy in view. Variables: request; policy, which may be
      empty; sentences, such as "2 to 3"; tags, the opening and the closing tag of the reasoning.
    - ``turn`` asks for one sentence that turns reasoning that has begun. Variables: request, reasoning, policy, and aim:
      "safety", or "help" to come back from needless caution.
    - ``neutral`` asks for one sentence that turns nowhere. Variables: request, reasoning.
    - ``steps`` asks a judge for a label of each step: {"step": 1, "label": "neutral"}, one a line. The labels are neutral,
      turn, cue and harmful. Variables: request, steps, policy.

    Raises SaroError if there is no such template, or if its file is not as described at the top of this module.
    """
    if name not in shipped_templates():
        fault("templates", f"there is none named {shown(name)}", nearest(name, shipped_templates()))
    return parse_template(_FOLDER / f"{name}.yaml")


def parse_template(path: Path) -> Template:
    """Read a template from its file. Raises SaroError that names the file."""
    where = str(path)
    content = read_yaml(path)
    check_keys(content, ("variables", "turns"), where, "the file")
    names = content["variables"]
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        fault(where, "variables is no list of names", "write for example [request, policy]")
    if not isinstance(content["turns"], list) or not content["turns"]:
        fault(where, "turns is no list, or an empty one", "give a list of {role, content}")
    turns, used = [], set()
    for number, turn in enumerate(content["turns"], start=1):
        check_keys(turn, ("role", "content"), f"{where}: turn {number}", "the turn")
        role, text = turn["role"], turn["content"]
        if role not in ROLES or not isinstance(text, str):
            fault(f"{where}: turn {number}", "has no valid role and text", f"a role is one of {', '.join(ROLES)}")
        try:
            used |= jinja2.meta.find_undeclared_variables(_JINJA.parse(text))
        except jinja2.TemplateError as error:
            fault(f"{where}: turn {number}", f"broken template ({_one_line(error)})", "fix it")
        turns.append((role, text))
    if wrong := sorted((used - {"nonce"}) ^ set(names)):
        fault(where, f"variables and turns do not agree on {shown(wrong[0])}", "name in variables what the turns use")
    return Template(path.stem, tuple(names), tuple(turns))


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
