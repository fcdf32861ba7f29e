"""The recipes read from top to bottom: one function, no cleverness, and nothing happens when they are imported."""

from __future__ import annotations

import ast
import os
import subprocess
import sys

import pytest
from run_files import ROOT

RECIPES = ("rw", "srpo")
each_recipe = pytest.mark.parametrize("recipe", RECIPES)


def tree(recipe: str) -> ast.Module:
    return ast.parse((ROOT / "recipes" / f"{recipe}.py").read_text())


@each_recipe
def test_a_recipe_is_one_function_with_one_callback(recipe):
    functions = [node.name for node in ast.walk(tree(recipe)) if isinstance(node, ast.FunctionDef | ast.Lambda)]
    assert functions == ["main", "heldout_metrics"]
    assert len(ast.unparse(tree(recipe)).splitlines()) < 150


@each_recipe
def test_no_argument_is_packed_only_to_be_splatted(recipe):
    calls = [node for node in ast.walk(tree(recipe)) if isinstance(node, ast.Call)]
    assert not [c for c in calls if any(isinstance(a, ast.Starred) for a in c.args)]
    assert not [c for c in calls if any(keyword.arg is None for keyword in c.keywords)]


@each_recipe
def test_no_statement_has_two_conditional_expressions(recipe):
    statements = [node for node in ast.walk(tree(recipe)) if isinstance(node, ast.Assign | ast.Return | ast.Expr)]
    assert all(sum(isinstance(n, ast.IfExp) for n in ast.walk(node)) < 2 for node in statements)


def test_importing_the_recipes_does_nothing():
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, 'recipes'); import {', '.join(RECIPES)}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PYTHONDONTWRITEBYTECODE": "1"},
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
