"""Converts a DINOv2 backbone in the declared ways and measures what it keeps. Interrupted, it goes on where it was.

python -m examples.conversion.run --model facebook/dinov2-small

Needs scikit-image for its photographs: pip install scikit-image.
"""

import argparse
import json
import os
import resource
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch is imported

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import AutoModel

from examples.conversion.distilling import distill
from examples.conversion.images import fashion, photograph_crops
from examples.conversion.plan import PLAN, Conversion
from examples.conversion.probe import Probe
from kron_hf import CalibrationConfig, KronConfig, KronLinear, get_kron_model
from kron_hf.factors import kron_flops
from kron_hf.targets import find_targets

__all__ = ["RESULTS", "convert", "main", "projections", "shares"]

RESULTS = Path(__file__).parent.parent / "results" / "conversion.jsonl"
POOL = 20_000  # training images to calibrate on; the probes have others


def convert(model: nn.Module, conversion: Conversion) -> dict[str, Any]:
    """Converts a model in place; returns the seconds that took and the sizes."""
    torch.manual_seed(conversion.seed)
    options = CalibrationConfig(
        readout="cls", menu_shapes=None if conversion.menu is None else list(conversion.menu), seed=conversion.seed
    )
    sizes: dict[str, Any] = {"target_params": conversion.budget}
    if conversion.budget is None:
        sizes = {"block_size": conversion.block_size, "rank": conversion.rank}
    calibrated = conversion.method == "calibrated"
    config = KronConfig(
        init_weights=conversion.method,  # type: ignore[arg-type]
        calibration_config=options if calibrated else None,
        **sizes,
    )
    data = {"calibration_data": _calibration_images(conversion)} if calibrated else {}
    dense = {name: linear.weight.shape for name, linear in projections(model).items()}
    began = time.perf_counter()
    get_kron_model(model, config, **data)
    seconds = time.perf_counter() - began
    return {"seconds": round(seconds, 1), **shares(model, dense)}


def _calibration_images(conversion: Conversion) -> list[dict[str, Tensor]]:
    own = conversion.images // 2 if conversion.mixed else conversion.images
    images, _ = fashion("train", 0, POOL)
    chosen = torch.randperm(POOL, generator=torch.Generator().manual_seed(conversion.seed))[:own]
    pixels = images[chosen]
    if conversion.mixed:
        crops, _ = photograph_crops("calibration", conversion.images - own, conversion.seed)
        pixels = torch.cat((pixels, crops))
        pixels = pixels[torch.randperm(len(pixels), generator=torch.Generator().manual_seed(conversion.seed))]
    return [{"pixel_values": part} for part in pixels.split(100)]


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="facebook/dinov2-small", help="id or directory of a DINOv2 backbone")
    parser.add_argument("--output", type=Path, default=RESULTS, help="file of results, a JSON object a line")
    parser.add_argument("--part", default="1/1", help="as 2/3: the second third alone, beside other processes")
    parser.add_argument("--list", action="store_true", help="show what is missing")
    options = parser.parse_args()
    done = {_key(json.loads(line)) for line in options.output.open()} if options.output.exists() else set()
    part, parts = map(int, options.part.split("/"))
    missing = [each for each in PLAN[part - 1 :: parts] if _key(asdict(each)) not in done]
    if options.list:
        sys.stdout.writelines(f"{conversion}\n" for conversion in missing)
        return
    probes = _probes(options.model)
    for conversion in tqdm(missing, unit="conversion"):
        row = asdict(conversion) | _measured(options.model, conversion, probes)
        with options.output.open("a") as file:
            file.write(json.dumps(row) + "\n")


def _probes(name: str) -> dict[str, Probe]:
    dense = AutoModel.from_pretrained(name)
    return {
        "": Probe(dense, fashion("train", POOL, 1000), fashion("test", 0, 2000)),
        "photograph_": Probe(dense, photograph_crops("train", 900), photograph_crops("test", 900)),
    }


def _measured(name: str, conversion: Conversion, probes: dict[str, Probe]) -> dict[str, Any]:
    model = AutoModel.from_pretrained(name)
    row = convert(model, conversion)
    if conversion.distill_steps:
        images, _ = fashion("train", 0, POOL)
        teacher = AutoModel.from_pretrained(name)
        row["distill_seconds"] = distill(
            model,
            teacher,
            len(images),
            lambda chosen: {"pixel_values": images[chosen]},
            conversion.distill_steps,
            learning_rate=conversion.learning_rate,
            seed=conversion.seed,
        )
    for prefix, probe in probes.items():
        row[f"{prefix}dense"] = probe.score
        row |= {f"{prefix}{key}": value for key, value in asdict(probe.measure(model)).items()}
    row["peak_memory_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return row | {"threads": torch.get_num_threads(), "torch": torch.__version__}


def projections(model: nn.Module) -> dict[str, nn.Linear]:
    """What the default config converts."""
    targets = find_targets(model, KronConfig(block_size=(1, -1), rank=1), compare_cost=False)
    return {target.name: target.linear for target in targets}


def shares(model: nn.Module, dense: dict[str, torch.Size]) -> dict[str, float]:
    """Deployed parameters (biases included, zero blocks not) and FLOPs of all projections over those of dense ones."""
    params = flops = 0
    for name, (out_features, in_features) in dense.items():
        module = model.get_submodule(name)
        if isinstance(module, KronLinear):
            params += int(module.block_mask.sum()) * module.rank + module.b.numel() + out_features
            flops += kron_flops(out_features, in_features, module.block_size, module.rank)
        else:
            params += out_features * in_features + out_features
            flops += 2 * out_features * in_features
    all_params = sum((in_features + 1) * out_features for out_features, in_features in dense.values())
    all_flops = sum(2 * out_features * in_features for out_features, in_features in dense.values())
    return {"params_of_dense": params / all_params, "flops_of_dense": flops / all_flops}


def _key(row: dict[str, Any]) -> str:
    names = asdict(Conversion())
    return json.dumps({name: row[name] for name in names}, sort_keys=True)


if __name__ == "__main__":
    main()
