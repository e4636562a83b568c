"""Keeps the output of the command line clean."""

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager

import transformers

from kron_hf.escaping import printable

__all__ = ["quiet_transformers"]


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Turns off transformers' bars for reading and writing files; its warnings stay, names in them escaped."""
    shown = transformers.utils.logging.is_progress_bar_enabled()
    transformers.utils.logging.disable_progress_bar()
    handlers = transformers.utils.logging.get_logger().handlers
    for handler in handlers:
        handler.addFilter(_escape)
    try:
        yield
    finally:
        for handler in handlers:
            handler.removeFilter(_escape)
        if shown:
            transformers.utils.logging.enable_progress_bar()


def _escape(record: logging.LogRecord) -> bool:
    # transformers' own colours go, whatever else there is comes out escaped.
    text = re.sub(r"\x1b\[[0-9;]*m", "", record.getMessage())
    record.msg, record.args = printable(text, keep="\n\t"), ()
    return True
