"""Counts a loaded model again and compares it with the claims and with its card."""

import copy
import math
from collections.abc import Mapping
from importlib.metadata import version
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCard
from torch import Tensor, nn
from transformers import PreTrainedModel

from kron_hf.claims import Claims, FileClaim, count, merge_difference, set_frozen, zeros_of
from kron_hf.claims.files import CARD
from kron_hf.claims.record import is_finite_number
from kron_hf.escaping import one_line, plain, shown
from kron_hf.model_card.card import MERGE_TOLERANCE
from kron_hf.model_card.figures import figures_section, find_figures
from kron_hf.summary import KronSummary
from kron_hf.surgery import to_dense
from kron_hf.verify.report import Check, compared, failed, unchecked

__all__ = ["check_card", "check_counts", "check_merge", "check_zeros"]

MAX_BYTES = 2**24  # of a card
IMAGES = 2
LARGEST_IMAGE = 1024  # a stranger's config may claim any size, and not every model holds it against its weights


def check_counts(model: nn.Module, claims: Claims) -> tuple[list[Check], KronSummary, dict[str, Any]]:
    """Counts parameters, sparsity and FLOPs.

    Returns:
        The checks, and what was counted.

    Raises:
        ValueError: The claims name parameters that the model lacks.
    """
    set_frozen(model, claims.frozen)
    summary, whole, layers = count(model)
    checks = [compared(name.replace("_", " "), claims.whole.get(name), found) for name, found in whole.items()]
    checks += [failed(name, "there is no such figure") for name in claims.whole.keys() - whole.keys()]
    return [*checks, _layers(claims.layers, layers)], summary, whole


def check_zeros(model: nn.Module) -> Check:
    """Whether every block that a mask says is zero has nothing but exact zeros in the weight."""
    zeros = zeros_of(model)
    wrong = [name for name, blocks in zeros.items() if blocks.claimed != blocks.exact]
    masked, exact = sum(blocks.claimed for blocks in zeros.values()), sum(blocks.exact for blocks in zeros.values())
    where = f" (not in {wrong[0]})" if wrong else ""
    return Check("zero blocks are exactly zero in W", f"{masked:,}", f"{exact:,}{where}", not wrong)


def check_merge(model: nn.Module, claims: Claims) -> list[Check]:
    """Whether `to_dense` computes the same, layer by layer and as a whole, in float64 on random inputs."""
    if not claims.merges:
        return unchecked([("merging into dense layers", "none")], "the card does not claim it")
    bound = f"<= {MERGE_TOLERANCE:g}"
    worst = merge_difference(model)
    checks = [Check("each layer against its dense weight", bound, f"{worst:.2g}", worst <= MERGE_TOLERANCE)]
    what = "the model against to_dense"
    try:
        whole = _whole_difference(model)
    except (RuntimeError, ValueError) as error:
        return [*checks, failed(what, one_line(str(error)))]
    if whole is not None:
        checks.append(Check(what, bound, f"{whole:.2g}", whole <= MERGE_TOLERANCE))
    return checks


def check_card(
    directory: Path, claims: Claims, summary: KronSummary, whole: Mapping[str, Any], files: Mapping[str, FileClaim]
) -> list[Check]:
    """Writes the card's figures again and compares; and the results in its metadata with the claims."""
    try:
        if (size := (directory / CARD).stat().st_size) > MAX_BYTES:
            raise OSError(f"{CARD} has {size} bytes, at most {MAX_BYTES} are read")
        card = (directory / CARD).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        return [failed("figures in the card", one_line(str(error)))]
    written, again = find_figures(card), figures_section(summary, whole, files, claims.metrics)
    return [_figures(written, again, claims.kron_hf), _metadata(card, claims)]


def _layers(claimed: list[dict[str, Any]], found: list[dict[str, Any]]) -> Check:
    what = f"figures of {len(found)} layers"
    if len(claimed) != len(found):
        return Check(what, f"{len(claimed)} layers", f"{len(found)} layers", False)
    for theirs, ours in zip(claimed, found, strict=True):
        for key in ours | theirs:
            if key not in theirs or key not in ours or ours[key] != theirs[key]:
                where = f"{what}: {ours['name']}, {key}"
                return Check(where, shown(theirs.get(key)), shown(ours.get(key)), False)
    return Check(what, "each", "the same", True)


@torch.no_grad()
def _whole_difference(model: nn.Module) -> float | None:
    """Largest difference of the outputs for random images, relative to the largest output; None for other models.

    Raises:
        RuntimeError: The model does not take images of the size that its config names.
        ValueError: Likewise, or the size is too large to try.
    """
    config: Any = getattr(model, "config", None)
    size, channels = getattr(config, "image_size", None), getattr(config, "num_channels", 3)
    if not isinstance(model, PreTrainedModel) or model.main_input_name != "pixel_values" or not isinstance(size, int):
        return None
    if size > LARGEST_IMAGE:
        raise ValueError(f"config.json claims images of {shown(size)} pixels a side, at most {LARGEST_IMAGE} are tried")
    exact: Any = copy.deepcopy(model).double().eval()
    pixels = torch.randn(IMAGES, channels, size, size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    ours: Tensor = exact(pixel_values=pixels)[0]
    theirs: Tensor = to_dense(exact)(pixel_values=pixels)[0]
    difference = (ours - theirs).abs().max() / theirs.abs().max().clamp_min(torch.finfo(torch.float64).tiny)
    return difference.item()


def _figures(written: str | None, again: str, writer: str) -> Check:
    what = "figures in the card"
    if written is None:
        return failed(what, "the card has no such part, or several")
    if written == again:
        return Check(what, "those counted", "the same", True)
    pairs = zip_longest(written.splitlines(), again.splitlines(), fillvalue="")
    theirs, ours = next((pair for pair in pairs if pair[0] != pair[1]), ("", ""))
    if writer != (own := version("kron_hf")):
        what += f" (of kron_hf {plain(writer)}; kron_hf {own} may write them otherwise)"
    return Check(what, theirs, ours, False)


def _metadata(card: str, claims: Claims) -> Check:
    what = "results in the card's metadata"
    claimed = [(metric.metric, metric.value) for metric in claims.metrics]
    try:
        data: Any = ModelCard(card).data
        found = [(result.metric_type, result.metric_value) for result in data.eval_results or []]
    except Exception as error:  # YAML of a stranger: anything may be wrong with it
        return failed(what, one_line(f"{type(error).__name__}: {error}"))
    same = len(found) == len(claimed) and all(
        name == ours and is_finite_number(value) and math.isclose(value, number, rel_tol=1e-9)
        for (name, value), (ours, number) in zip(found, claimed, strict=True)
    )
    return Check(what, _listed(claimed), _listed(found), same)


def _listed(pairs: list[tuple[Any, Any]]) -> str:
    """Bounded: a few lines of YAML may stand for gigabytes."""
    return ", ".join(
        f"{shown(name)} {f'{value:.4f}' if isinstance(value, float) else shown(value)}" for name, value in pairs[:8]
    )
