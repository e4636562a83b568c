"""Text in and out of the domain of the task: verses of the King James Bible, to be told apart by kind of book.

In domain: what `bible -f Gen1:1-Rev22:21` of Debian's package bible-kjv prints. Out of it: the quips of Debian's
package fortunes, a folder of files that separate them by lines of one percent sign.
"""

import re
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor

__all__ = ["KINDS", "Texts", "encoded", "quips", "verses"]

LENGTH = 40  # tokens; longer texts are cut
KINDS = {
    "law": "Ge Exo Lev Num Deu",
    "history": "Josh Jdgs Ruth 1Sm 2Sm 1Ki 2Ki 1Chr 2Chr Ezra Neh Est",
    "poetry": "Job Psa Prv Eccl SSol",
    "major prophets": "Isa Jer Lam Eze Dan",
    "minor prophets": "Hos Joel Amos Obad Jonah Mic Nahum Hab Zep Hag Zec Mal",
    "gospels": "Mat Mark Luke John Acts",
    "letters of Paul": "Rom 1Cor 2Cor Gal Eph Phi Col 1Th 2Th 1Tim 2Tim Titus Phmn Heb",
    "other letters, revelation": "Jas 1Pet 2Pet 1Jn 2Jn 3Jn Jude Rev",
}


@dataclass(frozen=True, kw_only=True)
class Texts:
    """Verses and the index of their kind, in an order drawn once for all."""

    lines: list[str]
    labels: Tensor

    def part(self, start: int, stop: int | None = None) -> "Texts":
        """Some of them."""
        return Texts(lines=self.lines[start:stop], labels=self.labels[start:stop])


def verses(path: Path) -> Texts:
    """Reads a file of lines `Ge1:1 In the beginning ...`.

    Raises:
        ValueError: A line is of another form, or its book is unknown.
    """
    kind_of = {book: index for index, books in enumerate(KINDS.values()) for book in books.split()}
    lines, labels = [], []
    for line in path.read_text(encoding="utf-8").splitlines():
        found = re.fullmatch(r"(\d?[A-Za-z]+)\d+:\d+ (.+)", line)
        if found is None or found[1] not in kind_of:
            raise ValueError(f"{path.name}: a line must be like 'Ge1:1 In the beginning', got {line[:40]!r}")
        lines.append(found[2])
        labels.append(kind_of[found[1]])
    order = torch.randperm(len(lines), generator=torch.Generator().manual_seed(0))
    return Texts(lines=[lines[index] for index in order], labels=torch.tensor(labels)[order])


def quips(folder: Path, count: int, seed: int = 0) -> list[str]:
    """Some quips of a folder of fortune files.

    Raises:
        ValueError: There are not as many.
    """
    files = sorted(path for path in folder.iterdir() if path.suffix == "" and path.is_file())
    texts = [text for path in files for text in path.read_text(encoding="utf-8", errors="replace").split("\n%\n")]
    found = [" ".join(text.split()) for text in texts if text.strip(" %\n")]
    if len(found) < count:
        raise ValueError(f"{folder.name} must hold at least {count} quips, has {len(found)}")
    order = torch.randperm(len(found), generator=torch.Generator().manual_seed(seed))
    return [found[index] for index in order[:count]]


def encoded(tokenizer: Tokenizer, lines: list[str]) -> dict[str, Tensor]:
    """A batch of token ids and its attention mask, padded to the longest."""
    tokenizer.enable_truncation(LENGTH)
    tokenizer.enable_padding()
    found = tokenizer.encode_batch(lines)
    return {
        "input_ids": torch.tensor([each.ids for each in found]),
        "attention_mask": torch.tensor([each.attention_mask for each in found]),
    }
