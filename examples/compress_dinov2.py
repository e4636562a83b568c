"""Makes DINOv2 with a head for Fashion-MNIST smaller, heals it, and compares it with the dense model.

python examples/compress_dinov2.py --target-params 0.25
"""

import argparse
import copy
import os
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch: small models on few cores spin in OpenMP otherwise

import torch
from torch.utils.data import Subset
from transformers import AutoModelForImageClassification, Trainer, TrainingArguments, ViTImageProcessorPil

from kron_hf import KronConfig, KronTrainer, calibrate, kron_summary, write_model_card
from kron_hf.compress.head import fit_head
from kron_hf.data.examples import Examples
from kron_hf.data.sources import load_splits

IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="facebook/dinov2-small", help="directory or id of a DINOv2 backbone")
    parser.add_argument("--dataset", default="fashion_mnist", help="as for kron-hf train")
    parser.add_argument("--output-dir", default="runs/dinov2")
    parser.add_argument("--image-size", type=int, default=56, help="pixels a side; DINOv2 takes multiples of 14")
    parser.add_argument("--target-params", type=float, default=0.25, help="share of the layers' parameters to keep")
    parser.add_argument("--calibration-images", type=int, default=2000)
    parser.add_argument("--distill-steps", type=int, default=500)
    parser.add_argument("--finetune-steps", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def arguments(options: argparse.Namespace, steps: int, learning_rate: float) -> TrainingArguments:
    """For one training."""
    return TrainingArguments(
        output_dir=options.output_dir,
        max_steps=steps,
        per_device_train_batch_size=32,
        per_device_eval_batch_size=64,
        learning_rate=learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=0.05,  # a share of all steps
        weight_decay=0.05,
        logging_steps=50,
        save_strategy="no",
        report_to="none",
        seed=options.seed,
    )


def accuracy(model: Any, images: Examples, options: argparse.Namespace) -> float:
    """Share of the images that a model gets right."""
    predicted = Trainer(model, arguments(options, 1, 0.0)).predict(images)
    return float((predicted.predictions.argmax(-1) == predicted.label_ids).mean())


def main() -> None:
    """Fits a head, calibrates, distils, fine-tunes, compares and saves."""
    options = parse_arguments()
    torch.manual_seed(options.seed)
    splits = load_splits(options.dataset)
    size = {"height": options.image_size, "width": options.image_size}
    processor = ViTImageProcessorPil(size=size, **IMAGENET)
    train, validation, test = (
        Examples(images, processor, channels=3) for images in (splits.train, splits.validation, splits.test)
    )
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(options.seed)).tolist()

    # The dense classifier: the backbone as it is, and a head fitted to its features.
    labels = {"id2label": dict(enumerate(splits.label_names)), "num_labels": len(splits.label_names)}
    dense = AutoModelForImageClassification.from_pretrained(options.model, **labels)
    fit_head(dense, Subset(train, order[:10_000]), validation)

    # Block sizes and ranks, chosen and fitted layer by layer, without a gradient step.
    images = Subset(train, order[: options.calibration_images])
    calibration = calibrate(dense, KronConfig(target_params=options.target_params), images)
    print(calibration.result)
    model = calibration.convert(copy.deepcopy(dense))
    print(f"calibrated: validation accuracy {accuracy(model, validation, options):.4f}")

    # Distillation needs no labels. The fitted factors get no rate of their own.
    trainer = KronTrainer(
        model,
        arguments(options, options.distill_steps, 1e-5),
        train_dataset=train,
        teacher=dense,
        distillation={"task": 0},
        factor_lr=1.0,
    )
    trainer.train()
    print(f"distilled: validation accuracy {accuracy(model, validation, options):.4f}")
    KronTrainer(model, arguments(options, options.finetune_steps, 1e-5), train_dataset=train, factor_lr=1.0).train()
    print(f"fine-tuned: validation accuracy {accuracy(model, validation, options):.4f}")

    scores = {name: accuracy(each, test, options) for name, each in (("dense", dense), ("compressed", model))}
    summary = kron_summary(model)
    print(f"test accuracy: dense {scores['dense']:.4f}, compressed {scores['compressed']:.4f}")
    print(f"deployed parameters: dense {summary.dense_params:,}, compressed {summary.deployed_params:,}")
    model.save_pretrained(options.output_dir)
    processor.save_pretrained(options.output_dir)
    calibration.result.plot(f"{options.output_dir}/calibration.png")
    figures = {"accuracy": scores["compressed"]}
    write_model_card(model, options.output_dir, dataset=f"{splits.name} (test images)", metrics=figures)


if __name__ == "__main__":
    main()
