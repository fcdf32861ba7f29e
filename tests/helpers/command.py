"""The command `saro`, run in the test's own process."""

from __future__ import annotations

import sys

import pytest

from saro.cli import main


def run_saro(monkeypatch, capsys, *arguments: str) -> tuple[int, str, str]:
    """Run the command; return its exit code, stdout and stderr."""
    monkeypatch.setattr(sys, "argv", ["saro", *arguments])
    capsys.readouterr()  # drop what fixtures have printed
    with pytest.raises(SystemExit) as stop:
        main()
    out, err = capsys.readouterr()
    return stop.value.code or 0, out, err
