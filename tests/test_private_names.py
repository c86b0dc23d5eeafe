"""Nothing in the package or the tools leans on a name that a library keeps to itself: it may change
with any release.
"""

import argparse
import ast
import importlib
import inspect
import pkgutil
import types
from pathlib import Path

import pytest

import course_lib

ROOT = Path(__file__).parents[1]
FILES = [
    path
    for folder in ("course_lib", "tools", "data/recipes")
    for path in sorted((ROOT / folder).rglob("*.py"))
]


def is_private(name):
    return name.startswith("_") and not (name.startswith("__") and name.endswith("__"))


def foreign_private_names(source):
    """Private names that are used in `source` and not defined there, as "line: name"."""
    tree = ast.parse(source)
    ours = {
        node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.ClassDef)
    }
    ours |= {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)
    }
    ours |= {
        node.id
        for node in ast.walk(tree)
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)
    }
    standard = {"os"}  # os._exit is documented
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and is_private(node.attr):
            owner = node.value.id if isinstance(node.value, ast.Name) else ""
            assigned_to_another = isinstance(node.ctx, ast.Store) and owner != "self"
            if owner not in standard and (node.attr not in ours or assigned_to_another):
                found.append(f"{node.lineno}: {node.attr}")
        elif isinstance(node, ast.ImportFrom) and not (node.module or "").startswith("course_lib"):
            names = [*(node.module or "").split("."), *(alias.name for alias in node.names)]
            found += [f"{node.lineno}: {name}" for name in names if is_private(name)]
        elif (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Name)
            and node.func.id in ("getattr", "setattr", "hasattr")
        ):
            name = node.args[1]
            if isinstance(name, ast.Constant) and is_private(str(name.value)):
                found.append(f"{node.lineno}: {name.value}")
    return found


def overridden_private_methods(module):
    """Private methods of its classes that a base of another package has, too."""
    classes = [
        cls
        for _, cls in inspect.getmembers(module, inspect.isclass)
        if cls.__module__ == module.__name__
    ]
    foreign = {
        cls: [base for base in cls.__mro__[1:] if not base.__module__.startswith("course_lib")]
        for cls in classes
    }
    return [
        f"{cls.__name__}.{name}"
        for cls, bases in foreign.items()
        for name, value in vars(cls).items()
        # torch.autograd.Function gives each subclass a class `_backward_cls`
        if is_private(name) and not inspect.isclass(value)
        if any(name in vars(base) for base in bases)
    ]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_no_private_name_of_a_library_is_used(path):
    assert foreign_private_names(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    "module", [info.name for info in pkgutil.walk_packages(course_lib.__path__, "course_lib.")]
)
def test_no_private_method_of_a_library_is_overridden(module):
    assert overridden_private_methods(importlib.import_module(module)) == []


def test_an_overridden_private_method_is_found():
    class Loader(argparse.ArgumentParser):
        def _get_formatter(self):
            return None

    Loader.__module__ = "planted"
    planted = types.ModuleType("planted")
    planted.Loader = Loader
    assert overridden_private_methods(planted) == ["Loader._get_formatter"]


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("model._modules.values()", ["1: _modules"]),
        ("block._gradient_checkpointing_func = f", ["1: _gradient_checkpointing_func"]),
        ("class T(Trainer):\n    def f(self):\n        return self._load()", ["3: _load"]),
        ("from torch._dynamo import config", ["1: _dynamo"]),
        ("from torch import _C", ["1: _C"]),
        ("getattr(model, '_hf_hook')", ["1: _hf_hook"]),
        ("class T:\n    def f(self):\n        self._x = 1\n        return self._x", []),
        ("def _f(): pass\n_f()\nmodel.__class__", []),
    ],
)
def test_a_planted_private_name_is_found(source, found):
    assert foreign_private_names(source) == found
