"""`get_kron_model`: a transformers model with Kronecker-sparse projections."""

from collections.abc import Mapping
from typing import Any, TypeVar, overload

import transformers
from torch import Tensor, nn
from transformers import AutoModelForImageClassification, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_MAPPING

from kron_hf.checkpoint import holds_trained_weights
from kron_hf.checkpoint.reading import clean_errors, read_config
from kron_hf.config import KronConfig
from kron_hf.conversion import calibrate, install_layers
from kron_hf.escaping import shown
from kron_hf.surgery import make_layers
from kron_hf.targets import Target, find_targets

__all__ = ["build_untrained", "get_kron_model", "init_method", "model_class_for"]


CHOICES = """\
  KronConfig(..., init_weights="random")      # new weights for the replaced modules
  KronConfig(..., init_weights="nearest")     # the closest fit to each weight, to be trained further
  get_kron_model(..., calibration_data=images)  # fitted to what the model computes on data: keeps most of it"""

ModelT = TypeVar("ModelT", bound=nn.Module)


@overload
def get_kron_model(model: ModelT, config: KronConfig, /, *, calibration_data: Any = None) -> ModelT: ...


@overload
def get_kron_model(
    config: KronConfig,
    /,
    *,
    calibration_data: Any = None,
    auto_class: Any = None,
    pretrained: bool = True,
    **model_kwargs: Any,
) -> PreTrainedModel: ...


def get_kron_model(
    model_or_config: nn.Module | KronConfig,
    config: KronConfig | None = None,
    /,
    *,
    calibration_data: Any = None,
    auto_class: Any = None,
    pretrained: bool = True,
    **model_kwargs: Any,
) -> nn.Module:
    """Replaces the projections of a model by Kronecker layers, `W = sum_i (S * A_i) (x) B_i`.

    Two forms: `get_kron_model(model, config)` converts the given model in place and returns it;
    `get_kron_model(config, ...)` builds the model that `config.base_model_name_or_path` names first. The result is the
    ordinary transformers model: `Trainer`, `save_pretrained`, `push_to_hub` and `from_pretrained` work as on any other.
    Everything is checked before the model is touched. Convert the outermost model, the one that you will save: it is
    its config that tells `from_pretrained` of the layers.

    With `candidate_block_sizes` or `candidate_ranks` each layer is a `KronCandidates`, the sum of a Kronecker layer for
    each candidate, until `BlockSizeCallback` has left one.

    Args:
        model_or_config: The model to convert, or the config.
        config: The config, if a model is given.
        calibration_data: Images (or other inputs) of the kind that the model is for; the layers are then fitted to what
            the trained model computes for them, see `calibrate`, which also gives a report.
        auto_class: Class to build the model with, such as `AutoModelForImageClassification`. Default: the
            checkpoint's own class; if that has no head and `num_labels` is given, `AutoModelForImageClassification`.
        pretrained: With the checkpoint's weights (then `config.init_weights` must say how to use them), or from its
            config alone, which downloads no weights.
        **model_kwargs: For `from_pretrained` (or the config, if not pretrained), such as `num_labels`.

    Raises:
        ValueError: No module matches, a named module cannot be replaced, `init_weights` is missing for a model that
            holds trained weights, or the model is converted or quantized already; or what `calibrate` refuses.

    Example:
        >>> from transformers import ViTConfig, ViTForImageClassification
        >>> from kron_hf import KronConfig, get_kron_model
        >>> vit = ViTForImageClassification(ViTConfig(hidden_size=64, intermediate_size=128, num_hidden_layers=1,
        ...     num_attention_heads=2, image_size=32, patch_size=8))
        >>> model = get_kron_model(vit, KronConfig(block_size=8, rank=2))
        >>> model.vit.layers[0].mlp.fc1
        KronLinear(in_features=64, out_features=128, block_size=(8, 8), rank=2, bias=True)
    """
    if isinstance(model_or_config, KronConfig):
        if config is not None:
            given = f"a KronConfig and then a {type(config).__name__}"
            raise TypeError(f"get_kron_model takes (model, config) or (config, ...), got {given}")
        _check_data(model_or_config, calibration_data, pretrained)
        base = _build_base(model_or_config, auto_class, pretrained, calibration_data is not None, model_kwargs)
        return _convert(base, model_or_config, calibration_data)
    if not isinstance(model_or_config, nn.Module) or not isinstance(config, KronConfig):
        given = f"{type(model_or_config).__name__} and {type(config).__name__}"
        raise TypeError(f"get_kron_model takes a model and a KronConfig, or a KronConfig alone; got {given}")
    if auto_class is not None or not pretrained or model_kwargs:
        raise TypeError("auto_class, pretrained and model arguments only go with get_kron_model(config, ...)")
    _check_data(config, calibration_data)
    return _convert(model_or_config, config, calibration_data)


def _convert(model: ModelT, config: KronConfig, calibration_data: Any) -> ModelT:
    if calibration_data is None:
        targets = find_targets(model, config)
        layers: Mapping[str, nn.Module] = make_layers(targets, init_method(model, config, targets))
    else:
        layers = calibrate(model, config, calibration_data).layers
    return install_layers(model, layers)


def init_method(model: nn.Module, config: KronConfig, targets: list[Target]) -> str:
    """How the factors start: "random" or "nearest".

    Raises:
        ValueError: `config.init_weights` is missing, and the targets hold trained weights; or it needs data.
    """
    _check_needs_no_data(config)
    if config.init_weights is not None:
        return config.init_weights
    weights: list[Tensor] = [target.module.weight for target in targets]
    if holds_trained_weights(model, weights):
        raise ValueError("this model holds trained weights, and replacing them is a choice; write one of\n" + CHOICES)
    return "random"


def _check_needs_no_data(config: KronConfig) -> None:
    if what := config.needs_data:
        raise ValueError(
            f"{what} needs calibration data: get_kron_model(model, config, calibration_data=...), or for a PEFT "
            "adapter kron_hf.preprocess_kron(model, config, calibration_data) first"
        )


def _check_data(config: KronConfig, calibration_data: Any, pretrained: bool = True) -> None:
    if calibration_data is None:
        _check_needs_no_data(config)
    elif not pretrained:
        raise ValueError("calibration_data fits layers to a trained model, which pretrained=False does not load")


def _build_base(
    config: KronConfig, auto_class: Any, pretrained: bool, calibrated: bool, kwargs: dict[str, Any]
) -> PreTrainedModel:
    name = config.base_model_name_or_path
    if not name:
        raise ValueError("get_kron_model(config) needs config.base_model_name_or_path, the model to start from")
    if not pretrained and config.init_weights == "nearest":
        raise ValueError(
            "init_weights='nearest' fits the factors to trained weights, which pretrained=False does not load; leave "
            "init_weights out to train from scratch"
        )
    if pretrained and config.init_weights is None and not calibrated:
        # Said before anything is downloaded or loaded.
        raise ValueError(
            "get_kron_model(config) loads trained weights, and replacing them is a choice; write one of\n"
            f"{CHOICES}\nor get_kron_model(config, pretrained=False) to train from scratch"
        )
    revision = {} if config.revision is None else {"revision": config.revision}
    loaded: Any = read_config(name, return_unused_kwargs=True, **revision, **kwargs)
    model_config, unused = loaded
    model_class = auto_class or model_class_for(model_config, with_head="num_labels" in kwargs)
    with clean_errors(name):
        if pretrained:
            return model_class.from_pretrained(name, **revision, **kwargs)
        return build_untrained(model_class, model_config, **unused)


def build_untrained(model_class: Any, config: PreTrainedConfig, **kwargs: Any) -> PreTrainedModel:
    """A model of a class, or of what an auto class finds, with random weights."""
    return (getattr(model_class, "from_config", None) or model_class._from_config)(config, **kwargs)


def model_class_for(config: PreTrainedConfig, with_head: bool) -> Any:
    """The class that the checkpoint was saved from, looked up among transformers' model classes only."""
    listed = config.architectures
    name = listed[0] if isinstance(listed, list) and listed else ""
    found = getattr(transformers, name, None) if isinstance(name, str) and name.isidentifier() else None
    if not (isinstance(found, type) and issubclass(found, PreTrainedModel) and found.config_class is type(config)):
        raise ValueError(
            f"the checkpoint's architecture {shown(name)} is no transformers model for a {type(config).__name__}; pass "
            "auto_class=, such as auto_class=AutoModelForImageClassification"
        )
    headless = type(config) in MODEL_MAPPING and MODEL_MAPPING[type(config)] is found
    return AutoModelForImageClassification if headless and with_head else found
