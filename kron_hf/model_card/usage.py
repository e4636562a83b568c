"""How to load a model: the lines that every card of ours carries, and that cards of others get added."""

from pathlib import Path

from peft import PeftModel
from torch import nn

from kron_hf.model_card.markdown import fenced, public_name
from kron_hf.selection.groups import candidate_layers
from kron_hf.summary import kron_summary

__all__ = ["add_usage", "base_name", "usage"]


def add_usage(path: str | Path, model: nn.Module, name: str, *, layers: bool = True) -> None:
    """Adds the loading lines and the layers to a card that others wrote, such as Trainer's; does nothing twice.

    Args:
        path: The card.
        model: The model that it describes.
        name: Repository or path that the loading line names.
        layers: Whether to list them. Counting sharded ones (FSDP2) takes all processes.
    """
    path = Path(path)
    text = path.read_text(encoding="utf-8")
    if "import kron_hf" not in text:
        parts = [text.rstrip(), "## How to load", *usage(model, public_name(name))]
        if layers:
            parts.append(fenced(str(kron_summary(model)), "text"))
        path.write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def usage(model: nn.Module, name: str) -> tuple[str, str]:
    """What kind of model it is, and the code that loads it, as Markdown.

    Args:
        model: The model.
        name: Repository or path that the loading line names.
    """
    why = "import kron_hf  # teaches from_pretrained to build the Kronecker layers"
    if isinstance(model, PeftModel):
        loader = _loader(model.get_base_model())
        base = base_name(model) or "the base model"
        code = (
            f"{why}\nfrom peft import PeftModel\nfrom transformers import {loader}\n\n"
            f"base = {loader}.from_pretrained({base!r})\nmodel = PeftModel.from_pretrained(base, {name!r})\n"
        )
    else:
        loader = _loader(model)
        code = f"{why}\nfrom transformers import {loader}\n\nmodel = {loader}.from_pretrained({name!r})\n"
    kind = "An adapter that replaces the projections of a transformers model by"
    if not isinstance(model, PeftModel):
        kind = "A transformers model whose projections are"
    sums = " Their block size is not chosen yet: each is the sum of its candidates." if candidate_layers(model) else ""
    return (
        f"{kind} [Kronecker-sparse](https://arxiv.org/abs/2503.21928) layers of "
        f"`kron_hf`: `W = sum_i (S * A_i) (x) B_i`.{sums} It needs that package to load:",
        fenced(code, "python"),
    )


def base_name(model: PeftModel) -> str | None:
    """The adapted model as a card may name it: the id on the Hub, or None for a folder of this machine."""
    name = model.peft_config[model.active_adapters[0]].base_model_name_or_path
    return name if name and public_name(name) == name and not Path(name).is_dir() else None


def _loader(model: nn.Module) -> str:
    name = type(model).__name__
    return "AutoModelForImageClassification" if name.endswith("ForImageClassification") else name
