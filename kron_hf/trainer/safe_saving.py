"""A Trainer whose checkpoints are never half-written.

Private methods of transformers' Trainer are overridden in this file and in no other: `_save_checkpoint`,
`_get_output_dir`, `_push_from_checkpoint`, `_run_epoch`, `_finalize_training`, `_save`.
"""

import os
import shutil
from pathlib import Path
from typing import Any

from torch import nn
from transformers import Trainer

from kron_hf.checkpoint import tensor_names_kept
from kron_hf.trainer.last_checkpoint import last_checkpoint
from kron_hf.trainer.whole_files import (
    discard,
    publish_directory,
    publish_model,
    remove_leftovers,
    saving_errors,
    unfinished,
)

__all__ = ["SafeSaving"]


class SafeSaving(Trainer):
    """`transformers.Trainer` that writes each checkpoint and each saved model under another name, then renames it.

    The stock Trainer writes `checkpoint-N` in place: killed or out of disk space half-way, it leaves a directory that
    the next `train(resume_from_checkpoint=True)` takes up. Here `checkpoint-N` exists only when all ranks have written
    it and it is on the disk. The same holds while old ones are deleted, and for `save_model`. A checkpoint holds the
    names that the model's tensors have, which the stock Trainer looks for when it resumes, but does not write.
    """

    _staging: Path | None = None  # set while a checkpoint is being written

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Removes what a killed run left unfinished, then trains; True resumes from the last complete checkpoint.

        Raises:
            ValueError: True was given, and there is no checkpoint, or none that is complete.
        """
        output_dir = Path(self.args.output_dir or "")
        if self.args.local_process_index == 0:
            remove_leftovers(output_dir)
        self.accelerator.wait_for_everyone()  # that may bring back a checkpoint
        if resume_from_checkpoint is True:
            # Without any checkpoint Trainer says so; without optimizers it resumes from the weights alone.
            resume_from_checkpoint = last_checkpoint(output_dir) or True
            found = _checkpoints(output_dir)
            if resume_from_checkpoint is True and found and not self.args.save_only_model:
                raise ValueError(
                    f"no checkpoint in {output_dir} is complete ({', '.join(path.name for path in found)}): pass the "
                    "path of one to resume from it all the same, or train without resume_from_checkpoint"
                )
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """Trainer would take one step too many when it resumes from the last checkpoint of a training by max_steps."""
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
        else:
            super()._run_epoch(*args, **kwargs)

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._staging) if self._staging is not None else super()._get_output_dir(trial)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        run_dir = Path(self._get_output_dir(trial))
        final = run_dir / f"checkpoint-{self.state.global_step}"
        staging = unfinished(final)
        written, state_file = staging / final.name, staging / final.name / "trainer_state.json"
        if self.args.should_save:
            shutil.rmtree(staging, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        with saving_errors(staging, final):
            self._staging = staging
            try:
                with tensor_names_kept(self.accelerator.unwrap_model(model)):
                    super()._save_checkpoint(model, trial)
            finally:
                self._staging = None
                self._name_best(run_dir, self.state.global_step)
            if self.args.should_save:
                self.state.save_to_json(str(state_file))
            self.accelerator.wait_for_everyone()
            # Where the state that the first process wrote is not seen, a node has a directory of its own.
            elsewhere = self.args.local_process_index == 0 and written.is_dir() and not state_file.exists()
            self.accelerator.wait_for_everyone()  # all have looked before any renames
            if self.args.should_save or elsewhere:
                publish_directory(written, final)
                staging.rmdir()
        self.accelerator.wait_for_everyone()
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(final))
        if self.args.should_save:
            self._rotate(run_dir, final)

    def _name_best(self, run_dir: Path, writing: int | None = None) -> None:
        """What Trainer does itself, but for the directory under which it looks for the best checkpoint."""
        best = self.state.best_global_step
        if best and (best == writing or (run_dir / f"checkpoint-{best}").is_dir()):
            self.state.best_model_checkpoint = os.path.join(run_dir, f"checkpoint-{best}")  # noqa: PTH118

    def _rotate(self, run_dir: Path, newest: Path) -> None:
        limit, best = self.args.save_total_limit, self.state.best_model_checkpoint
        if limit is None or limit <= 0:
            return
        checkpoints = _checkpoints(run_dir)
        protected = [path for path in checkpoints if path == newest or (best and _is_same(path, best))]
        others = [path for path in checkpoints if path not in protected]
        for path in others[: max(0, len(checkpoints) - max(limit, len(protected)))]:
            discard(path)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if self._staging is None:  # Trainer calls this before the checkpoint is complete
            super()._push_from_checkpoint(checkpoint_folder)

    def _finalize_training(self, trial: Any, num_train_samples: Any, start_time: Any) -> Any:
        run_dir = Path(self._get_output_dir(trial))
        if self.state.best_model_checkpoint is None:  # Trainer forgets it if that path leads nowhere when it resumes
            self._name_best(run_dir)
        best = self.state.best_model_checkpoint
        if self.args.should_save and best is not None and Path(best).is_dir() and self.args.save_total_limit == 1:
            # Trainer would delete these in place: the last checkpoint, which a resumed run takes up.
            for path in _checkpoints(run_dir):
                if not _is_same(path, best):
                    discard(path)
        return super()._finalize_training(trial, num_train_samples, start_time)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        if self._staging is not None:
            super()._save(output_dir, state_dict)
            return
        target = Path(output_dir or self.args.output_dir or "")
        staging = unfinished(target / "model")
        if self.args.should_save:
            shutil.rmtree(staging, ignore_errors=True)
            target.mkdir(parents=True, exist_ok=True)
        with saving_errors(staging, target):
            super()._save(str(staging), state_dict)
            if self.args.should_save:
                publish_model(staging, target)


def _is_same(path: Path, other: str) -> bool:
    return path.resolve() == Path(other).resolve()


def _checkpoints(run_dir: Path) -> list[Path]:
    """The checkpoints of a run, oldest first; by number where the file system tells no times."""
    found = [path for path in run_dir.glob("checkpoint-*") if path.is_dir() and path.name[11:].isdigit()]
    return sorted(found, key=lambda path: (path.stat().st_mtime_ns, int(path.name[11:])))
