"""Trains a small Kronecker-sparse ViT in a plain Accelerate loop, saves it, loads it again and measures it.

python examples/train_with_accelerate.py --dataset fashion_mnist --output-dir runs/fashion
"""

import argparse
import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch: small models on few cores spin in OpenMP otherwise

import evaluate
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import (
    AutoModelForImageClassification,
    ViTConfig,
    ViTForImageClassification,
    default_data_collator,
    get_cosine_schedule_with_warmup,
)

from kron_hf import KronConfig, Sparsifier, get_kron_model, kron_param_groups, kron_summary
from kron_hf.demo.images import ImageData, load_image_data
from kron_hf.metrics import ACCURACY


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", default="digits", help="digits, fashion_mnist or a folder with IDX files")
    parser.add_argument("--output-dir", default="runs/accelerate")
    parser.add_argument("--block-size", type=int, nargs=2, default=(4, 8), metavar=("OUT", "IN"))
    parser.add_argument("--rank", type=int, default=4)
    parser.add_argument("--target-sparsity", type=float, default=0.5)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--learning-rate", type=float, default=1e-3, help="base rate; A and B get four times as much")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def build_model(data: ImageData, block_size: tuple[int, int], rank: int) -> ViTForImageClassification:
    """A small ViT with random weights and Kronecker layers in all its projections."""
    config = ViTConfig(
        image_size=data.size,
        patch_size=4,
        num_channels=1,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        initializer_range=0.1,
        num_labels=len(data.label_names),
    )
    return get_kron_model(ViTForImageClassification(config), KronConfig(block_size=tuple(block_size), rank=rank))


@torch.no_grad()
def accuracy(accelerator: Accelerator, model: torch.nn.Module, loader: DataLoader) -> float:
    """Accuracy by `evaluate`, over all processes."""
    metric = evaluate.load(ACCURACY)
    model.eval()
    for batch in loader:
        predictions = model(pixel_values=batch["pixel_values"]).logits.argmax(-1)
        gathered = accelerator.gather_for_metrics((predictions, batch["labels"]))
        metric.add_batch(predictions=gathered[0].cpu(), references=gathered[1].cpu())
    return metric.compute()["accuracy"]


def main() -> None:
    """Trains, saves, loads and measures."""
    options = parse_arguments()
    set_seed(options.seed)
    accelerator = Accelerator()
    data = load_image_data(options.dataset)
    model = build_model(data, options.block_size, options.rank)

    train_loader = DataLoader(data.train, options.batch_size, shuffle=True, collate_fn=default_data_collator)
    validation_loader = DataLoader(data.validation, 256, collate_fn=default_data_collator)
    test_loader = DataLoader(data.test, 256, collate_fn=default_data_collator)
    # No weight decay on S, four times the base rate on A and B.
    optimizer = torch.optim.AdamW(kron_param_groups(model, options.learning_rate, weight_decay=0.05))
    model, optimizer, train_loader, validation_loader, test_loader = accelerator.prepare(
        model, optimizer, train_loader, validation_loader, test_loader
    )
    total_steps = options.epochs * len(train_loader)
    schedule = get_cosine_schedule_with_warmup(optimizer, total_steps // 20, total_steps)
    sparsifier = Sparsifier(model, target_sparsity=options.target_sparsity, total_steps=total_steps)
    sparsifier.attach(optimizer)  # prunes after each real step; nothing else to call

    with tqdm(total=total_steps, disable=not accelerator.is_local_main_process) as bar:
        for epoch in range(options.epochs):
            model.train()
            for batch in train_loader:
                loss = model(**batch).loss
                accelerator.backward(loss)
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
                bar.update()
            reached = accuracy(accelerator, model, validation_loader)
            bar.write(
                f"epoch {epoch + 1}: validation accuracy {reached:.4f}, sparsity {kron_summary(model).sparsity:.4f}"
            )

    accelerator.unwrap_model(model).save_pretrained(options.output_dir, is_main_process=accelerator.is_main_process)
    accelerator.wait_for_everyone()
    loaded = AutoModelForImageClassification.from_pretrained(options.output_dir).to(accelerator.device)
    reached = accuracy(accelerator, loaded, test_loader)
    accelerator.print(kron_summary(loaded))
    accelerator.print(f"test accuracy {reached:.4f}, sparsity {kron_summary(loaded).sparsity:.4f}")


if __name__ == "__main__":
    main()
