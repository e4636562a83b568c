"""Copies the image processor or tokenizer that lies beside a saved model."""

import shutil
from pathlib import Path

from huggingface_hub import snapshot_download

__all__ = ["ProcessorFiles"]

NAMES = (
    *("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json"),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.txt", "vocab.json", "merges.txt", "spiece.model", "tokenizer.model", "sentencepiece.bpe.model"),
)


class ProcessorFiles:
    """The files of the processors of a saved model; saving them copies them as they are.

    Args:
        source: Directory, or id on the Hub.
    """

    def __init__(self, source: str) -> None:
        self.folder = (
            Path(source) if Path(source).is_dir() else Path(snapshot_download(source, allow_patterns=[*NAMES]))
        )

    def save_pretrained(self, folder: str | Path) -> None:
        """Copies those that there are."""
        for name in NAMES:
            if (self.folder / name).is_file():
                shutil.copyfile(self.folder / name, Path(folder, name))
