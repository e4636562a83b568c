"""Finds modules whose weight other code reads by itself, instead of calling them.

A Kronecker layer has no dense weight to be read, so such a module cannot become one. The source of the methods tells:
`F.linear(x, self.qkv.weight)` reads the weight of `qkv`; its dtype and device may be read, a Kronecker layer has these.
What this cannot see (source that is not there, names made at run time) fails in the forward, on a shape.
"""

import ast
import inspect
import textwrap
from collections.abc import Iterator
from functools import cache
from types import CodeType, FunctionType
from typing import Any

from torch import nn
from transformers import PreTrainedModel

__all__ = ["weight_reader"]

# torch modules that read the weights of their linears, known without any source.
READERS = (nn.MultiheadAttention, nn.TransformerEncoderLayer)
# They set weights up; they do not compute with them.
SET_UP = ("__init__", "_init", "init_", "reset_", "tie_", "_tie")
HARMLESS_ATTRIBUTES = {"dtype", "device"}
HARMLESS_CALLS = {"isinstance", "to", "type_as"}


def weight_reader(model: nn.Module, name: str) -> str | None:
    """The class around a module that reads its weight, None if there is none."""
    parts = name.split(".")
    if isinstance(parent := model.get_submodule(".".join(parts[:-1])), READERS):
        return type(parent).__name__
    for depth in range(len(parts)):
        owner = model.get_submodule(".".join(parts[:depth]))
        if ".".join(parts[depth:]) in _paths_read_by(type(owner)):
            return type(owner).__name__
    return None


@cache
def _paths_read_by(kind: type[nn.Module]) -> frozenset[str]:
    """Paths from `self` to the modules whose weight the methods of a class read."""
    own = [base for base in kind.__mro__ if base not in PreTrainedModel.__mro__]
    methods = [(name, inspect.unwrap(value)) for base in own for name, value in vars(base).items() if callable(value)]
    return frozenset(
        path
        for name, method in methods
        if isinstance(method, FunctionType) and not name.startswith(SET_UP) and _mentions_weight(method.__code__)
        for path in _paths_read_in(method)
    )


def _mentions_weight(code: CodeType) -> bool:
    inner = (constant for constant in code.co_consts if isinstance(constant, CodeType))
    return "weight" in code.co_names or any(map(_mentions_weight, inner))


def _paths_read_in(method: FunctionType) -> Iterator[str]:
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(method)))
    except (OSError, SyntaxError):  # typed in a shell, made by exec, or a lambda within a line
        return
    harmless = {id(part) for node in ast.walk(tree) for part in _harmless_uses(node)}
    for node in ast.walk(tree):
        if (
            isinstance(node, ast.Attribute)
            and node.attr == "weight"
            and isinstance(node.ctx, ast.Load)
            and id(node) not in harmless
            and (path := _path_from_self(node.value))
        ):
            yield path


def _harmless_uses(node: ast.AST) -> list[Any]:
    """The direct parts of a node of which it takes no values."""
    if isinstance(node, ast.Attribute) and node.attr in HARMLESS_ATTRIBUTES:
        return [node.value]
    if isinstance(node, ast.Call):
        called = getattr(node.func, "attr", getattr(node.func, "id", None))
        return node.args[:1] if called in HARMLESS_CALLS else []
    return []


def _path_from_self(node: ast.AST) -> str:
    names: list[str] = []
    while isinstance(node, ast.Attribute):
        names.append(node.attr)
        node = node.value
    return ".".join(reversed(names)) if isinstance(node, ast.Name) and node.id == "self" else ""
