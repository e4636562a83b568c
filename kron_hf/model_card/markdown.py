"""Text as Markdown shows it: literally, whoever wrote it."""

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from kron_hf.escaping import printable

__all__ = ["MARKER", "escape_markdown", "fenced", "public_name", "table"]

MARKER = "<!-- written by kron_hf -->"


def escape_markdown(text: str) -> str:
    """Text as Markdown shows it literally, on one line: no markup, HTML, link or table cell can start in it."""
    text = printable(" ".join(text.split()))
    text = re.sub(r"([\\`*_{}\[\]#|~$])", r"\\\1", text)
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    # GitHub makes links of bare addresses.
    return text.replace("://", ":&#47;/").replace("www.", "www&#46;").replace("@", "&#64;")


def fenced(code: str, language: str) -> str:
    """A code block whose fence is longer than any run of backticks inside."""
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", code)), default=0))
    return f"{fence}{language}\n{code.rstrip()}\n{fence}"


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table whose cells are Markdown already."""
    rule = ["---", *("---:" for _ in header[1:])]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, rule, *rows))


def public_name(name: str) -> str:
    """A name as it may be published: of a local path only the last part."""
    return Path(name).name if name.startswith((".", "~")) or Path(name).is_absolute() else name
