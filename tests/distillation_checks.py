"""Checks of distillation on two processes: DDP and FSDP2, with parts of a model that no loss reaches."""

import torch
from distributed_trainer_checks import fsdp, state_on_cpu, whole_state
from tiny_distillation import BACKBONES, images, student, teacher
from tiny_training import arguments
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel
from two_processes import main

from kron_hf.trainer.kron_trainer import KronTrainer

GLOBAL_BATCH, STEPS = 8, 6
# name: the student and its teacher, whether there are labels, weights, arguments of Trainer on two processes
CASES = {
    "ddp": ("head", True, {}, {}),
    "ddp_accumulated": ("head", True, {}, {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2}),
    "ddp_unlabelled": ("head", False, {}, {}),
    "ddp_backbone_with_a_pooler": ("backbone", False, {}, {}),
    "ddp_tokens_alone": ("head", True, {"logits": 0, "cls": 0, "hidden": 0, "task": 0}, {}),
    "fsdp2": ("head", True, {}, fsdp("FULL_STATE_DICT")),
}


def backbone(seed):
    torch.manual_seed(seed)
    return BACKBONES["vit"]().double()


def trainer(folder, name, processes, **options):
    kind, labels, weights, own = CASES[name]
    options = {"per_device_train_batch_size": GLOBAL_BATCH // processes, **(own if processes > 1 else {}), **options}
    options = {"max_steps": STEPS, "logging_steps": 2, "learning_rate": 1e-3, "save_strategy": "no", **options}
    models = (student(), teacher()) if kind == "head" else (backbone(1), backbone(0))
    rows, args = images(labels=labels), arguments(folder, **options)
    state_on_cpu(allow_fsdp="fsdp" in options)  # after the arguments, which make a state of their own
    return KronTrainer(
        models[0],
        args,
        train_dataset=rows,
        eval_dataset=rows[:16],
        teacher=models[1],
        distillation=weights,
    )


def logged(run):
    keys = {key for entry in run.state.log_history for key in entry if key == "loss" or "distill" in key}
    return [{key: entry[key] for key in keys if key in entry} for entry in run.state.log_history]


def check(name):
    def train(folder):
        run = trainer(folder, name, 2)
        run.train()
        assert run.accelerator.num_processes == 2
        assert isinstance(run.model_wrapped, FSDPModule if "fsdp" in name else DistributedDataParallel)
        assert not isinstance(run.distillation_loss.teacher, (FSDPModule, DistributedDataParallel))
        if CASES[name][1]:
            run.evaluate()
        state = whole_state(run.model)
        if run.is_world_process_zero():
            torch.save(state, folder / "state.pt")
        return logged(run)

    return train


CHECKS = list(CASES)

if __name__ == "__main__":
    main({name: check(name) for name in CASES})
