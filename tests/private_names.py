"""What kron_hf touches of other libraries that they do not document: the table, and a search of the sources for it.

A new private name needs a row here, one file that alone touches it, and a test in `test_private_attributes.py`.
"""

import ast
import importlib
import platform
from collections.abc import Callable, Iterator
from functools import cache, wraps
from importlib.metadata import version
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "kron_hf"

# Private names: the one file that touches each.
PRIVATE = {
    # torch
    "_AutoDispatchBelowAutograd": "ops/autograd_state.py",
    "_C": "ops/autograd_state.py",
    "_are_functorch_transforms_active": "ops/autograd_state.py",
    "_current_level": "ops/autograd_state.py",
    "_linear_pointwise": "ops/gemm.py",
    "_parameters": "peft_tuner/stored.py",
    "_schema": "ops/gemm.py",
    "_version": "ops/folded.py",
    # transformers
    "_from_config": "model.py",
    "_hf_peft_config_loaded": "peft_tuner/model.py",
    "_is_hf_initialized": "checkpoint/hook.py",
    "_is_quantized": "checkpoint/hook.py",
    "_weight_conversions": "checkpoint/tensor_names.py",
    # peft
    "_mark_only_adapters_as_trainable": "peft_tuner/model.py",
    "_remove_adapter_name_from_key": "peft_tuner/model.py",
    # Python's enum
    "_member_map_": "peft_type.py",
    "_member_names_": "peft_type.py",
    "_name_": "peft_type.py",
    "_sort_order_": "peft_type.py",
    "_value2member_map_": "peft_type.py",
    "_value_": "peft_type.py",
}
# Names that look public, or that are looked up by name on our classes, and that no documentation promises.
UNDOCUMENTED = {
    "ConversionOps": "checkpoint/compact.py",
    "ExportableState": "callbacks.py",
    "MODEL_MAPPING": "model.py",
    "PEFT_TYPE_TO_CONFIG_MAPPING": "peft_tuner/__init__.py",
    "WeightConverter": "checkpoint/compact.py",
    "_enable_peft_forward_hooks": "peft_tuner/model.py",
    "can_return_loss": "trainer/distilling.py",
    "check_target_module_exists": "targets.py",
    "current_gradient_accumulation_steps": "trainer/distilling.py",
    "fusion_config": "checkpoint/hook.py",
    "get_weight_conversions": "checkpoint/hook.py",
    "get_pattern_key": "targets.py",
    "hf_quantizer": "checkpoint/hook.py",
    "httpx": "hub.py",
    "optimizer_cls_and_kwargs": "trainer/kron_trainer.py",
    "register_peft_method": "peft_tuner/__init__.py",
    "set_additional_trainable_modules": "peft_tuner/model.py",
    "stateful_callbacks": "callbacks.py",
    "unload_and_optionally_merge_module": "peft_tuner/layer.py",
    "update_attn_implementation": "checkpoint/hook.py",
}
# Private methods that a class here overrides, by the base class that calls them.
OVERRIDDEN = {
    "_apply": "torch.nn.Module",
    "_load_from_state_dict": "torch.nn.Module",
    "_save_to_state_dict": "torch.nn.Module",
    "_process_model_after_weight_loading": "transformers.quantizers.HfQuantizer",
    "_process_model_before_weight_loading": "transformers.quantizers.HfQuantizer",
    **dict.fromkeys(["_determine_best_metric", "_finalize_training", "_get_output_dir"], "transformers.Trainer"),
    **dict.fromkeys(["_push_from_checkpoint", "_run_epoch", "_save", "_save_checkpoint"], "transformers.Trainer"),
    "_cast_adapter_dtype": "peft.tuners.tuners_utils.BaseTuner",
    "_create_and_replace": "peft.tuners.tuners_utils.BaseTuner",
    "_remap_adapter_state_dict_for_load": "peft.tuners.tuners_utils.BaseTuner",
    "_replace_module": "peft.tuners.tuners_utils.BaseTuner",
    "_format_action_invocation": "argparse.HelpFormatter",
    "_format_args": "argparse.HelpFormatter",
    "_get_help_string": "argparse.HelpFormatter",
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
    """The files of the package that use a name: as an attribute, import, method or string."""
    return {file for file, tree in _trees() if name in _all_names(tree)}


def foreign_private_names() -> set[str]:
    """Private names that the package uses, but none of its classes defines."""
    used = {name for _, tree in _trees() for name in _used_names(tree) if _is_private(name)}
    return used - {name for _, tree in _trees() for name in _members(tree)} - DOCUMENTED


def overridden_private_methods() -> dict[str, type]:
    """Private methods of classes here that a base class from elsewhere has, too: `{method: base class}`."""
    defined = {name for _, tree in _trees() for name in _methods(tree) if _is_private(name)} - DOCUMENTED
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


@cache
def _trees() -> list[tuple[str, ast.Module]]:
    paths = sorted(PACKAGE.rglob("*.py"))
    return [(path.relative_to(PACKAGE).as_posix(), ast.parse(path.read_text())) for path in paths]


def _classes() -> Iterator[type]:
    for file, tree in _trees():
        names = [node.name for node in tree.body if isinstance(node, ast.ClassDef)]
        if names:  # without importing __main__, which would run
            module = importlib.import_module(f"kron_hf.{file.removesuffix('.py').replace('/', '.')}")
            yield from (getattr(module, name) for name in names)


def _is_private(name: str) -> bool:
    return name.startswith("_") and name.strip("_") != "" and not (name.startswith("__") and name.endswith("__"))


def _used_names(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            yield node.attr
        elif isinstance(node, ast.ImportFrom) and not (node.module or "").startswith("kron_hf"):
            yield from (node.module or "").split(".")
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (part for alias in node.names for part in alias.name.split("."))
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id.endswith("attr"):
            yield from (arg.value for arg in node.args[1:2] if isinstance(arg, ast.Constant))


def _methods(tree: ast.Module) -> set[str]:
    classes = [node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
    return {node.name for cls in classes for node in cls.body if isinstance(node, ast.FunctionDef)}


def _members(tree: ast.Module) -> set[str]:
    """Methods and attributes of the classes of a file."""
    nodes = list(ast.walk(tree))
    stored = [node for node in nodes if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)]
    own = {node.attr for node in stored if isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")}
    bodies = [item for node in nodes if isinstance(node, ast.ClassDef) for item in node.body]
    targets = [item.target for item in bodies if isinstance(item, ast.AnnAssign)]
    targets += [target for item in bodies if isinstance(item, ast.Assign) for target in item.targets]
    return _methods(tree) | own | {target.id for target in targets if isinstance(target, ast.Name)}


@cache
def _all_names(tree: ast.Module) -> set[str]:
    constants = [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)]
    return {*_used_names(tree), *_methods(tree), *(value for value in constants if isinstance(value, str))}
