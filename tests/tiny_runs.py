"""The smallest `kron-hf train` that does everything: a folder of IDX files, a ViT of one layer, many checkpoints."""

import json
import os
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

TINY_VIT = {
    "image_size": 8,
    "patch_size": 4,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "initializer_range": 0.1,
}
OVERRIDES = ",".join(f"{key}={value}" for key, value in TINY_VIT.items())
SIZES = ["--model-type", "vit", "--config-overrides", OVERRIDES]
TIMES = ("runtime", "per_second")


def write_idx(path, array):
    header = bytes([0, 0, 8, array.ndim]) + b"".join(size.to_bytes(4, "big") for size in array.shape)
    path.write_bytes(header + array.astype(np.uint8).tobytes())


def pictures(count, size=8, seed=0):
    """Noise with one bright quadrant, which is the class."""
    generator = np.random.RandomState(seed)
    labels, images, half = np.arange(count) % 4, generator.randint(0, 128, (count, size, size)), size // 2
    for image, label in zip(images, labels, strict=True):
        row, column = divmod(int(label), 2)
        image[half * row : half * (row + 1), half * column : half * (column + 1)] += 100
    return images.astype(np.uint8), labels


def write_idx_folder(folder, train=80, test=16):
    folder.mkdir(parents=True)
    for kind, count in (("train", train), ("t10k", test)):
        images, labels = pictures(count, seed=count)
        write_idx(folder / f"{kind}-images-idx3-ubyte", images)
        write_idx(folder / f"{kind}-labels-idx1-ubyte", labels)
    return folder


def command(data, output_dir, *more, steps=100, every=5):
    return [
        *("train", *SIZES, "--dataset", str(data), "--output-dir", str(output_dir)),
        *("--block-size", "4", "--rank", "2", "--target-sparsity", "0.5", "--sparsity-interval", "5"),
        *("--max-steps", str(steps), "--save-strategy", "steps", "--save-steps", str(every)),
        *("--logging-steps", str(every), "--per-device-train-batch-size", "8", "--horizontal-flip"),
        *("--learning-rate", "0.003"),
        *("--use-cpu", "--disable-tqdm", "True", *map(str, more)),
    ]


class ForkServer:
    """Starts commands in forks of `fork_server.py`."""

    def __init__(self, process):
        self.process = process
        assert self._answer() == "ready"

    def start(self, arguments, log, **options):
        return self._ask({"arguments": arguments, "log": str(log), **options})

    def wait(self, pid):
        return self._ask({"wait": pid})

    def run(self, arguments, log, **options):
        return self.wait(self.start(arguments, log, **options))

    def _ask(self, request):
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return self._answer()

    def _answer(self):
        line = self.process.stdout.readline()
        assert line, "the fork server ended"
        return json.loads(line)


@contextmanager
def fork_server():
    script = Path(__file__).with_name("fork_server.py")
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, script], stdin=pipe, stdout=pipe, text=True, env=environment) as process:
        try:
            yield ForkServer(process)
        finally:
            process.stdin.close()
            process.wait()


def checkpoints(output_dir):
    found = [path for path in output_dir.glob("checkpoint-*") if path.is_dir()]
    return sorted(found, key=lambda path: int(path.name.removeprefix("checkpoint-")))


def state_of(checkpoint):
    """trainer_state.json without times and paths."""
    state = json.loads((checkpoint / "trainer_state.json").read_text())
    best = state["best_model_checkpoint"]
    state["best_model_checkpoint"] = best and Path(best).name
    state["log_history"] = [
        {key: value for key, value in entry.items() if not key.endswith(TIMES)} for entry in state["log_history"]
    ]
    return state


def assert_same_checkpoint(checkpoint, expected):
    """Every file of a checkpoint, bit for bit."""
    assert {path.name for path in checkpoint.iterdir()} == {path.name for path in expected.iterdir()}
    assert_equal(load_file(checkpoint / "model.safetensors"), load_file(expected / "model.safetensors"))
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        assert_equal(*(torch.load(path / name, weights_only=False) for path in (checkpoint, expected)))
    for name in ("config.json", "preprocessor_config.json"):
        assert (checkpoint / name).read_bytes() == (expected / name).read_bytes()
    assert state_of(checkpoint) == state_of(expected)


def assert_equal(value, expected):
    """Equality through dicts and sequences, NaN and shape included."""
    assert type(value) is type(expected)
    if isinstance(expected, torch.Tensor | np.ndarray):
        torch.testing.assert_close(torch.as_tensor(value), torch.as_tensor(expected), rtol=0, atol=0, equal_nan=True)
    elif isinstance(expected, dict):
        assert value.keys() == expected.keys()
        for key in expected:
            assert_equal(value[key], expected[key])
    elif isinstance(expected, list | tuple):
        assert len(value) == len(expected)
        for item, other in zip(value, expected, strict=True):
            assert_equal(item, other)
    else:
        assert value == expected
