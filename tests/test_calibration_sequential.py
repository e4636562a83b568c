"""Layers fitted in order, against a naive version that keeps every activation and solves for each weight directly."""

import pytest
import tiny_calibration as tiny
import torch
from torch import nn

from kron_hf import KronConfig, KronLinear
from kron_hf.calibration.batches import Batches
from kron_hf.calibration.dense_walk import walk_dense
from kron_hf.calibration.fitted_layer import fitted_factors, fitted_layer
from kron_hf.calibration.passes import run, swapped
from kron_hf.calibration.route import find_route
from kron_hf.calibration.sequential import calibrate_in_order
from kron_hf.calibration.streams import find_streams
from kron_hf.calibration.token_weights import first_token_weights
from kron_hf.targets import find_targets

RIDGE = 1e-12


def names_of(model):
    return [target.name for target in find_targets(model, KronConfig(block_size=(1, -1), rank=1), compare_cost=False)]


def fit(problem, block_size, rank, **options):
    a, b = fitted_factors(problem, block_size, rank, **options)
    return fitted_layer(problem, torch.ones_like(a[0]), a, b)


def converted(model, data, ranks, *, residual=True, token_weights=None, keeps=True):
    """Low-rank layers of ranks that the end of each name says; others stay as they are."""
    batches = Batches(data)
    layers, problems = {}, {}

    def fitting(problem):
        problems[problem.name] = problem
        rank = next((rank for ending, rank in ranks.items() if problem.name.endswith(ending)), None)
        if rank is None:
            return None
        layers[problem.name], _ = fit(problem, (1, problem.linear.in_features), rank, ridge=RIDGE)
        return layers[problem.name]

    first = next(iter(batches))
    route = find_route(model, names_of(model), first)
    streams = find_streams(model, route, first) if residual else None
    if not keeps:
        route = type(route)(route.blocks, in_turn=False)
    order = list(calibrate_in_order(model, route, batches, fitting, streams=streams, token_weights=token_weights))
    return layers, problems, order


def activations(model, data, modules):
    """Inputs and outputs of modules on all data, `[examples, tokens, features]`."""
    inputs, outputs = ({name: [] for name in modules} for _ in range(2))

    def keeping(name):
        def hook(module, args, output):
            inputs[name].append(args[0])
            outputs[name].append(output[0] if isinstance(output, tuple) else output)

        return hook

    handles = [model.get_submodule(name).register_forward_hook(keeping(name)) for name in modules]
    for batch in data:
        run(model, batch)
    for handle in handles:
        handle.remove()
    return [{name: torch.cat(parts) for name, parts in kept.items()} for kept in (inputs, outputs)]


def least_squares(x, t, weights=None):
    """The weight and bias that give t for x, each row counted `weights` times."""
    x, t = x.flatten(0, -2).double(), t.flatten(0, -2).double()
    rows = torch.cat((x, torch.ones_like(x[:, :1])), 1)
    root = 1.0 if weights is None else weights.flatten().double().sqrt()[:, None]
    solution = torch.linalg.lstsq(rows * root, t * root, rcond=1e-9, driver="gelsd").solution
    return solution[:-1].T, solution[-1]


@pytest.mark.parametrize(
    ("keeps", "memory"),
    [
        pytest.param(True, 2**31, id="from the last block"),
        pytest.param(True, 160 * 17 * 32 * 4, id="a pass for each stage"),
        pytest.param(False, 2**31, id="from the inputs"),
    ],
)
def test_each_layer_solves_the_problem_that_the_layers_before_leave_it(monkeypatch, keeps, memory):
    monkeypatch.setattr("kron_hf.calibration.dense_targets.MEMORY", memory)
    model, data = tiny.dinov2().double(), [{"pixel_values": tiny.pixels(160).double()[i::2]} for i in range(2)]
    # Narrow q, k, v and fc1 do damage; o and fc2 of full rank have a solution that can be computed directly.
    ranks = {"q_proj": 2, "k_proj": 2, "v_proj": 4, "fc1": 8, "o_proj": 32, "fc2": 32}
    layers, _, order = converted(model, data, ranks, keeps=keeps)
    assert order == names_of(model)
    for number in range(2):
        block = f"encoder.layer.{number}"
        writers = [("attention.o_proj", "norm2", "layer_scale1"), ("mlp.fc2", "", "layer_scale2")]
        for writer, site, scale in writers:
            name = f"{block}.{writer}"
            ahead = {earlier: layers[earlier] for earlier in order[: order.index(name)]}
            place = f"{block}.{site}".rstrip(".")
            wanted_in, wanted_out = activations(model, data, [place])
            with swapped(model, ahead):
                x, y = activations(model, data, [name, place])
            stream = (wanted_in if site else wanted_out)[place]
            present = (x if site else y)[place]
            lambda1 = model.get_submodule(f"{block}.{scale}").lambda1
            target = y[name] + (stream - present) / lambda1
            weight, bias = least_squares(x[name], target)
            # Some directions the inputs do not have, so the weights may differ where the outputs do not.
            solution = nn.functional.linear(x[name], weight, bias)
            assert (target - solution).square().mean() < (target - y[name]).square().mean()
            torch.testing.assert_close(layers[name](x[name]), solution, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("memory", [2**31, 0], ids=["collected", "a pass for each stage"])
def test_a_block_of_the_dense_model_is_run_once_if_its_outputs_fit_into_memory(monkeypatch, memory):
    monkeypatch.setattr("kron_hf.calibration.dense_targets.MEMORY", memory)
    model, data = tiny.vit(), tiny.image_batches()
    calls = []
    model.vit.layers[0].mlp.fc1.register_forward_hook(lambda *args: calls.append(args))
    few = 2 * len(data)  # converted: for the targets of fc2, and to the end of the block
    converted(model, data, {})
    probing, calls[:] = len(calls), []
    assert probing > few
    monkeypatch.setattr("kron_hf.calibration.dense_targets.MEMORY", 2**31 - memory)
    converted(model, data, {})
    # Otherwise the dense model, too, has passes for fc1, for fc2 and to the end of the block.
    assert abs(len(calls) - probing) == 2 * len(data)


def test_without_streams_the_targets_are_the_outputs_of_the_dense_model():
    model, data = tiny.vit().double(), [{"pixel_values": tiny.pixels(160).double()}]
    layers, _, _ = converted(model, data, {"q_proj": 2, "fc1": 4, "fc2": 32}, residual=False)
    name = "vit.layers.1.mlp.fc2"
    _, wanted = activations(model, data, [name])
    with swapped(model, {other: layer for other, layer in layers.items() if other != name}):
        x, _ = activations(model, data, [name])
    weight, bias = least_squares(x[name], wanted[name])
    solution = nn.functional.linear(x[name], weight, bias)
    torch.testing.assert_close(layers[name](x[name]), solution, rtol=1e-4, atol=1e-4)


def test_token_weights_count_rows_and_padding_does_not_count():
    model, data = tiny.bert().double(), tiny.text_batches(80, 80)
    name = "bert.encoder.layer.0.attention.self.query"
    token_weights = {name: first_token_weights(11.0, 2.0)}
    layers, _, _ = converted(model, data, {"query": 32}, token_weights=token_weights)
    weights = data[0]["attention_mask"].clone().double()
    weights[:, 0] = 5.5
    x, y = activations(model, data, [name])
    problem = converted(model, data, {}, token_weights=token_weights)[1][name]
    rows = x[name].flatten(0, 1)
    mean = (weights.flatten()[:, None] * rows).sum(0) / weights.sum()
    torch.testing.assert_close(problem.covariances.mean_x, mean)
    assert problem.covariances.rows == int(data[0]["attention_mask"].sum())
    torch.testing.assert_close(layers[name](x[name]), y[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("build", [tiny.vit, tiny.dinov2, tiny.swin], ids=["ViT", "DINOv2", "Swin"])
def test_full_rank_gives_the_dense_model_back(build):
    model, data = build().double(), [{"pixel_values": tiny.pixels(64).double()}]
    names, batches = names_of(model), Batches(data)
    layers = {}

    def fitting(problem):
        linear = problem.linear
        layers[problem.name], error = fit(
            problem, (1, linear.in_features), min(linear.in_features, linear.out_features), ridge=1e-12
        )
        assert error < 1e-6
        return layers[problem.name]

    route = find_route(model, names, data[0])
    assert set(calibrate_in_order(model, route, batches, fitting)) == set(names) == set(layers)
    wanted = run(model, data[0])[0]
    with swapped(model, layers):
        torch.testing.assert_close(run(model, data[0])[0], wanted, rtol=1e-4, atol=1e-4)


def test_a_caller_may_stop_at_any_layer_and_the_model_is_as_before():
    model = tiny.vit()
    model.train()
    model.vit.layers[0].eval()
    modes = {name: module.training for name, module in model.named_modules()}
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    batches = Batches(tiny.image_batches())
    route = find_route(model, names_of(model), next(iter(batches)))
    walk = calibrate_in_order(model, route, batches, lambda problem: KronLinear.like(problem.linear, 4, 1))
    for _, name in zip(range(5), walk, strict=False):
        assert {name: module.training for name, module in model.named_modules()} == modes
        assert type(model.get_submodule(name)) is nn.Linear
    walk.close()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, state[name])
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_the_fitted_layer_is_like_the_linear_and_its_error_is_the_measured_one():
    model, data = tiny.vit().to(torch.bfloat16), [{"pixel_values": tiny.pixels(32).bfloat16()}]
    model.vit.layers[0].mlp.fc1.weight.requires_grad_(False)
    _, problems, _ = converted(model, data, {})
    problem = problems["vit.layers.0.mlp.fc1"]
    layer, error = fit(problem, (4, 8), 2)
    assert layer.a.dtype == torch.bfloat16
    assert not layer.a.requires_grad
    assert layer.bias.requires_grad
    assert layer.dead_blocks is None
    x, y = activations(model, data, ["vit.layers.0.mlp.fc1"])
    x, y = (each["vit.layers.0.mlp.fc1"].flatten(0, 1).double() for each in (x, y))
    weight, bias = layer.dense_weight().double(), layer.bias.double()
    measured = (x @ weight.T + bias - y).square().sum() / (y - y.mean(0)).square().sum()
    assert error == pytest.approx(measured.item(), rel=2e-2)  # the bias is rounded to bfloat16


def test_a_linear_without_bias_is_fitted_with_its_mean():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8, bias=False), nn.Tanh(), nn.Linear(8, 2)).double()
    model.requires_grad_(False)
    x = torch.randn(200, 6, dtype=torch.float64) + 3
    problems = []
    route = find_route(model, ["0"], {"": x})
    list(calibrate_in_order(model, route, Batches([x]), problems.append))
    layer, error = fit(problems[0], (1, 6), 2, ridge=RIDGE)
    assert layer.bias is None
    y = model[0](x)
    assert error == pytest.approx(float((layer(x) - y).square().sum() / y.square().sum()), rel=1e-6)
    _, s, _ = torch.linalg.svd(y, full_matrices=False)  # the best approximation of rank 2 of the outputs
    assert error == pytest.approx(float(s[2:].square().sum() / s.square().sum()), rel=1e-4)


def test_a_layer_that_is_called_twice_is_fitted_to_both_calls():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x):
            return self.layer(torch.tanh(self.layer(x)) + 3)

    torch.manual_seed(0)
    model, x = Twice().double().requires_grad_(False), torch.randn(50, 4, dtype=torch.float64)
    problems = []
    route = find_route(model, ["layer"], {"": x})
    list(calibrate_in_order(model, route, Batches([x]), problems.append))
    (problem,) = problems
    assert problem.covariances.rows == 100
    torch.testing.assert_close(problem.covariances.mean_x, (x.mean(0) + (model.layer(x).tanh() + 3).mean(0)) / 2)
    both = list(walk_dense(model, route, Batches([x]), held_out=0.0))
    assert both[0].fitting.rows == 100
    torch.testing.assert_close(both[0].fitting.mean_x, problem.covariances.mean_x)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_activations_that_are_not_finite_name_the_layer(bad):
    model = tiny.vit()
    with torch.no_grad():
        model.vit.layers[1].layernorm_before.bias[0] = bad
    with pytest.raises(ValueError, match=r"vit\.layers\.1\.attention\.q_proj.*(NaN|infinite|finite)"):
        converted(model, tiny.image_batches(), {"q_proj": 2})
