"""`push_to_hub`: a model, its card and its image processor in one commit."""

import json
import re
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import httpx
from peft import PeftModel
from torch import nn

from kron_hf.claims import CLAIMS_FILE
from kron_hf.model_card import MARKER, PICTURES, base_name, write_model_card

__all__ = ["push_to_hub"]

# from_pretrained prefers a whole file to shards, so weights of an earlier push must not stay beside the new ones.
WEIGHTS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json")
ADAPTER = re.compile(r"adapter_config\.json|adapter_model\.(safetensors|bin)")
OURS = ("README.md", CLAIMS_FILE, *PICTURES)
OVERTAKEN = 412
TRANSIENT = {408, 429, 500, 502, 503, 504}
PAUSES = (0, 1, 2, 4, 8)  # seconds before each attempt


def push_to_hub(
    model: nn.Module,
    repo_id: str,
    *,
    processor: Any = None,
    dataset: str | None = None,
    metrics: Mapping[str, float] | None = None,
    card: Mapping[str, Any] | None = None,
    private: bool | None = None,
    token: str | None = None,
    commit_message: str = "Upload model",
    revision: str | None = None,
    create_pr: bool = False,
    max_shard_size: int | str = "50GB",
) -> CommitInfo:
    """Uploads a model with the card of `write_model_card`, in one commit: the repository has all of it or nothing.

    Unlike a model's own `push_to_hub` it removes weight files that the new ones replace, and it never mixes with
    another process that pushes to the same revision: who is overtaken starts again on top of the other's commit.
    A card that kron_hf did not write is kept.

    Args:
        model: A model with `save_pretrained`, or a `PeftModel`; of that only the adapter is uploaded, and the name of
            its base model unless that is a local folder.
        repo_id: Repository, `user/name` or `name`; created if there is none.
        processor: Image processor or tokenizer to save beside the model.
        dataset: Data set that the metrics were measured on; needed with them.
        metrics: Figures of the model by name, such as `{"accuracy": 0.97}`.
        card: Further arguments of `write_model_card`, such as `{"license": "apache-2.0"}`.
        private: Whether a new repository is private; None is the account's default.
        token: Access token; None is the one logged in with.
        commit_message: Title of the commit.
        revision: Branch to commit to, created if there is none; None is `main`.
        create_pr: Whether to open a pull request instead of committing to the branch.
        max_shard_size: Largest weight file, in bytes or as in "5GB".

    Returns:
        The commit; of the last one, if nothing has changed.

    Raises:
        TypeError: The model has no `save_pretrained`.
        OSError: The Hub refused, or did not answer repeatedly; the branch then holds what it held before. Only if the
            answer to the very last attempt was lost it may hold the whole new commit.
    """
    save: Any = getattr(model, "save_pretrained", None)
    if save is None:
        raise TypeError(f"push_to_hub needs a model with save_pretrained, got {type(model).__name__}")
    api = HfApi(token=token)
    with TemporaryDirectory() as name:
        folder = Path(name)
        save(folder, max_shard_size=max_shard_size)
        if isinstance(model, PeftModel) and base_name(model) is None:
            _leave_out_base(folder / "adapter_config.json")
        if processor is not None:
            processor.save_pretrained(folder)
        card = {"dataset": dataset, "metrics": metrics, **(card or {}), "overwrite": True}
        write_model_card(model, folder, name=repo_id, **card)  # what is wrong with it is said before the Hub is asked

        def attempt() -> CommitInfo:
            full_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
            if full_id != repo_id:
                write_model_card(model, folder, name=full_id, **card)
            if revision is not None and not revision.startswith("refs/"):
                api.create_branch(full_id, branch=revision, exist_ok=True)
            return _commit(api, folder, full_id, revision, create_pr, commit_message)

        return _repeat(attempt, repo_id, once=create_pr)


def _leave_out_base(config_file: Path) -> None:
    """A folder of this machine is of no use to others, and tells whose machine it is."""
    config = json.loads(config_file.read_text(encoding="utf-8"))
    if config["base_model_name_or_path"]:
        warnings.warn(
            "the adapter's base model is a local folder, which is not published; who loads the adapter has to know it",
            stacklevel=3,
        )
    config["base_model_name_or_path"] = None
    config_file.write_text(json.dumps(config, indent=2, sort_keys=True), encoding="utf-8")


def _commit(api: HfApi, folder: Path, repo_id: str, revision: str | None, create_pr: bool, message: str) -> CommitInfo:
    """One attempt: on top of the commit that it has seen, or not at all."""
    info = api.model_info(repo_id, revision=revision)
    present = {file.rfilename for file in info.siblings or []}
    files = {path.name: path for path in folder.iterdir() if path.is_file()}
    card = _read_card(api, repo_id, info.sha) if "README.md" in present else MARKER
    if MARKER not in card:
        for name in OURS:
            files.pop(name, None)  # claims are made about a card of ours alone
        if "import kron_hf" not in card:
            warnings.warn(f"{repo_id} keeps its card; say in it that loading needs `import kron_hf`", stacklevel=5)
    # Beside an adapter, loaders would take a model for no more than its base.
    replaced = (WEIGHTS,) if "adapter_config.json" in files else (WEIGHTS, ADAPTER)
    stale = [name for name in present - files.keys() if any(kind.fullmatch(name) for kind in replaced)]
    stale += [name for name in OURS if name in present - files.keys() and name != "README.md"]
    return api.create_commit(
        repo_id,
        [CommitOperationAdd(name, path) for name, path in sorted(files.items())]
        + [CommitOperationDelete(name) for name in sorted(stale)],
        commit_message=message,
        revision=revision,
        create_pr=create_pr,
        parent_commit=info.sha,
    )


def _read_card(api: HfApi, repo_id: str, revision: str | None) -> str:
    with TemporaryDirectory() as folder:
        path = api.hf_hub_download(repo_id, "README.md", revision=revision, local_dir=folder)
        return Path(path).read_text(encoding="utf-8")


def _repeat(attempt: Any, repo_id: str, once: bool) -> CommitInfo:
    """Attempts again what was overtaken or not answered.

    Safe after a lost answer, too: the next attempt finds its files in place and commits nothing. Only pull requests
    would be opened twice.
    """
    failure: BaseException | None = None
    for pause in PAUSES[:1] if once else PAUSES:
        time.sleep(pause)
        try:
            return attempt()
        except (HfHubHTTPError, httpx.TransportError) as error:
            failure = error
            if not _is_transient(error):
                raise
        except RuntimeError as error:  # how huggingface_hub passes on what happened while it uploaded a large file
            failure = error.__cause__
            if not isinstance(failure, HfHubHTTPError | httpx.TransportError):
                raise
            if not _is_transient(failure):
                break
    raise ConnectionError(f"the Hub did not take the commit to {repo_id}: {failure}") from failure


def _is_transient(error: HfHubHTTPError | httpx.TransportError) -> bool:
    return not isinstance(error, HfHubHTTPError) or error.response.status_code in {OVERTAKEN, *TRANSIENT}
