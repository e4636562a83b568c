"""Copies the image processor or tokenizer that lies beside a saved model."""

import shutil
from pathlib import Path

__all__ = ["PROCESSOR_FILES", "ProcessorFiles"]

PROCESSOR_FILES = (
    *("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json"),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.txt", "vocab.json", "merges.txt", "spiece.model", "tokenizer.model", "sentencepiece.bpe.model"),
)


class ProcessorFiles:
    """The files of the processors of a saved model; saving them copies them as they are.

    Args:
        folder: That of the model.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def save_pretrained(self, folder: str | Path) -> None:
        """Copies those that there are."""
        for name in PROCESSOR_FILES:
            if (self.folder / name).is_file():
                shutil.copyfile(self.folder / name, Path(folder, name))
