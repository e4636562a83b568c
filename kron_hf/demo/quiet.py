"""Keeps the output of the command line clean."""

from collections.abc import Iterator
from contextlib import contextmanager

import transformers

__all__ = ["quiet_transformers"]


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Turns off transformers' bars for reading and writing files; its warnings stay."""
    logging = transformers.utils.logging
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
