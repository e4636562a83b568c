"""How text from a stranger's file is shown: printable, on one line, of bounded length.

Names of modules, labels and files may hold terminal escapes, line breaks or characters that reverse the direction of
writing. Nothing of that reaches a terminal, a log or a card raw.
"""

import reprlib
from typing import Any

__all__ = ["one_line", "plain", "printable", "shorten", "shown"]

MAX_NAME = 120
MAX_MESSAGE = 1000

# Bounded in depth, too: a plain repr() of deeply nested JSON ends in a RecursionError.
_REPR = reprlib.Repr()
_REPR.maxlevel, _REPR.maxstring, _REPR.maxother, _REPR.maxlong = 3, MAX_NAME, MAX_NAME, 40
_REPR.maxdict = _REPR.maxlist = _REPR.maxtuple = 4


def shown(value: Any) -> str:
    r"""`repr(value)`, shortened.

    Example:
        >>> shown("fc1\n\x1b[31m")
        "'fc1\\n\\x1b[31m'"
    """
    return shorten(_REPR.repr(value), 2 * MAX_NAME)


def printable(text: str, keep: str = "") -> str:
    r"""Text with every unprintable character written as its escape, but for those in `keep`; no quotes.

    Example:
        >>> printable("fc1\n\x1b[31m")
        'fc1\\n\\x1b[31m'
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in keep else repr(c)[1:-1] for c in text)


def plain(name: str) -> str:
    """A name without quotes, for tables and pictures: printable and shortened."""
    return shorten(printable(name))


def one_line(text: str) -> str:
    """A message on one printable line of bounded length; white space, line breaks too, becomes single spaces."""
    return shorten(printable(" ".join(text.split())), MAX_MESSAGE)


def shorten(text: str, length: int = MAX_NAME) -> str:
    """Text of at most `length` characters: what is cut out of the middle becomes three dots."""
    if len(text) <= length:
        return text
    head = (length - 3) // 2
    return f"{text[:head]}...{text[head + 3 - length :]}"
