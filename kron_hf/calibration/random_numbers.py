"""The same random numbers whenever something is done again."""

import random
from collections.abc import Iterator
from contextlib import contextmanager

import torch

__all__ = ["same_random_numbers"]


@contextmanager
def same_random_numbers(seed: int) -> Iterator[None]:
    """The random states of torch (CPU and CUDA) and Python begin at a seed, and are put back afterwards."""
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    state = random.getstate()
    with torch.random.fork_rng(devices):  # named: without, it warns of more than one
        torch.default_generator.manual_seed(seed)
        for device in devices:
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        random.seed(seed)
        try:
            yield
        finally:
            random.setstate(state)
