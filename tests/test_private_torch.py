"""What kron_hf takes for granted of torch, and of Python's own modules."""

import argparse
import enum
import inspect

import pytest
import torch
from private_names import relies_on
from torch import nn
from torch.autograd import forward_ad


@relies_on("torch", "_C", "_AutoDispatchBelowAutograd")
def test_dispatch_below_autograd():
    """Under torch._C._AutoDispatchBelowAutograd() operators build no graph, and after it they do again."""
    x = torch.ones(2, requires_grad=True)
    with torch._C._AutoDispatchBelowAutograd():
        assert torch.ops.aten.mul.Tensor(x, x).grad_fn is None
    assert torch.ops.aten.mul.Tensor(x, x).grad_fn is not None


@relies_on("torch", "_are_functorch_transforms_active", "_current_level")
def test_transforms_are_noticed():
    """These two tell of transforms of torch.func, and of forward-mode derivatives, while they are under way."""
    seen = []

    def function(x):
        seen.append((torch._C._are_functorch_transforms_active(), forward_ad._current_level >= 0))
        return x.sum()

    x = torch.ones(2)
    function(x)
    torch.func.grad(function)(x)
    torch.func.jvp(function, (x,), (x,))
    with forward_ad.dual_level():
        function(x)
    function(x)
    assert seen == [(False, False), (True, False), (True, True), (False, True), (False, False)]


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch was built without oneDNN")
@relies_on("torch", "_linear_pointwise", "_schema")
def test_linear_by_onednn():
    """torch.ops.mkldnn._linear_pointwise computes what F.linear does, and its _schema names these arguments."""
    operator = torch.ops.mkldnn._linear_pointwise.default
    assert str(operator._schema) == (
        "mkldnn::_linear_pointwise(Tensor X, Tensor W, Tensor? B, str attr, Scalar?[] scalars, str? algorithm) "
        "-> Tensor Y"
    )
    x, weight, bias = torch.randn(5, 4), torch.randn(4, 3).T, torch.randn(3)
    found = operator(x, weight, bias, "none", [], "")
    torch.testing.assert_close(found, nn.functional.linear(x, weight, bias))


@relies_on("torch", "_version")
def test_tensor_version():
    """A tensor's _version grows with every write into it, of an optimizer, too, and not with reads."""
    parameter = nn.Parameter(torch.ones(2))
    before = parameter._version
    parameter.sum().backward()
    assert parameter._version == before
    torch.optim.SGD([parameter], lr=0.1).step()
    assert parameter._version > before


class Recorder(nn.Linear):
    """A linear that notes which of the overridden methods torch called, and with what."""

    def __init__(self):
        super().__init__(2, 2)
        self.calls = {}

    def _apply(self, fn, recurse=True):
        self.calls["_apply"] = (fn, recurse)
        return super()._apply(fn, recurse)

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        self.calls["_save_to_state_dict"] = (destination, prefix, keep_vars)
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs):
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        self.calls["_load_from_state_dict"] = (state_dict, prefix, args, kwargs)


@relies_on("torch", "_apply")
def test_module_apply():
    """nn.Module moves and casts a layer through its _apply(fn, recurse), whose fn maps any tensor."""
    model = nn.Sequential(Recorder())
    model.to(torch.float64)
    fn, recurse = model[0].calls["_apply"]
    assert recurse is True
    assert fn(torch.ones(2, dtype=torch.bool)).dtype == torch.bool
    assert model[0].weight.dtype == torch.float64


@relies_on("torch", "_save_to_state_dict")
def test_module_save_to_state_dict():
    """nn.Module.state_dict calls every layer's _save_to_state_dict(destination, prefix, keep_vars)."""
    model = nn.Sequential(Recorder())
    state = model.state_dict()
    destination, prefix, keep_vars = model[0].calls["_save_to_state_dict"]
    assert destination is state
    assert (prefix, keep_vars) == ("0.", False)


@relies_on("torch", "_load_from_state_dict")
def test_module_load_from_state_dict():
    """load_state_dict calls every layer's _load_from_state_dict, whose fifth argument lists the missing keys."""
    model = nn.Sequential(Recorder())
    state = {key: value for key, value in model.state_dict().items() if key != "0.bias"}
    missing = model.load_state_dict(state, strict=False).missing_keys
    _, prefix, args, kwargs = model[0].calls["_load_from_state_dict"]
    assert prefix == "0."
    assert args[2] == missing == ["0.bias"]
    assert not kwargs
    names = list(inspect.signature(nn.Module._load_from_state_dict).parameters)
    assert names.index("missing_keys") == 5


@relies_on("torch", "_parameters")
def test_module_parameters():
    """nn.Module keeps its parameters by name in _parameters, whichever way they are set."""
    linear = nn.Linear(2, 2)
    assert list(linear._parameters) == ["weight", "bias"]
    linear.bias = new = nn.Parameter(torch.zeros(2))
    assert linear._parameters["bias"] is new


@relies_on("python", "_member_map_", "_member_names_", "_value2member_map_", "_name_", "_value_", "_sort_order_")
def test_enum_internals():
    """An enum finds its members in _member_map_, _value2member_map_ and _member_names_."""

    class Colour(str, enum.Enum):  # noqa: UP042  # as peft's PeftType
        RED = "red"
        BLUE = "blue"

    assert Colour._member_names_ == ["RED", "BLUE"]
    assert Colour._member_map_ == {"RED": Colour.RED, "BLUE": Colour.BLUE}
    assert Colour._value2member_map_ == {"red": Colour.RED, "blue": Colour.BLUE}
    assert (Colour.BLUE._name_, Colour.BLUE._value_, Colour.BLUE._sort_order_) == ("BLUE", "blue", 1)


class Formatter(argparse.HelpFormatter):
    def _format_args(self, action, default_metavar):
        return "ARGS"

    def _get_help_string(self, action):
        return "told"

    def _format_action_invocation(self, action):
        return f"{action.dest}: {self._format_args(action, 'x')}"


@relies_on("python", "_format_args", "_get_help_string", "_format_action_invocation")
def test_help_formatter():
    """argparse shows an option by _format_action_invocation and _get_help_string, its values by _format_args."""
    parser = argparse.ArgumentParser(prog="p", formatter_class=Formatter, add_help=False)
    parser.add_argument("--size", help="untold")
    usage, line = parser.format_help().splitlines()[::3][:2]
    assert usage == "usage: p [--size ARGS]"
    assert line.split() == ["size:", "ARGS", "told"]
