"""Trains a small Kronecker-sparse ViT with the Trainer, saves it, loads it again and measures it on the test images.

python examples/train_with_trainer.py --dataset fashion_mnist --output-dir runs/fashion
"""

import argparse
import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch: small models on few cores spin in OpenMP otherwise

import evaluate
from transformers import (
    AutoModelForImageClassification,
    EvalPrediction,
    Trainer,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
    set_seed,
)

from kron_hf import KronConfig, KronTrainer, get_kron_model, kron_summary
from kron_hf.demo.images import ImageData, load_image_data
from kron_hf.metrics import ACCURACY


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", default="digits", help="digits, fashion_mnist or a folder with IDX files")
    parser.add_argument("--output-dir", default="runs/trainer")
    parser.add_argument("--block-size", type=int, nargs="+", default=[4, 8], help="one number or two: out, in")
    parser.add_argument("--rank", type=int, default=4)
    parser.add_argument("--target-sparsity", type=float, default=0.5)
    parser.add_argument("--epochs", type=float, default=5)
    parser.add_argument("--max-steps", type=int, default=-1, help="overrides --epochs")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--learning-rate", type=float, default=1e-3, help="base rate; A and B get four times as much")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def build_model(data: ImageData, block_size: list[int], rank: int) -> ViTForImageClassification:
    """A small ViT with random weights and Kronecker layers in all its projections."""
    names = dict(enumerate(data.label_names))
    config = ViTConfig(
        image_size=data.size,
        patch_size=4,
        num_channels=1,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        initializer_range=0.1,
        id2label=names,
        label2id={name: index for index, name in names.items()},
    )
    size = block_size[0] if len(block_size) == 1 else tuple(block_size)
    return get_kron_model(ViTForImageClassification(config), KronConfig(block_size=size, rank=rank))


def main() -> None:
    """Trains, saves, loads and measures."""
    options = parse_arguments()
    set_seed(options.seed)
    data = load_image_data(options.dataset)
    model = build_model(data, options.block_size, options.rank)

    metric = evaluate.load(ACCURACY)

    def compute_metrics(prediction: EvalPrediction) -> dict[str, float]:
        return metric.compute(predictions=prediction.predictions.argmax(-1), references=prediction.label_ids)

    arguments = TrainingArguments(
        output_dir=options.output_dir,
        num_train_epochs=options.epochs,
        max_steps=options.max_steps,
        per_device_train_batch_size=options.batch_size,
        per_device_eval_batch_size=256,
        learning_rate=options.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=0.05,  # a share of all steps
        weight_decay=0.05,
        eval_strategy="epoch",
        save_strategy="no",
        report_to="none",
        remove_unused_columns=False,
        seed=options.seed,
    )
    trainer = KronTrainer(
        model,
        arguments,
        train_dataset=data.train,
        eval_dataset=data.validation,
        compute_metrics=compute_metrics,
        target_sparsity=options.target_sparsity,
    )
    trainer.train()
    trainer.save_model(options.output_dir)

    # From here on as anyone would use it: `import kron_hf` is all that loading needs.
    loaded = AutoModelForImageClassification.from_pretrained(options.output_dir)
    tester = Trainer(loaded, arguments, eval_dataset=data.test, compute_metrics=compute_metrics)
    result = tester.evaluate(metric_key_prefix="test")
    print(kron_summary(loaded))
    print(f"test accuracy {result['test_accuracy']:.4f}, sparsity {kron_summary(loaded).sparsity:.4f}")


if __name__ == "__main__":
    main()
