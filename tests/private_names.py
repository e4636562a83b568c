"""What kron_hf touches of other libraries that they do not document: the table, and a search of the sources for it.

A new private name needs a row here, one file that alone touches it, and a test in `test_private_attributes.py`.
"""

import ast
import importlib
import platform
from collections.abc import Callable, Iterator
from functools import wraps
from importlib.metadata import version
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "kron_hf"

# Private names: the one file that touches each.
PRIVATE = {
    "_AutoDispatchBelowAutograd": "ops/operator.py",
    "_C": "ops/operator.py",
    "_from_config": "model.py",
    "_is_hf_initialized": "checkpoint.py",
    "_is_quantized": "checkpoint.py",
    "_weight_conversions": "checkpoint.py",
}
# Names that look public, but that no documentation promises.
UNDOCUMENTED = {
    "ExportableState": "callbacks.py",
    "MODEL_MAPPING": "model.py",
    "check_target_module_exists": "targets.py",
    "fusion_config": "checkpoint.py",
    "get_pattern_key": "targets.py",
    "hf_quantizer": "checkpoint.py",
    "optimizer_cls_and_kwargs": "trainer.py",
    "stateful_callbacks": "callbacks.py",
    "update_attn_implementation": "checkpoint.py",
}
# Private methods that a class here overrides, by the base class that calls them.
OVERRIDDEN = {
    "_apply": "torch.nn.Module",
    "_load_from_state_dict": "torch.nn.Module",
    "_save_to_state_dict": "torch.nn.Module",
    "_process_model_after_weight_loading": "transformers.quantizers.HfQuantizer",
    "_process_model_before_weight_loading": "transformers.quantizers.HfQuantizer",
}
# Meant to be used in spite of the underscore: of named tuples; of evaluate's modules, by those who write one.
DOCUMENTED = {"_replace", "_compute", "_info"}

TESTED: set[str] = set()


def relies_on(library: str, *names: str) -> Callable[[Callable], Callable]:
    """Marks the test of such names; failing, it says which version of the library broke what its docstring says."""
    TESTED.update(names)

    def decorate(test: Callable) -> Callable:
        @wraps(test)
        def run(*args, **kwargs):
            try:
                test(*args, **kwargs)
            except Exception as error:
                found = platform.python_version() if library == "python" else version(library)
                raise AssertionError(f"{library} {found} broke what kron_hf relies on: {test.__doc__}") from error

        return run

    return decorate


def files_with(name: str) -> set[str]:
    """The files of the package that use a name: as an attribute, import, variable, method or string."""
    return {file for file, tree in _trees() if name in _all_names(tree)}


def foreign_private_names() -> set[str]:
    """Private names that the package uses, but does not define itself."""
    used = {name for _, tree in _trees() for name in _used_names(tree) if _is_private(name)}
    defined = {name for _, tree in _trees() for name in _defined_names(tree)}
    return used - defined - DOCUMENTED


def overridden_private_methods() -> dict[str, type]:
    """Private methods of classes here that a base class from elsewhere has, too: `{method: base class}`."""
    defined = {name for _, tree in _trees() for name in _defined_names(tree) if _is_private(name)} - DOCUMENTED
    return {
        name: base
        for cls in _classes()
        for base in cls.__mro__[-2:0:-1]  # the nearest last: it is the one that stays
        if not base.__module__.startswith("kron_hf")
        for name in vars(cls).keys() & vars(base).keys() & defined
    }


def class_at(path: str) -> type:
    """The class that a dotted path names."""
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)


def _trees() -> Iterator[tuple[str, ast.Module]]:
    for path in sorted(PACKAGE.rglob("*.py")):
        yield path.relative_to(PACKAGE).as_posix(), ast.parse(path.read_text())


def _classes() -> Iterator[type]:
    for file, tree in _trees():
        dotted = ["kron_hf", *file.removesuffix(".py").split("/")]
        module = (
            importlib.import_module(".".join(dotted).removesuffix(".__init__")) if "__main__" not in dotted else None
        )
        yield from (getattr(module, node.name) for node in tree.body if isinstance(node, ast.ClassDef))


def _is_private(name: str) -> bool:
    return name.startswith("_") and name.strip("_") != "" and not (name.startswith("__") and name.endswith("__"))


def _used_names(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            yield node.attr
        elif isinstance(node, ast.ImportFrom):
            yield from (node.module or "").split(".")
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (part for alias in node.names for part in alias.name.split("."))
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id.endswith("attr"):
            yield from (arg.value for arg in node.args[1:2] if isinstance(arg, ast.Constant))


def _defined_names(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and isinstance(node.value, ast.Name):
            if node.value.id in ("self", "cls"):
                yield node.attr
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            yield node.target.id


def _all_names(tree: ast.Module) -> set[str]:
    strings = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    return {*_used_names(tree), *_defined_names(tree), *strings}
