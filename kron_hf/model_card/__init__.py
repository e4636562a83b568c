"""Model cards: what the Hub and a reader need to know, counted from the model, and claims that can be checked."""

from kron_hf.model_card.callback import ModelCardCallback
from kron_hf.model_card.card import PICTURES, write_model_card
from kron_hf.model_card.latency import Latency, measure_latency
from kron_hf.model_card.markdown import MARKER, escape_markdown
from kron_hf.model_card.usage import add_usage, base_name

__all__ = [
    "MARKER",
    "PICTURES",
    "Latency",
    "ModelCardCallback",
    "add_usage",
    "base_name",
    "escape_markdown",
    "measure_latency",
    "write_model_card",
]
