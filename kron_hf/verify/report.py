"""What became of each claim."""

import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from kron_hf.claims.record import is_finite_number
from kron_hf.command.table import aligned
from kron_hf.escaping import plain, shown

__all__ = ["Check", "Report", "compared", "failed", "unchecked"]


@dataclass(frozen=True)
class Check:
    """One claim.

    Attributes:
        claim: What is claimed.
        claimed: The value.
        found: What was found in the files.
        holds: Whether both agree; None if that could not be looked at.
    """

    claim: str
    claimed: str
    found: str
    holds: bool | None

    @property
    def verdict(self) -> str:
        """In words."""
        return {True: "holds", False: "FAILS", None: "not checked"}[self.holds]


@dataclass(frozen=True)
class Report:
    """All claims of a card; `str()` is a table."""

    checks: tuple[Check, ...]

    @property
    def holds(self) -> bool:
        """Whether no claim fails; what was not checked does not count."""
        return all(check.holds is not False for check in self.checks)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {"holds": self.holds, "checks": [asdict(check) for check in self.checks]}

    def __str__(self) -> str:
        rows = [(plain(c.claim), c.verdict, _cell(c.claimed), _cell(c.found)) for c in self.checks]
        counts = {word: sum(row[1] == word for row in rows) for word in ("holds", "FAILS", "not checked")}
        verdict = "every claim that was checked holds" if self.holds else "NOT VERIFIED"
        return (
            f"{aligned([('claim', 'verdict', 'claimed', 'found'), *rows])}\n\n"
            f"{counts['holds']} hold, {counts['FAILS']} fail, {counts['not checked']} not checked: {verdict}"
        )


def compared(claim: str, claimed: Any, found: Any, *, tolerance: float = 0.0) -> Check:
    """A claim about a value that was found again; numbers may differ by the tolerance, relative to both."""
    holds = type(claimed) is type(found) and claimed == found
    if is_finite_number(claimed) and is_finite_number(found):
        holds = abs(claimed - found) <= tolerance * max(1.0, abs(claimed), abs(found))
    return Check(claim, _written(claimed), _written(found), holds)


def failed(claim: str, error: Exception | str) -> Check:
    """A claim that could not be looked at because of what the files are."""
    return Check(claim, "", str(error), False)


def unchecked(claims: Iterable[tuple[str, Any]], why: str) -> list[Check]:
    """Claims that files alone cannot confirm."""
    return [Check(claim, _written(claimed), why, None) for claim, claimed in claims]


def _cell(text: str) -> str:
    """Of a checksum its beginning is enough to read."""
    return f"{text[:12]}..." if re.fullmatch("[0-9a-f]{64}", text) else plain(text)


def _written(value: Any) -> str:
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) < 10**30:
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.6g}"
    return value if isinstance(value, str) else shown(value)
