"""The client side of the Hub tests: carries out one JSON command a line, each in a fork of its own.

transformers and kron_hf are imported once; every command then starts from the same fresh state and with an own cache.
Run by `hub_client.HubClient`.
"""

import hashlib
import json
import logging
import os
import sys
import time
import traceback
import warnings

import torch
from huggingface_hub import HfApi, constants
from peft import PeftModel, get_peft_model
from transformers import (
    AutoModelForImageClassification,
    Trainer,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
    pipeline,
)
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

import kron_hf
from kron_hf import KronConfig, KronTrainer, get_kron_model
from kron_hf.checkpoint import attach_kron_config
from kron_hf.cli import main
from kron_hf.selection import replace_by_chosen
from kron_hf.selection.groups import candidate_layers

SIZES = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 8,
    "patch_size": 4, "num_channels": 3, "num_labels": 4,
}  # fmt: skip
CONFIG = KronConfig(block_size=4, rank=2)
SHARDS = "8KB"


def build(seed):
    torch.manual_seed(seed)
    return get_kron_model(ViTForImageClassification(ViTConfig(**SIZES)), CONFIG)


def digest(model):
    """One number for all that a model holds: names, shapes, bits."""
    total = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        total.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode() + tensor.contiguous().numpy().tobytes())
    return total.hexdigest()


def push(repo, seed, door="kron", sharded=False, **options):
    if sharded:
        options["max_shard_size"] = SHARDS
    model = build(seed)
    if door == "stock":
        return str(model.push_to_hub(repo, **options))
    return kron_hf.push_to_hub(model, repo, **options).oid


def push_in_selection(repo, drops):
    """Three candidates a layer, of which the first ones have been dropped; returns the digest."""
    torch.manual_seed(drops)
    config = KronConfig(candidate_block_sizes=[2, 4, (4, 8)], candidate_ranks=[1])
    model = get_kron_model(ViTForImageClassification(ViTConfig(**SIZES)), config)
    for layer in candidate_layers(model).values():
        for key in layer.alive[:drops]:
            layer.drop(key)
    if drops == 2:
        replace_by_chosen(model)
    attach_kron_config(model)  # as BlockSizeCallback does
    kron_hf.push_to_hub(model, repo)
    return digest(model)


def push_dense(repo, seed, **options):
    torch.manual_seed(seed)
    return str(ViTForImageClassification(ViTConfig(**SIZES)).push_to_hub(repo, **options))


def pull(repo, **options):
    return digest(AutoModelForImageClassification.from_pretrained(repo, **options))


def expected(seed):
    return digest(build(seed))


def logits(model):
    pixels = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model.eval()(pixels).logits.flatten().tolist()


def push_adapter(repo, base, door="kron", local=False):
    """Returns the logits of the adapted model; `local` takes the base from a folder instead of the Hub."""
    model = AutoModelForImageClassification.from_pretrained(base)
    if local:
        folder = os.path.abspath(f"local-{repo}")  # noqa: PTH100
        model.save_pretrained(folder)
        model = AutoModelForImageClassification.from_pretrained(folder)
    torch.manual_seed(1)
    adapted = get_peft_model(model, KronConfig(block_size=4, rank=2, init_weights="random"))
    if door == "stock":
        adapted.push_to_hub(repo)
    else:
        kron_hf.push_to_hub(adapted, repo)
    return logits(adapted)


def pull_adapter(repo, base=None):
    if base is None:
        return logits(AutoModelForImageClassification.from_pretrained(repo))
    return logits(PeftModel.from_pretrained(AutoModelForImageClassification.from_pretrained(base), repo))


def from_base(repo, pretrained):
    init = "nearest" if pretrained else None
    config = KronConfig(block_size=4, rank=16, init_weights=init, base_model_name_or_path=repo)
    options = {} if pretrained else {"num_labels": 4}
    return type(get_kron_model(config, pretrained=pretrained, **options)).__name__


def push_with_processor(repo, seed, **options):
    processor = ViTImageProcessorPil(size={"height": 8, "width": 8})
    return kron_hf.push_to_hub(build(seed), repo, processor=processor, **options).oid


def classify(repo):
    from PIL import Image

    answers = pipeline("image-classification", repo, top_k=4)(Image.new("RGB", (8, 8), (200, 100, 50)))
    return sorted((answer["label"], answer["score"]) for answer in answers)


def summary(repo):
    return main(["summary", repo])


def train(repo, strategy, trainer="kron", token=False, push_at_end=False):
    """Trains by the (stock or Kron-) Trainer, which pushes; returns the digest of the trained model."""
    torch.manual_seed(0)
    data = [{"pixel_values": torch.randn(3, 8, 8), "labels": index % 4} for index in range(32)]
    # The folder is relative: Trainer publishes it in training_args.bin.
    options = TrainingArguments(
        f"runs/{strategy}-{trainer}-{token}", max_steps=4, save_steps=2, save_strategy="steps", report_to="none",
        use_cpu=True, push_to_hub=True, hub_model_id=repo, hub_strategy=strategy, hub_always_push=True, seed=0,
        per_device_train_batch_size=8, hub_token=os.environ.pop("HF_TOKEN") if token else None,
    )  # fmt: skip
    model = build(3)
    run = (KronTrainer if trainer == "kron" else Trainer)(model, options, train_dataset=data)
    run.train()
    if push_at_end:
        run.push_to_hub()
    return digest(model)


def command_line(words):
    return main(words)


def upload(repo, path, text):
    return HfApi().upload_file(path_or_fileobj=text.encode(), path_in_repo=path, repo_id=repo).oid


NAMES = "push push_dense pull push_adapter pull_adapter expected from_base push_with_processor classify summary"
COMMANDS = {name: globals()[name] for name in f"{NAMES} push_in_selection train command_line upload".split()}


def carry_out(line):
    request = json.loads(line)
    constants.HF_HUB_CACHE = request["cache"]
    constants.HF_HUB_OFFLINE = request["offline"]
    os.environ["HF_TOKEN"] = request["token"]
    answer = {"id": request["id"]}
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            answer["value"] = COMMANDS[request["command"]](**request["arguments"])
        answer["warnings"] = [str(warning.message) for warning in caught]
    except Exception as error:
        traceback.print_exc()
        answer["error"] = f"{type(error).__name__}: {error}"[:1500]
        answer["kinds"] = [kind.__name__ for kind in type(error).__mro__]
    sys.stdout.flush()
    # One write below the size of a pipe's buffer is not torn by other children.
    os.write(int(sys.argv[1]), json.dumps(answer).encode() + b"\n")


if __name__ == "__main__":
    logging.basicConfig(level=logging.DEBUG)
    logging.getLogger("huggingface_hub").setLevel(logging.DEBUG)
    logging.getLogger("transformers").setLevel(logging.DEBUG)
    logging.getLogger("matplotlib").setLevel(logging.INFO)  # it tells its own folders
    real_sleep = time.sleep
    time.sleep = lambda seconds: real_sleep(min(seconds, 0.02))  # the waits between attempts are not what is tested
    torch.set_num_threads(1)
    for command in sys.stdin:
        if os.fork() == 0:
            carry_out(command)
            os._exit(0)
        while True:
            try:
                if os.waitpid(-1, os.WNOHANG)[0] == 0:
                    break
            except ChildProcessError:
                break
