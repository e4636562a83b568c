"""Block norms as a small PNG: blank where a block is exactly zero, darker the larger its norm."""

import struct
import zlib

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import adaptive_max_pool2d

__all__ = ["MAX_CELLS", "heatmap"]

MAX_CELLS = 384  # along a side; of larger layers a cell shows the largest norm among its blocks
# From light to dark blue and violet: ordered by lightness, so it reads without colour vision. Index 0 is transparent.
STOPS = ((0.0, (158, 202, 225)), (0.5, (0, 114, 178)), (1.0, (46, 20, 94)))


def heatmap(norms: Tensor, alive: Tensor) -> bytes:
    """An 8-bit palette PNG.

    Args:
        norms: Norm of each block, `[O, I]`; what is not finite is drawn as the largest.
        alive: Which blocks are not zero, bool `[O, I]`.
    """
    norms = norms.float().nan_to_num(nan=torch.inf)
    largest = norms[norms.isfinite()].max() if bool(norms.isfinite().any()) else norms.new_ones(())
    scaled = (norms / largest.clamp_min(torch.finfo(torch.float32).tiny)).clamp(0, 1)
    levels = torch.where(alive, 1 + (254 * scaled).round(), torch.zeros_like(scaled))
    size = [min(side, MAX_CELLS) for side in levels.shape]
    if size != list(levels.shape):
        levels = adaptive_max_pool2d(levels[None], size)[0]
    return _png(levels.to(torch.uint8).numpy())


def _png(levels: "np.ndarray[tuple[int, int], np.dtype[np.uint8]]") -> bytes:
    height, width = levels.shape
    rows = b"".join(b"\0" + row.tobytes() for row in levels)  # each begins with its filter, none
    places, colours = [place for place, _ in STOPS], np.array([colour for _, colour in STOPS], dtype=float)
    ramp = np.stack([np.interp(np.linspace(0, 1, 255), places, channel) for channel in colours.T], axis=1)
    palette = b"\xff\xff\xff" + ramp.round().astype(np.uint8).tobytes()
    chunks = (
        (b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 3, 0, 0, 0)),
        (b"PLTE", palette),
        (b"tRNS", b"\0"),
        (b"IDAT", zlib.compress(rows, 9)),
        (b"IEND", b""),
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(*chunk) for chunk in chunks)


def _chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
