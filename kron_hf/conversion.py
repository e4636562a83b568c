"""`calibrate`: Kronecker layers that are fitted to what a trained model computes on data, without a gradient step."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from torch import nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from kron_hf.calibration.allocation import LayerChoices, allocate
from kron_hf.calibration.batches import Batch, SpreadBatches, few_examples
from kron_hf.calibration.decoder import DECODER_MASK, decoder_stages
from kron_hf.calibration.dense_walk import walk_dense
from kron_hf.calibration.fittings import Fitted, PlainFitting, PrunedFitting, SurveyingFitting, dead_blocks
from kron_hf.calibration.gradients import OutputGradients, output_gradients
from kron_hf.calibration.menu import Option, is_low_rank, kron_option, layer_menu
from kron_hf.calibration.menu_errors import layer_choices
from kron_hf.calibration.readout import reads_first_token_alone, token_count
from kron_hf.calibration.result import CalibratedLayer, CalibrationResult
from kron_hf.calibration.route import Route, find_route
from kron_hf.calibration.sequential import calibrate_in_order
from kron_hf.calibration.streams import find_streams
from kron_hf.calibration.token_weights import TokenWeights, first_token_weights, no_weights
from kron_hf.calibration_config import CalibrationConfig
from kron_hf.calibration_data import check_batch, model_batches
from kron_hf.checkpoint import attach_kron_config
from kron_hf.config import KronConfig
from kron_hf.evaluation_mode import evaluation
from kron_hf.kron_layer import KronLayer
from kron_hf.layers import KronLinear
from kron_hf.surgery import replace_modules
from kron_hf.targets import Target, find_targets, pretrained_parts

__all__ = ["Calibration", "budget_settings", "calibrate", "check_conversion", "install_layers"]

# What the config of the choice takes over from the one that asked for it.
KEPT = ("base_model_name_or_path", "revision", "task_type", "modules_to_save", "calibration_config")

ModelT = TypeVar("ModelT", bound=nn.Module)
COMPARED = 512  # examples that options are compared on: the ranking needs fewer than the fit
FAR = 3.0  # times the budget's share of a layer
BAR: dict[str, Any] = {"unit": "layer", "delay": 1.0, "leave": False}


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """Fitted layers, not yet in the model.

    Attributes:
        layers: The Kronecker layer of each module by its name.
        result: What was chosen and measured: a table, a picture, JSON.
        config: The `KronConfig` of the choice: given to `get_kron_model` with calibration data it fits layers of these
            sizes to a model in the same way. `dataclasses.replace` it with `init_weights="random"` and
            `calibration_config=None` for a model that is to be trained from scratch.
    """

    layers: Mapping[str, KronLinear]
    result: CalibrationResult
    config: KronConfig

    def convert(self, model: ModelT) -> ModelT:
        """Puts the layers into the model that they were fitted to, or a copy of it, in place, and returns it."""
        return install_layers(model, self.layers)


def install_layers(model: ModelT, layers: Mapping[str, nn.Module]) -> ModelT:
    """Puts layers in the place of modules, and says so in the configs that `from_pretrained` reads."""
    replace_modules(model, layers)
    for part in pretrained_parts(model).values():
        if any(isinstance(module, KronLayer) for module in part.modules()):
            attach_kron_config(part)
    return model


def calibrate(model: nn.Module, config: KronConfig, calibration_data: Any) -> Calibration:
    """Fits a Kronecker layer to every module that a config names; the model itself is left as it is.

    Layer by layer, in the order in which the model calls them: each is fitted by alternating least squares to give the
    outputs of the dense model for the inputs that it gets in the model converted so far. Projections that write the
    residual stream are fitted to mend what the stream lacks there, with the LayerScale that follows them. With a budget
    in the config (`target_params`, `target_flops`, `max_error`) block size and rank of each layer are chosen first, by
    how well each option fits on examples held out and by how much the model's features depend on the layer.

    Memory is taken for the second moments of one block at a time, and for the outputs of one block on all data (up to
    4 GiB for each of the two models, and 2 GiB for what its linears shall give). Nothing is random but what the data
    draws, and that is the same in every pass.

    Args:
        model: The trained model, on any device.
        config: What to convert, with one block size and rank or a budget; `config.calibration_config` has the details.
        calibration_data: A data set of examples, a `DataLoader`, or a list of batches, of the kind that the model will
            see in use: hundreds of images are enough. Labels are not used.

    Raises:
        ValueError: There is no data, a layer never sees any of it, activations are not finite, the budget cannot be
            met, or what `get_kron_model` refuses.
    """
    return _Calibrating(model, config, calibration_data).run()


class _Calibrating:
    def __init__(self, model: nn.Module, config: KronConfig, data: Any) -> None:
        self.model, self.config, self.options = model, config, _options(config)
        self.targets = check_conversion(model, config)
        self.batches = model_batches(model, data, self.options)
        with evaluation(model):
            first = next(iter(self.batches))
            check_batch(model, first)
            self.route = find_route(model, [target.name for target in self.targets], first)
            self.streams = find_streams(model, self.route, few_examples(first))
            self.first_token_alone = _first_token_alone(model, self.route, few_examples(first), self.options)
            self.gradients = self._gradients()
            decoding = decoder_stages(model, self.route, few_examples(first))
        self.token_weights: dict[str, TokenWeights] = {
            **{name: partial(no_weights, mask=DECODER_MASK) for name in decoding},
            **(_token_weights(self.route, self.gradients) if self.first_token_alone else {}),
        }

    def run(self) -> Calibration:
        choices = None if self.config.budget is None else self._measure()
        sizes = self._sizes(choices)
        fitted = self._fit(sizes)
        result = CalibrationResult(
            layers=tuple(_row(target, sizes[target.name], fitted, choices) for target in self.targets),
            settings=budget_settings(self.config),
        )
        kept = {name: getattr(self.config, name) for name in KEPT}
        config = KronConfig.from_modules(result.modules, init_weights="calibrated", **kept)
        return Calibration(layers=fitted.layers, result=result, config=config)

    def _gradients(self) -> dict[str, OutputGradients]:
        """How much the model's features depend on each layer; nothing, where neither weights nor a budget ask."""
        if self.config.budget is None and not self.first_token_alone:
            return {}
        features = self.model.base_model if isinstance(self.model, PreTrainedModel) else self.model
        assert isinstance(features, nn.Module)
        names = [target.name for target in self.targets]
        return output_gradients(
            self.model,
            names,
            SpreadBatches(self.batches, COMPARED),
            features=features,
            first_token_alone=self.first_token_alone,
        )

    def _measure(self) -> dict[str, LayerChoices]:
        """The errors of all options, on the dense model's inputs."""
        walk = walk_dense(
            self.model,
            self.route,
            SpreadBatches(self.batches, COMPARED),
            held_out=self.options.held_out,
            token_weights=self.token_weights,
        )
        found: dict[str, LayerChoices] = {}
        for inputs in tqdm(walk, total=len(self.targets), desc="Measuring options", **BAR):
            linear, stream = inputs.linear, self.streams.get(inputs.name)
            weights = None if stream is None else stream.scale.square()
            found[inputs.name] = layer_choices(
                inputs,
                _menu(linear, self.config),
                self.gradients[inputs.name].outputs,
                output_weights=weights,
                ridge=self.options.ridge,
            )
        return found

    def _sizes(self, choices: Mapping[str, LayerChoices] | None) -> dict[str, Option]:
        if choices is None:
            return {target.name: _option(target) for target in self.targets}
        chosen = _allocate([choices[target.name] for target in self.targets], self.config)
        if all(option.is_dense for option in chosen.values()):
            budget = self.config.budget or ""
            raise ValueError(
                f"{budget}={getattr(self.config, budget)} leaves every layer dense: nothing would be converted"
            )
        return chosen

    def _fit(self, sizes: Mapping[str, Option]) -> Fitted:
        given = {"sizes": sizes, "ridge": self.options.ridge, "sweeps": self.options.sweeps}
        if (target := self.options.target_sparsity) is None:
            return self._walk(PlainFitting(**given), "Calibrating")
        survey = self._walk(SurveyingFitting(**given), "Calibrating")
        return self._walk(PrunedFitting(**given, dead=dead_blocks(survey, target)), "Pruning blocks")

    def _walk(self, fitting: PlainFitting, what: str) -> Fitted:
        fitted = fitting.fitted
        walk = calibrate_in_order(
            self.model, self.route, self.batches, fitting, streams=self.streams, token_weights=self.token_weights
        )
        with tqdm(walk, total=len(self.targets), desc=what, **BAR) as bar:
            for name in bar:
                bar.set_postfix_str(f"{name}: error {fitted.errors.get(name, 0.0):.3f}")
        for name, layer in fitted.layers.items():  # they were made in evaluation mode
            layer.train(self.model.get_submodule(name).training)
        return fitted


def _options(config: KronConfig) -> CalibrationConfig:
    options = config.calibration_config
    return options if isinstance(options, CalibrationConfig) else CalibrationConfig(**(options or {}))


def check_conversion(model: nn.Module, config: KronConfig) -> list[Target]:
    """The modules that `calibrate` would replace; finds out without data whether it could.

    Raises:
        ValueError: The budget cannot be met, or what `get_kron_model` refuses.
    """
    _check_model(model)
    _check_config(config)
    targets = find_targets(model, config, compare_cost=config.budget is None)
    _check_targets(targets)
    if config.budget is not None:
        menus = {target.name: _menu(target.linear, config) for target in targets}
        _check_menus(targets, menus, config)
        _allocate([LayerChoices(name, menu, [0.0] * len(menu)) for name, menu in menus.items()], config)
    return targets


def _menu(linear: nn.Linear, config: KronConfig) -> list[Option]:
    """What is worth a fit: blocks that are fitted one by one are not, far above the budget."""
    sizes = (linear.out_features, linear.in_features)
    menu = layer_menu(*sizes, linear.bias is not None, shapes=_options(config).menu_shapes)
    # The cheapest is: if no option meets the budget, the error tells what they could.
    params = FAR * (config.target_params or math.inf) * menu[-1].params
    params = max(params, min(option.params for option in menu))
    flops = FAR * (config.target_flops or math.inf) * menu[-1].flops
    flops = max(flops, min(option.flops for option in menu))
    return [
        option
        for option in menu
        if option.block_size is None
        or is_low_rank(option.block_size, *sizes)
        or (option.params <= params and option.flops <= flops)
    ]


def _allocate(layers: list[LayerChoices], config: KronConfig) -> dict[str, Option]:
    return allocate(
        layers,
        target_params=config.target_params,
        target_flops=config.target_flops,
        max_error=config.max_error,
        flops_weight=_options(config).flops_weight,
    )


def _check_model(model: nn.Module) -> None:
    if isinstance(model, nn.DataParallel):
        raise ValueError("calibration needs the model itself, not its DataParallel wrapper: pass model.module")


def _check_config(config: KronConfig) -> None:
    if config.init_weights not in (None, "calibrated"):
        raise ValueError(
            f"init_weights={config.init_weights!r} does not go with calibration_data, which fits the layers"
        )
    if config.candidates:
        raise ValueError(
            "candidates are chosen in a training, by BlockSizeCallback; calibration fits one size, or a budget"
        )
    if config.budget and _options(config).target_sparsity is not None:
        raise ValueError(
            f"target_sparsity goes with one block_size and a rank above what is needed, not with {config.budget}: "
            "what it prunes would not be counted"
        )


def _check_menus(targets: Sequence[Target], menus: Mapping[str, list[Option]], config: KronConfig) -> None:
    """Raises if no layer could become anything but dense."""
    if all(option.is_dense for menu in menus.values() for option in menu):
        sizes = sorted({(target.linear.out_features, target.linear.in_features) for target in targets})
        raise ValueError(
            f"no shape of menu_shapes={_options(config).menu_shapes} divides a layer and has fewer parameters than it; "
            f"the layers are {', '.join(map(str, sizes[:5]))} (out, in)"
        )


def _check_targets(targets: Sequence[Target]) -> None:
    for target in targets:
        if target.linear.weight.is_meta:
            raise ValueError(
                f"{target.name}: its weight is on the meta device, as that of a model which is offloaded; load the "
                "model on one device to calibrate it"
            )
        if target.candidates:
            raise ValueError(f"{target.name}: candidates are chosen in a training, calibration fits one size")


def _first_token_alone(model: nn.Module, route: Route, batch: Batch, options: CalibrationConfig) -> bool:
    if options.readout is None:
        return reads_first_token_alone(model, route, batch)
    if options.readout == "cls" and token_count(model, route, batch) is None:
        raise ValueError("readout='cls' needs a model whose blocks give [batch, tokens, features]")
    return options.readout == "cls"


def _token_weights(route: Route, gradients: Mapping[str, OutputGradients]) -> dict[str, TokenWeights]:
    """By the first name of each stage; the linears of a stage are fitted to the same rows, with the same weights."""
    found: dict[str, TokenWeights] = {}
    for stage in (stage for block in route.blocks for stage in block.stages):
        pairs = [(each.first, each.others) for each in (gradients[name] for name in stage)]
        first, others = (math.fsum(values) for values in zip(*((a or 0.0, b or 0.0) for a, b in pairs), strict=True))
        if first > 0 or others > 0:
            found[stage[0]] = first_token_weights(first, others)
    return found


def _option(target: Target) -> Option:
    linear = target.linear
    sizes = (linear.out_features, linear.in_features, linear.bias is not None)
    return kron_option(*sizes, target.block_size, target.rank)


def _row(target: Target, option: Option, fitted: Fitted, choices: Mapping[str, LayerChoices] | None) -> CalibratedLayer:
    own = None if choices is None else choices[target.name]
    return CalibratedLayer(
        name=target.name,
        out_features=target.linear.out_features,
        in_features=target.linear.in_features,
        has_bias=target.linear.bias is not None,
        block_size=option.block_size,
        rank=option.rank,
        error=fitted.errors.get(target.name, 0.0),
        held_out_error=None if own is None else own.errors[own.options.index(option)] ** 0.5,
        sensitivity=None if own is None else own.sensitivity,
        sparsity=fitted.layers[target.name].sparsity if target.name in fitted.layers else 0.0,
    )


def budget_settings(config: KronConfig) -> dict[str, Any]:
    """What a config asks for: its budget, or else its block size and rank."""
    if config.budget is None:
        return {"block_size": config.block_size, "rank": config.rank}
    return {config.budget: getattr(config, config.budget)}
