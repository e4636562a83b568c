"""Exports that `from_pretrained` loads: compact files, and dense models for plain transformers."""

import copy
import json
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from kron_hf.checkpoint.compact import is_compact, pack_state_dict
from kron_hf.checkpoint.hook import COMPACT_VERSION
from kron_hf.model_card import write_model_card
from kron_hf.surgery import to_dense

__all__ = ["write_compact", "write_dense"]


def write_compact(model: PreTrainedModel, folder: Path, *, name: str, max_shard_size: int | str) -> dict[str, Any]:
    """Writes a model without what the zero blocks of S hide, with its card.

    Args:
        model: A model with Kronecker layers.
        folder: Where to.
        name: What the card calls the model.
        max_shard_size: As for `save_pretrained`.
    """
    state_dict = pack_state_dict(model)
    packed = is_compact(state_dict)
    model.save_pretrained(folder, state_dict=state_dict, max_shard_size=max_shard_size)
    if packed:  # else it is an ordinary model, which older versions read as well
        path = folder / "config.json"
        config = json.loads(path.read_text(encoding="utf-8"))
        config["quantization_config"]["format_version"] = COMPACT_VERSION
        path.write_text(f"{json.dumps(config, indent=2, sort_keys=True)}\n", encoding="utf-8")
    write_model_card(model, folder, name=name)
    return {"format_version": json.loads((folder / "config.json").read_text())["quantization_config"]["format_version"]}


def write_dense(model: PreTrainedModel, folder: Path, *, max_shard_size: int | str) -> PreTrainedModel:
    """Writes the dense model that plain transformers loads without kron_hf, and returns it."""
    dense: Any = to_dense(copy.deepcopy(model))
    dense.save_pretrained(folder, max_shard_size=max_shard_size)
    return dense.eval()
