"""Runs `kron-hf` commands in forks of one process that has imported everything: `python tests/fork_server.py`.

Reads lines of JSON from stdin: `{"arguments": [...], "log": file}` starts a fork and answers with its pid;
`{"wait": pid}` answers with its exit status (negative: the signal that killed it).
"""

import gc
import json
import os
import sys
from pathlib import Path


def preload():
    import evaluate
    import torch
    import transformers.models.vit.image_processing_pil_vit
    import transformers.models.vit.modeling_vit

    import kron_hf.compress.run
    import kron_hf.demo.quiet
    import kron_hf.metrics.accuracy
    import kron_hf.train.run  # noqa: F401

    torch.set_num_threads(1)
    gc.collect()
    gc.freeze()  # otherwise each fork's first collection copies the whole heap
    return evaluate, transformers.models


def run(request):
    from kron_hf.cli import main

    log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(log, stream)
    return main(request["arguments"])


def answer(value):
    sys.stdout.write(f"{json.dumps(value)}\n")
    sys.stdout.flush()


def serve():
    preload()
    answer("ready")
    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            answer(os.waitstatus_to_exitcode(os.waitpid(request["wait"], 0)[1]))
        elif (pid := os.fork()) > 0:
            answer(pid)
        else:
            status = 70
            try:
                status = run(request)
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(status)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent.parent))
    serve()
