"""Read YAML files strictly: attacks, judges, policies and templates."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from saro.data.jsonl import decode, fault, open_data, shown, type_name
from saro.errors import nearest


class _StrictLoader(yaml.SafeLoader):
    """Loads YAML, and refuses a mapping with the same key twice, of which PyYAML would drop one."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: list[Any] = []
        for key, _ in node.value:
            if key.value in seen:
                raise yaml.MarkedYAMLError(problem="a key is given twice", problem_mark=key.start_mark)
            seen.append(key.value)
        return super().construct_mapping(node, deep)


def read_yaml(path: Path) -> Any:
    """Return the content of a YAML file.

    Raises SaroError that names file and line if it cannot be read, is no YAML, or has a key twice.
    """
    with open_data(path) as file:
        text = decode(file.read(), str(path))
    try:
        return yaml.load(text, _StrictLoader)
    except yaml.MarkedYAMLError as error:
        line = f":{error.problem_mark.line + 1}" if error.problem_mark else ""
        fault(f"{path}{line}", f"broken YAML ({error.problem})", "fix it there")
    except (yaml.YAMLError, ValueError, RecursionError):
        fault(str(path), "broken YAML", "check how it was written")


def check_keys(value: Any, keys: Sequence[str], where: str, name: str, required: Sequence[str] | None = None) -> None:
    """Raise SaroError at ``where`` unless a value is a mapping with these keys and no others.

    Args:
        name: what the value is, for the error message.
        required: keys that it must have; default all.
    """
    if not isinstance(value, dict):
        fault(where, f"{name} is {type_name(value)}", f"write {', '.join(keys)}, each with its value")
    for key in value:
        if key not in keys:
            fault(where, f"{name} has an unknown key {shown(str(key))}", nearest(str(key), keys))
    for key in keys if required is None else required:
        if key not in value:
            fault(where, f"{name} has no {key}", "add it")
