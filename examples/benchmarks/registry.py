"""All that is measured, by the name of the suite. Changing a case makes it measured anew; old rows are ignored."""

from itertools import product

from examples.benchmarks.cases import Case, Conditions
from examples.benchmarks.methods import CONVOLUTION_WAYS, METHODS, PATHS

__all__ = ["CHOICES", "CONVOLUTIONS", "GRID", "LIMITS", "SUITES", "WORST", "limit"]

WORST = 1.10  # of dense's time, at the 95th percentile of the grid


def _layer(
    features: tuple[int, int], method: str, block: int | tuple[int, int] = 16, rank: int = 2, sparsity: float = 0.0
) -> Case:
    pair = block if isinstance(block, tuple) else (block, block)
    own = {} if method.startswith("dense") else {"block_size": pair, "rank": rank}
    return Case(subject="layer", features=features, method=method, sparsity=sparsity, **own)


def _conv(
    channels: int, kernel: int, image: int, block: tuple[int, int], rank: int, method: str, stride: int = 1
) -> Case:
    own = {} if method.startswith("dense") else {"block_size": block, "rank": rank}
    return Case(
        subject="conv", features=(channels, channels), kernel=kernel, stride=stride, image=image, method=method, **own
    )


def _model(name: str, method: str, block: int = 16, rank: int = 2) -> Case:
    own = {} if method.startswith("dense") else {"block_size": (block, block), "rank": rank}
    return Case(subject=name, method=method, **own)


SQUARE, WIDE, NARROW = (768, 768), (768, 3072), (3072, 768)

# Forward + backward of a layer, and a training step of a model, over dense: see `limit` for where they hold.
LIMITS: dict[Case, float] = {
    _layer(SQUARE, "kron", 16, 1): 0.32,
    _layer(SQUARE, "kron", 16, 2): 0.45,
    _layer(SQUARE, "kron", 16, 4): 0.80,
    _layer(SQUARE, "kron", 32, 1): 0.27,
    _layer(SQUARE, "kron", 32, 2): 0.45,
    _layer(SQUARE, "kron", 8, 1): 0.45,
    _layer(SQUARE, "kron", 8, 2): 0.73,
    _layer(WIDE, "kron", 16, 1): 0.25,
    _layer(NARROW, "kron", 16, 1): 0.39,
    _layer((1024, 1024), "kron", 16, 2): 0.40,
    _layer(SQUARE, "kron", (4, 64), 8): 0.60,
    _model("vit-s/16", "kron", 16, 2): 0.75,
}
SIZES = (192, 384, 768, 1024)
GRID = [
    _layer((size, size), "kron", block, rank)
    for size, block, rank in product(SIZES, (2, 4, 8, 16, 32, 64), range(1, 9))
    if rank <= block * block
]
WAYS = ("kron", *(f"kron-{name}" for name in PATHS))
CHOICES = [
    _layer(features, method, block, rank)
    for several, blocks in ((((192, 192), (384, 384), SQUARE), (4, 8, 16, 32, 64)), ((WIDE, NARROW), (16,)))
    for features, block, rank in product(several, blocks, (1, 2, 4, 8))
    for method in WAYS
]
NAMES = ("vit-s/16", "swin-t", "vit-b/16")
RIVALS = ("dense-compiled", "kron", "kron-compiled", "vec-parallel", "lora", "lokr")
LAYERS = [
    _layer(features, method, block, rank)
    for features in (SQUARE, WIDE)
    for block, rank in ((16, 1), (16, 2), (16, 4), (8, 1), (8, 2), (32, 1), (32, 2), (32, 4), (64, 1))
    for method in ("kron", "vec-parallel")
]
LAYERS += [_layer(features, method) for features in (SQUARE, WIDE) for method in RIVALS + WAYS]
LAYERS += [
    _layer(SQUARE, method, block, 2, sparsity)
    for method in ("bsr", "kron", "kron-folded")
    for block in (16, 32)
    for sparsity in (0.5, 0.9)
]
MODELS = [_model(name, method) for methods in (RIVALS, WAYS[1:]) for name in NAMES for method in methods]
MODELS += [_model("vit-s/16", "kron", block, rank) for block, rank in ((16, 1), (16, 4), (8, 1), (8, 2), (32, 1))]
# For calls of few tokens: --threads 1 --tokens 1, 16, 197.
FEW = [
    _layer(features, method, block, rank)
    for features in ((192, 192), (384, 384), SQUARE, WIDE)
    for block, rank in ((16, 1), (16, 2), (8, 1))
    for method in ("kron", "kron-folded")
]
# The setting in which the authors of the method measured: --tokens 20000.
AUTHORS = [_layer((1024, 1024), method, 8, rank) for rank in (1, 2, 4) for method in ("kron", "vec-parallel")]
# Square convolutions, and the three ways of computing them.
CONVOLUTIONS = [
    _conv(channels, kernel, image, block, rank, method, stride)
    for channels, kernel, image, block, rank, stride in (
        *((64, 3, 32, block, 1, 1) for block in ((4, 4), (8, 8), (16, 16), (16, 4), (4, 16))),
        *((64, 3, 32, (8, 8), rank, 1) for rank in (2, 3, 4)),
        *((256, 3, 14, (16, 16), rank, 1) for rank in (1, 2, 4)),
        *((256, 1, 14, (16, 16), rank, 1) for rank in (1, 2, 4)),
        (128, 3, 28, (8, 8), 1, 2),
    )
    for method in ("kron", *(f"conv-{way}".replace("_", "-") for way in CONVOLUTION_WAYS))
]
SMALL = [name for name in METHODS if "compiled" not in name]
TINY = [_layer((32, 64), method, 4) for method in SMALL if "layer" in METHODS[method].subjects]
TINY += [_conv(8, 3, 6, (4, 2), 2, method) for method in SMALL if "conv" in METHODS[method].subjects]
TINY += [_model("tiny-vit", method, 4) for method in SMALL if "model" in METHODS[method].subjects]

SUITES: dict[str, list[Case]] = {
    "bars": list(LIMITS),
    "grid": GRID,
    "paths": CHOICES,
    "layers": list(dict.fromkeys(LAYERS)),
    "few": FEW,
    "authors": AUTHORS,
    "models": list(dict.fromkeys(MODELS)),
    "convolutions": CONVOLUTIONS,
    "tiny": TINY,
}


def limit(case: Case, conditions: Conditions) -> float | None:
    """The share of dense's time that a case may take, for float32 on a CPU, 4,096 tokens and 8 images."""
    if (conditions.device, conditions.dtype) != ("cpu", "float32"):
        return None
    return LIMITS.get(case) if (conditions.tokens, conditions.batch) == (4096, 8) else None
