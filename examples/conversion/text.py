"""Converts a text encoder in the declared ways and measures what it keeps. Interrupted, it goes on where it was.

apt-get install bible-kjv fortunes
bible -f Gen1:1-Rev22:21 > verses.txt
python -m examples.conversion.text --verses verses.txt

The encoder is trained first, once, on 25,000 verses (minutes; start further parts after it); all else is measured on
3,000 others.
"""

import argparse
import json
import os
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch is imported

import torch
from sklearn.linear_model import LogisticRegression
from tokenizers import Tokenizer
from torch import Tensor, nn
from tqdm.auto import tqdm

from examples.conversion.distilling import distill
from examples.conversion.encoder import load_encoder, train_encoder
from examples.conversion.run import projections, shares
from examples.conversion.verses import Texts, encoded, quips, verses
from kron_hf import CalibrationConfig, KronConfig, get_kron_model

__all__ = ["PLAN", "RESULTS", "TextConversion", "main", "measure"]

RESULTS = Path(__file__).parent.parent / "results" / "conversion_text.jsonl"
TRAINING = 25_000  # of the verses
CALIBRATION = 2000
PROBED = 2000  # training verses that `refit` probes are fitted to
JUDGED = 1000  # quips
LOW_RANK = ((1, -1),)
MORE_SHAPES = (*LOW_RANK, (2, 96), (4, 64), (8, 32), (16, 16), (8, 8))


@dataclass(frozen=True, kw_only=True)
class TextConversion:
    """One conversion of the whole encoder.

    Attributes:
        method: `"calibrated"`, `"nearest"` or `"random"`.
        budget: `target_params`; None for a uniform size.
        block_size: Of the uniform size.
        rank: Of the uniform size.
        menu: Shapes that the budget chooses from; None is the default.
        target_sparsity: Share of blocks that calibration prunes.
        mixed: Whether half of the calibration texts are quips.
        healed: What is distilled afterwards: `"all"`, `"norms"` (layer norms alone), or nothing.
        steps: Of that.
        learning_rate: Of that.
        seed: Chooses the calibration texts, and draws random factors.
    """

    method: str = "calibrated"
    budget: float | None = None
    block_size: tuple[int, int] | None = None
    rank: int | None = None
    menu: tuple[tuple[int, int], ...] | None = None
    target_sparsity: float | None = None
    mixed: bool = False
    healed: str = ""
    steps: int = 0
    learning_rate: float = 0.0
    seed: int = 0

    @property
    def name(self) -> str:
        """All but the seed, in words."""
        shape = "{} x {} rank {}".format(*(self.block_size or (0, 0)), self.rank)
        if self.budget is not None:
            menus = {None: "chosen shapes", LOW_RANK: "low rank", MORE_SHAPES: "more shapes"}
            shape = f"{menus[self.menu]}, {self.budget:g}"
        pruned = "" if self.target_sparsity is None else f", {self.target_sparsity:.0%} of the blocks pruned"
        mixed = ", mixed texts" if self.mixed else ""
        what = {"all": "", "norms": " of the layer norms"}.get(self.healed, "")
        healed = f", {self.steps} steps{what} at {self.learning_rate:g}" if self.healed else ""
        return f"{self.method}, {shape}{pruned}{mixed}{healed}"


def _plan() -> list[TextConversion]:
    plan = []
    for seed in range(3):
        for budget in (0.04, 0.13, 0.25):
            menus = (None, LOW_RANK) if budget == 0.25 else (None, LOW_RANK, MORE_SHAPES)
            plan += [TextConversion(budget=budget, menu=menu, seed=seed) for menu in menus]
        same_size = [TextConversion(method=method, block_size=(4, 64), rank=8) for method in ("nearest", "random")]
        plan += same_size if seed == 0 else []
        plan.append(TextConversion(block_size=(4, 64), rank=8, seed=seed))
        plan.append(TextConversion(block_size=(4, 64), rank=12, target_sparsity=0.5, seed=seed))
        plan.append(TextConversion(budget=0.13, mixed=True, seed=seed))
        healing = [("norms", 300, 1e-3), *(("all", 300, rate) for rate in (1e-5, 1e-4, 1e-3)), ("all", 1000, 1e-4)]
        plan += [
            TextConversion(budget=0.04, healed=healed, steps=steps, learning_rate=rate, seed=seed)
            for healed, steps, rate in healing
        ]
    return plan


PLAN = _plan()


@dataclass(frozen=True)
class Judge:
    """What the dense encoder makes of texts in and out of the domain, to hold others against."""

    tokenizer: Tokenizer
    train: Texts
    test: Texts
    strange: list[str]
    wanted: Tensor
    strange_wanted: Tensor

    def measure(self, model: nn.Module) -> dict[str, float]:
        """Accuracies and errors.

        `kept` is the classifier's accuracy, `refit` that of a new probe on the features, `agreement` how often a model
        and the dense one say the same of quips; errors are relative, of the features.
        """
        features, logits = outputs(model, self.tokenizer, self.test.lines)
        known, _ = outputs(model, self.tokenizer, self.train.lines[:PROBED])
        strange, strange_logits = outputs(model, self.tokenizer, self.strange)
        probe = LogisticRegression(C=0.05, max_iter=1000).fit(known.numpy(), self.train.labels[:PROBED].numpy())
        dense_says = outputs_of_head(model, self.strange_wanted)
        return {
            "kept": float((logits.argmax(-1) == self.test.labels).float().mean()),
            "refit": float(probe.score(features.numpy(), self.test.labels.numpy())),
            "agreement": float((strange_logits.argmax(-1) == dense_says).float().mean()),
            "feature_error": _error(features, self.wanted),
            "strange_feature_error": _error(strange, self.strange_wanted),
        }


def outputs(model: nn.Module, tokenizer: Tokenizer, lines: list[str]) -> tuple[Tensor, Tensor]:
    """The pooled features, `[N, width]`, and the logits."""
    model.eval()
    found = []
    with torch.no_grad():
        for start in range(0, len(lines), 200):
            pooled = model.bert(**encoded(tokenizer, lines[start : start + 200])).pooler_output
            found.append((pooled, model.classifier(pooled)))
    features, logits = zip(*found, strict=True)
    return torch.cat(features), torch.cat(logits)


@torch.no_grad()
def outputs_of_head(model: nn.Module, features: Tensor) -> Tensor:
    """The classes that the head, which is never converted, names."""
    return model.classifier(features).argmax(-1)


def measure(folder: Path, conversion: TextConversion, judge: Judge, strange: list[str]) -> dict[str, Any]:
    """Converts a fresh copy, heals it if that is declared, and judges it."""
    torch.manual_seed(conversion.seed)
    model, _ = load_encoder(folder)
    dense = {name: linear.weight.shape for name, linear in projections(model).items()}
    seconds = _convert(model, conversion, judge, strange)
    if conversion.healed:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(conversion.healed == "all" or "LayerNorm" in name)
        teacher, _ = load_encoder(folder)
        distill(
            model,
            teacher,
            len(judge.train.lines),
            lambda chosen: encoded(judge.tokenizer, [judge.train.lines[index] for index in chosen]),
            conversion.steps,
            learning_rate=conversion.learning_rate,
            seed=conversion.seed,
        )
    return asdict(conversion) | {"seconds": seconds} | shares(model, dense) | judge.measure(model)


def _convert(model: nn.Module, conversion: TextConversion, judge: Judge, strange: list[str]) -> float:
    sizes: dict[str, Any] = {"target_params": conversion.budget}
    if conversion.budget is None:
        sizes = {"block_size": conversion.block_size, "rank": conversion.rank}
    data = {}
    if conversion.method == "calibrated":
        options: dict[str, Any] = {"menu_shapes": conversion.menu and list(conversion.menu), "seed": conversion.seed}
        sizes["calibration_config"] = CalibrationConfig(target_sparsity=conversion.target_sparsity, **options)
        order = torch.randperm(TRAINING, generator=torch.Generator().manual_seed(conversion.seed))
        own = [judge.train.lines[index] for index in order[: CALIBRATION // (1 + conversion.mixed)]]
        if conversion.mixed:
            own = [text for pair in zip(own, strange, strict=False) for text in pair]
        parts = [own[start : start + 100] for start in range(0, len(own), 100)]
        data = {"calibration_data": [encoded(judge.tokenizer, part) for part in parts]}
    config = KronConfig(init_weights=conversion.method, **sizes)  # type: ignore[arg-type]
    began = time.perf_counter()
    get_kron_model(model, config, **data)
    return round(time.perf_counter() - began, 1)


def _error(features: Tensor, wanted: Tensor) -> float:
    spread = (wanted - wanted.mean(0)).square().sum()
    return float(((features - wanted).square().sum() / spread).sqrt())


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--verses", type=Path, required=True, help="what `bible -f Gen1:1-Rev22:21` prints")
    parser.add_argument("--quips", type=Path, default=Path("/usr/share/games/fortunes"), help="folder of fortunes")
    parser.add_argument("--encoder", type=Path, default=Path("runs/verses-encoder"), help="kept here once trained")
    parser.add_argument("--output", type=Path, default=RESULTS, help="file of results, a JSON object a line")
    parser.add_argument("--part", default="1/1", help="as 2/3: the second third alone, beside other processes")
    parser.add_argument("--list", action="store_true", help="show what is missing")
    options = parser.parse_args()
    done = {_key(json.loads(line)) for line in options.output.open()} if options.output.exists() else set()
    part, parts = map(int, options.part.split("/"))
    missing = [each for each in PLAN[part - 1 :: parts] if _key(asdict(each)) not in done]
    if options.list:
        sys.stdout.writelines(f"{conversion.name}, seed {conversion.seed}\n" for conversion in missing)
        return
    texts = verses(options.verses)
    if not (options.encoder / "tokenizer.json").exists():
        train_encoder(options.encoder, texts.part(0, TRAINING))
    strange = quips(options.quips, JUDGED + CALIBRATION // 2)
    judge = _judge(options.encoder, texts, strange[:JUDGED])
    dense = judge.measure(load_encoder(options.encoder)[0])
    for conversion in tqdm(missing, unit="conversion"):
        row = measure(options.encoder, conversion, judge, strange[JUDGED:]) | {"dense": dense}
        with options.output.open("a") as file:
            file.write(json.dumps(row) + "\n")


def _judge(folder: Path, texts: Texts, strange: list[str]) -> Judge:
    model, tokenizer = load_encoder(folder)
    test = texts.part(TRAINING, TRAINING + 3000)
    wanted, strange_wanted = (outputs(model, tokenizer, lines)[0] for lines in (test.lines, strange))
    return Judge(tokenizer, texts.part(0, TRAINING), test, strange, wanted, strange_wanted)


def _key(row: dict[str, Any]) -> str:
    names = asdict(TextConversion())
    return json.dumps({name: row[name] for name in names}, sort_keys=True)


if __name__ == "__main__":
    main()
