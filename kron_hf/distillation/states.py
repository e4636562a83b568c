"""What a distillation compares of a model."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

__all__ = ["States", "as_tokens", "has_class_token", "inputs_of_output", "softmax_logits", "token_mask"]

_CLASS_TOKENS = {"cls_token", "class_token", "class_embedding"}  # names of its parameter
_DECODER_INPUTS = ("decoder_input_ids", "decoder_inputs_embeds")
_NO_SOFTMAX = {"regression", "multi_label_classification"}


@dataclass(frozen=True, kw_only=True)
class States:
    """Of one batch and one model; None for what the model does not give.

    Attributes:
        model: Name of its class.
        logits: `[batch, classes]` or `[batch, tokens, classes]`.
        tokens: Final tokens `[batch, tokens, features]`.
        hidden: The tokens after the embeddings and after each layer.
        class_token: Whether the first final token is one that stands for the whole; None: perhaps, if it is text.
        decoded: Whether the tokens are those of a decoder beside an encoder.
    """

    model: str
    logits: Tensor | None = None
    tokens: Tensor | None = None
    hidden: tuple[Tensor, ...] | None = None
    class_token: bool | None = False
    decoded: bool = False

    def get(self, part: str, asked: bool) -> Tensor | tuple[Tensor, ...] | None:
        """What a part compares; `asked`: the first token of a text is taken for its class token."""
        if part != "cls":
            return getattr(self, part)
        found = asked if self.class_token is None else self.class_token
        return self.tokens[:, 0] if found and self.tokens is not None else None


def as_tokens(values: Tensor) -> Tensor:
    """`[batch, tokens, features]` from that, from a feature map `[batch, features, height, width]` or one vector."""
    if values.dim() == 2:
        return values[:, None]
    return values.flatten(2).transpose(1, 2) if values.dim() == 4 else values


def softmax_logits(model: nn.Module, logits: Tensor | None) -> Tensor | None:
    """The logits if a softmax makes probabilities of them, `[batch, classes]` or `[batch, tokens, classes]`."""
    problem = getattr(getattr(model, "config", None), "problem_type", None)
    if logits is None or logits.dim() < 2 or problem in _NO_SOFTMAX:
        return None
    logits = logits.flatten(2).transpose(1, 2) if logits.dim() == 4 else logits  # segmentation: classes come second
    return logits if logits.shape[-1] > 1 else None


def has_class_token(model: nn.Module, tokens: Tensor | None) -> bool | None:
    """Whether the first token is a class token; None for text, where no parameter tells."""
    if tokens is None or tokens.dim() != 3:
        return False
    if any(name.rpartition(".")[2] in _CLASS_TOKENS for name, _ in model.named_parameters()):
        return True
    return None if getattr(model, "main_input_name", None) == "input_ids" else False


def inputs_of_output(inputs: Mapping[str, Any], states: States) -> Mapping[str, Any]:
    """The batch with the `attention_mask` of the tokens that the model gives.

    Those of a decoder have `decoder_attention_mask`, or else the labels that are not -100, if they are labelled.
    """
    labels = inputs.get("labels")
    labelled = isinstance(labels, Tensor) and labels.dim() == 2
    if not states.decoded or not (labelled or any(name in inputs for name in _DECODER_INPUTS)):
        return inputs  # without inputs of its own the decoder takes the encoder's
    mask = inputs.get("decoder_attention_mask")
    if mask is None and labelled:
        mask = labels != -100
    others = {name: value for name, value in inputs.items() if name != "attention_mask"}
    return others if mask is None else {**others, "attention_mask": mask}


def token_mask(inputs: Mapping[str, Any], tokens: Tensor) -> Tensor | None:
    """The `attention_mask` of the batch, for `tokens` `[batch, tokens, ...]`; None if there is none.

    Raises:
        ValueError: It has another shape.
    """
    mask = inputs.get("attention_mask")
    if mask is None or tokens.dim() < 3:
        return None
    if mask.shape != tokens.shape[:2]:
        raise ValueError(
            f"attention_mask must be [batch, tokens] = {list(tokens.shape[:2])} to tell which tokens count, "
            f"got {list(mask.shape)}"
        )
    return mask.to(tokens.device)
