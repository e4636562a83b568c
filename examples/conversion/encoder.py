"""A small BERT that tells kinds of verses apart: masked words first, the labels then. The dense model of `text`."""

from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.implementations import BertWordPieceTokenizer
from tokenizers.processors import BertProcessing
from torch import Tensor, nn
from tqdm.auto import trange
from transformers import BertConfig, BertForMaskedLM, BertForSequenceClassification

from examples.conversion.verses import KINDS, Texts, encoded

__all__ = ["load_encoder", "train_encoder"]

BATCH = 64
LEARNING_RATE = 5e-4
MASKED = 0.15
VOCABULARY = 4096


def load_encoder(folder: Path) -> tuple[BertForSequenceClassification, Tokenizer]:
    """What `train_encoder` has saved."""
    model = BertForSequenceClassification.from_pretrained(folder)
    return model, Tokenizer.from_file(str(folder / "tokenizer.json"))


def train_encoder(folder: Path, texts: Texts, *, masked_steps: int = 1200, steps: int = 800, layers: int = 4) -> None:
    """Trains tokenizer, encoder and classifier from nothing, and saves them in the folder."""
    torch.manual_seed(0)
    tokenizer = _train_tokenizer(texts.lines)
    sizes = {"hidden_size": 192, "num_hidden_layers": layers, "num_attention_heads": 4, "intermediate_size": 768}
    config = BertConfig(
        vocab_size=tokenizer.get_vocab_size(), max_position_embeddings=64, num_labels=len(KINDS), **sizes
    )
    masked = BertForMaskedLM(config)
    _train(masked, texts, tokenizer, masked_steps, mask=True)
    model = BertForSequenceClassification(config)
    model.bert.load_state_dict(masked.bert.state_dict(), strict=False)  # a masked language model has no pooler
    _train(model, texts, tokenizer, steps, mask=False)
    model.eval().save_pretrained(folder)
    tokenizer.save(str(folder / "tokenizer.json"))


def _train_tokenizer(lines: list[str]) -> Tokenizer:
    tokenizer = BertWordPieceTokenizer()
    tokenizer.train_from_iterator(lines, vocab_size=VOCABULARY, show_progress=False)
    cls, sep = ((token, tokenizer.token_to_id(token)) for token in ("[CLS]", "[SEP]"))
    tokenizer.post_processor = BertProcessing(sep, cls)
    return Tokenizer.from_str(tokenizer.to_str())


def _train(model: nn.Module, texts: Texts, tokenizer: Tokenizer, steps: int, *, mask: bool) -> None:
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps, pct_start=0.1)
    generator = torch.Generator().manual_seed(0)
    for _ in trange(steps, desc="masked words" if mask else "kinds of verses", leave=False):
        chosen = torch.randint(len(texts.lines), (BATCH,), generator=generator)
        batch = encoded(tokenizer, [texts.lines[index] for index in chosen])
        batch |= _masked(batch, tokenizer, generator) if mask else {"labels": texts.labels[chosen]}
        optimizer.zero_grad()
        model(**batch).loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()


def _masked(batch: dict[str, Tensor], tokenizer: Tokenizer, generator: torch.Generator) -> dict[str, Tensor]:
    """Hides some of the words, which become the labels."""
    ids = batch["input_ids"]
    special = torch.tensor([tokenizer.token_to_id(token) for token in ("[PAD]", "[CLS]", "[SEP]")])
    hidden = (torch.rand(ids.shape, generator=generator) < MASKED) & ~torch.isin(ids, special)
    return {
        "input_ids": ids.masked_fill(hidden, tokenizer.token_to_id("[MASK]")),
        "labels": ids.masked_fill(~hidden, -100),
    }
