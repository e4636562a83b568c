"""`calibrate`: Kronecker layers that are fitted to what a trained model computes on data, without a gradient step."""

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from accelerate.utils import extract_model_from_parallel, is_compiled_module
from torch import nn
from torch.amp.autocast_mode import is_autocast_available
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from kron_hf.calibration.allocation import LayerChoices
from kron_hf.calibration.batches import SpreadBatches, few_examples
from kron_hf.calibration.decoder import DECODER_MASK, decoder_stages
from kron_hf.calibration.dense_walk import walk_dense
from kron_hf.calibration.fittings import Fitted, PlainFitting, PrunedFitting, SurveyingFitting, dead_blocks
from kron_hf.calibration.gradients import OutputGradients, output_gradients
from kron_hf.calibration.menu import Option, kron_option
from kron_hf.calibration.menu_errors import layer_choices
from kron_hf.calibration.readout import reads_out_first_token
from kron_hf.calibration.result import CalibratedLayer, CalibrationResult
from kron_hf.calibration.route import find_route
from kron_hf.calibration.sequential import calibrate_in_order
from kron_hf.calibration.streams import find_streams
from kron_hf.calibration.token_weights import TokenWeights, no_weights, weights_by_stage
from kron_hf.calibration_data import check_batch, model_batches
from kron_hf.config import KronConfig
from kron_hf.conversion.budget import allocated, calibration_options, menu_of
from kron_hf.conversion.calibration import Calibration, budget_settings
from kron_hf.conversion.checks import check_conversion
from kron_hf.evaluation_mode import evaluation
from kron_hf.targets import Target

__all__ = ["calibrate"]

# What the config of the choice takes over from the one that asked for it.
KEPT = ("base_model_name_or_path", "revision", "task_type", "modules_to_save", "calibration_config")

COMPARED = 512  # examples that options are compared on: the ranking needs fewer than the fit
BAR: dict[str, Any] = {"unit": "layer", "delay": 1.0, "leave": False}


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
    if is_compiled_module(model):
        model = extract_model_from_parallel(model, keep_torch_compile=False)
    with _by_itself(model):
        return _Calibrating(model, config, calibration_data).run()


@contextmanager
def _by_itself(model: nn.Module) -> Iterator[None]:
    """Without the inference mode and the autocast of the caller: layers are made that can be trained."""
    kind = next(model.parameters(), torch.empty(0)).device.type
    autocast = torch.autocast(kind, enabled=False) if is_autocast_available(kind) else nullcontext()
    with torch.inference_mode(False), autocast:
        yield


class _Calibrating:
    def __init__(self, model: nn.Module, config: KronConfig, data: Any) -> None:
        self.model, self.config, self.options = model, config, calibration_options(config)
        self.targets = check_conversion(model, config)
        self.batches = model_batches(model, data, self.options)
        with evaluation(model):
            first = next(iter(self.batches))
            check_batch(model, first)
            self.route = find_route(model, [target.name for target in self.targets], first)
            self.streams = find_streams(model, self.route, few_examples(first))
            self.first_token_alone = reads_out_first_token(model, self.route, few_examples(first), self.options.readout)
            self.gradients = self._gradients()
            self.decoding = decoder_stages(model, self.route, few_examples(first))

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

    def _token_weights(self, counted: Collection[str] | None = None) -> dict[str, TokenWeights]:
        own = weights_by_stage(self.route, self.gradients, counted) if self.first_token_alone else {}
        return {name: partial(no_weights, mask=DECODER_MASK) for name in self.decoding} | own

    def _measure(self) -> dict[str, LayerChoices]:
        """The errors of all options, on the dense model's inputs."""
        walk = walk_dense(
            self.model,
            self.route,
            SpreadBatches(self.batches, COMPARED),
            held_out=self.options.held_out,
            token_weights=self._token_weights(),
        )
        found: dict[str, LayerChoices] = {}
        for inputs in tqdm(walk, total=len(self.targets), desc="Measuring options", **BAR):
            linear, stream = inputs.linear, self.streams.get(inputs.name)
            weights = None if stream is None else stream.scale.square()
            found[inputs.name] = layer_choices(
                inputs,
                menu_of(linear, self.config),
                self.gradients[inputs.name].outputs,
                output_weights=weights,
                ridge=self.options.ridge,
            )
        return found

    def _sizes(self, choices: Mapping[str, LayerChoices] | None) -> dict[str, Option]:
        if choices is None:
            return {target.name: _option(target) for target in self.targets}
        chosen = allocated([choices[target.name] for target in self.targets], self.config)
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
        converted = {name for name, option in fitting.sizes.items() if not option.is_dense}
        weights = self._token_weights(converted)  # of these alone, so that the choice by itself gives the same fit
        walk = calibrate_in_order(
            self.model, self.route, self.batches, fitting, streams=self.streams, token_weights=weights
        )
        with tqdm(walk, total=len(self.targets), desc=what, **BAR) as bar:
            for name in bar:
                bar.set_postfix_str(f"{name}: error {fitted.errors.get(name, 0.0):.3f}")
        for name, layer in fitted.layers.items():  # they were made in evaluation mode
            layer.train(self.model.get_submodule(name).training)
        return fitted


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
