"""The user's round trip over a Hub: push, pull, train with pushes, share a repository and a cache, leak nothing."""

import json
import subprocess
import sys

import pytest
from hub_client import HubClient
from hub_faults import slow
from hub_server import LocalHub
from tiny_runs import write_idx_folder
from torch import nn

from kron_hf import push_to_hub

WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def hub():
    with LocalHub() as hub:
        yield hub


@pytest.fixture(scope="module")
def client(hub, tmp_path_factory):
    with HubClient(hub, tmp_path_factory.mktemp("machine")) as client:
        yield client


@pytest.fixture(autouse=True)
def no_faults_left(hub):
    yield
    hub.clear()


@pytest.fixture(scope="module")
def digests(client):
    return {seed: client.value("expected", seed=seed) for seed in (0, 1, 2)}


@pytest.mark.parametrize("sharded", [False, True], ids=["whole", "sharded"])
@pytest.mark.parametrize("door", ["stock", "kron"])
def test_round_trip_is_bit_equal(hub, client, digests, door, sharded):
    repo = f"alice/round-{door}-{sharded}"
    client.value("push", repo=repo, seed=1, door=door, sharded=sharded)
    files = hub.files(repo)
    assert (WEIGHTS in files) is not sharded
    assert ("model.safetensors.index.json" in files) is sharded
    assert client.value("pull", repo=repo, cache=repo) == digests[1]
    assert client.value("pull", repo=repo, cache=repo, offline=True) == digests[1]


def test_a_model_in_selection_is_pushed_over_its_earlier_states(hub, client):
    for drops in range(3):
        pushed = client.value("push_in_selection", repo="alice/selection", drops=drops)
        assert client.value("pull", repo="alice/selection") == pushed
        card = hub.files("alice/selection")["README.md"].decode()
        assert ("each is the sum of its candidates" in card) == (drops < 2)


def test_what_the_card_says_runs_in_a_fresh_process(hub, client, tmp_path):
    client.value("push_with_processor", repo="alice/card", seed=1)
    card = hub.files("alice/card")["README.md"].decode()
    code = card.split("```python\n")[1].split("```")[0]
    assert "from_pretrained('alice/card')" in code
    save = f"{code}\nmodel.save_pretrained({str(tmp_path / 'saved')!r})"
    done = subprocess.run(
        [sys.executable, "-c", save], env=hub.environment("bob", tmp_path / "hf"), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "saved" / WEIGHTS).read_bytes() == hub.files("alice/card")[WEIGHTS]


def test_pipeline_reads_model_and_processor(hub, client):
    client.value("push_with_processor", repo="alice/piped", seed=1)
    assert "preprocessor_config.json" in hub.files("alice/piped")
    answers = client.value("classify", repo="alice/piped", cache="piped")
    assert [label for label, _ in answers] == [f"LABEL_{index}" for index in range(4)]
    assert sum(score for _, score in answers) == pytest.approx(1)


@pytest.mark.parametrize("door", ["stock", "kron"])
def test_private_repository_is_denied_to_others(hub, client, digests, door):
    repo = f"alice/private-{door}"
    client.value("push", repo=repo, seed=0, door=door, private=True)
    assert hub.repos["models", repo].private
    assert client.value("pull", repo=repo, cache=repo) == digests[0]
    denied = client.run("pull", repo=repo, cache=f"{repo}-bob", user="bob")
    assert "OSError" in denied["kinds"]
    assert "private repository" in denied["error"]
    denied = client.run("push", repo=repo, seed=1, door=door, user="bob")
    assert "RepositoryNotFoundError" in denied["kinds"] or "403" in denied["error"]
    assert client.run("summary", repo=repo, cache=f"{repo}-bob", user="bob")["value"] == 1
    assert list(hub.repos["models", repo].titles) == ["initial commit", hub.repos["models", repo].titles[-1]]


def test_revisions_and_pull_requests(hub, client, digests):
    repo = "alice/revisions"
    first = client.value("push", repo=repo, seed=0)
    client.value("push", repo=repo, seed=1, revision="dev")
    client.value("push", repo=repo, seed=2, create_pr=True, user="bob")
    for revision, seed in {"main": 0, "dev": 1, "refs/pr/1": 2, first: 0}.items():
        assert client.value("pull", repo=repo, revision=revision, cache=repo) == digests[seed], revision
    missing = client.run("pull", repo=repo, revision="nowhere", cache=repo)
    assert "nowhere is not a valid git identifier" in missing["error"]


@pytest.mark.parametrize("sharded", [(True, False), (False, True)], ids=["shards-then-whole", "whole-then-shards"])
def test_weights_of_an_earlier_push_are_replaced(hub, client, digests, sharded):
    repo = f"alice/replaced-{sharded[0]}"
    for seed in (0, 1):
        client.value("push", repo=repo, seed=seed, sharded=sharded[seed])
    files = hub.files(repo)
    whole = {"README.md", "config.json", "kron_claims.json", "kron_masks.png", WEIGHTS}
    assert (files.keys() == whole) is not sharded[1]
    assert (WEIGHTS in files) is not sharded[1]
    assert client.value("pull", repo=repo, cache=repo) == digests[1]


def test_a_model_takes_the_place_of_an_adapter(hub, client, digests):
    client.value("push", repo="alice/was-adapter", seed=1)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        client.value("upload", repo="alice/was-adapter", path=name, text="{}")
    client.value("push", repo="alice/was-adapter", seed=0)
    assert not {"adapter_config.json", "adapter_model.safetensors"} & hub.files("alice/was-adapter").keys()
    assert client.value("pull", repo="alice/was-adapter", cache="was-adapter") == digests[0]


def test_same_model_again_makes_no_commit(hub, client):
    first = client.value("push", repo="alice/twice", seed=0)
    assert client.value("push", repo="alice/twice", seed=0) == first


def test_card_and_other_files_of_the_user_stay(hub, client):
    client.value("push", repo="alice/mine", seed=0)
    assert b"import kron_hf" in hub.files("alice/mine")["README.md"]
    client.value("upload", repo="alice/mine", path="notes.txt", text="mine")
    client.value("upload", repo="alice/mine", path="README.md", text="my card")
    answer = client.run("push", repo="alice/mine", seed=1)
    assert any("say in it that loading needs `import kron_hf`" in text for text in answer["warnings"])
    client.value("upload", repo="alice/mine", path="README.md", text="my card: import kron_hf")
    answer = client.run("push", repo="alice/mine", seed=2)
    assert not any("import kron_hf" in text for text in answer["warnings"])
    files = hub.files("alice/mine")
    assert (files["README.md"], files["notes.txt"]) == (b"my card: import kron_hf", b"mine")
    assert "kron_claims.json" not in files  # it claimed things of the card that was replaced


def test_a_model_that_cannot_be_saved_is_refused():
    with pytest.raises(TypeError, match="needs a model with save_pretrained, got Linear"):
        push_to_hub(nn.Linear(2, 2), "alice/linear")


def test_metrics_come_into_the_card_and_name_their_data(hub, client):
    client.value("push", repo="alice/measured", seed=0, dataset="digits", metrics={"accuracy": 0.975})
    assert b"| accuracy | 0.9750 |" in hub.files("alice/measured")["README.md"]
    refused = client.run("push", repo="alice/never", seed=0, metrics={"accuracy": 0.975})
    assert "need dataset=" in refused["error"]
    assert ("models", "alice/never") not in hub.repos


@pytest.mark.parametrize("pretrained", [True, False], ids=["pretrained", "from-scratch"])
def test_model_is_built_from_a_dense_one_on_the_hub(hub, client, pretrained):
    repo = f"alice/dense-{pretrained}"
    client.value("push_dense", repo=repo, seed=0)
    hub.calls.clear()
    assert client.value("from_base", repo=repo, pretrained=pretrained, cache=repo) == "ViTForImageClassification"
    assert bool(hub.requested("safetensors")) is pretrained
    assert bool(hub.requested("/storage/")) is pretrained
    assert hub.requested("config.json")


@pytest.mark.parametrize("door", ["stock", "kron"])
def test_adapter_round_trip_is_bit_equal(hub, client, door):
    base, repo = f"alice/base-{door}", f"alice/adapter-{door}"
    client.value("push_dense", repo=base, seed=0)
    pushed = client.value("push_adapter", repo=repo, base=base, door=door, cache=f"{repo}-pushed")
    files = hub.files(repo)
    ours = {"kron_claims.json", "kron_masks.png"} if door == "kron" else set()
    assert {"adapter_config.json", "adapter_model.safetensors", "README.md"} | ours == files.keys()
    assert json.loads(files["adapter_config.json"])["base_model_name_or_path"] == base
    assert client.value("pull_adapter", repo=repo, base=base, cache=repo) == pushed
    assert client.value("pull_adapter", repo=repo, cache=f"{repo}-auto") == pushed
    assert client.value("pull_adapter", repo=repo, cache=f"{repo}-auto", offline=True) == pushed


def test_card_of_an_adapter_names_its_base(hub, client):
    client.value("push_dense", repo="alice/base-card", seed=0)
    client.value("push_adapter", repo="alice/adapter-card", base="alice/base-card")
    card = hub.files("alice/adapter-card")["README.md"].decode()
    assert "library_name: peft" in card
    assert "base_model: alice/base-card" in card
    assert "base = AutoModelForImageClassification.from_pretrained('alice/base-card')" in card
    assert "model = PeftModel.from_pretrained(base, 'alice/adapter-card')" in card


def test_adapter_of_a_local_base_tells_no_path(hub, client):
    client.value("push_dense", repo="alice/base-local", seed=0)
    answer = client.run("push_adapter", repo="alice/adapter-local", base="alice/base-local", local=True)
    assert any("local folder, which is not published" in text for text in answer["warnings"])
    assert not any(
        str(client.home) in data.decode(errors="ignore") for data in hub.files("alice/adapter-local").values()
    )
    loaded = client.value("pull_adapter", repo="alice/adapter-local", base="alice/base-local", cache="local")
    assert loaded == answer["value"]


def test_summary_of_a_repository(hub, client):
    client.value("push", repo="alice/table", seed=0)
    before = len(client.output.read_text())
    assert client.value("summary", repo="alice/table", cache="table") == 0
    assert "vit.layers.0.mlp.fc1" in client.output.read_text()[before:]
    before = len(client.output.read_text())
    assert client.value("summary", repo="alice/absent", cache="table") == 1
    assert "kron-hf: error: alice/absent is no directory here" in client.output.read_text()[before:]


def test_summary_of_a_broken_repository_tells_no_path(client):
    client.value("upload", repo="alice/table", path="config.json", text="{")
    before = len(client.output.read_text())
    assert client.value("summary", repo="alice/table", cache="broken") == 1
    said = [line for line in client.output.read_text()[before:].splitlines() if line.startswith("kron-hf: error")]
    assert "config file at 'the cache/models--alice--table" in said[0]
    assert str(client.home) not in said[0]


def test_commands_take_a_repository_as_they_take_a_folder(hub, client, tmp_path):
    """Verified, looked at and exported at a revision, without the weights of checkpoints that lie beside."""
    repo, out = "alice/commands", tmp_path
    first = client.value("push_with_processor", repo=repo, seed=1)
    client.value("upload", repo=repo, path=f"last-checkpoint/{WEIGHTS}", text="large")
    history = {"log_history": [{"step": step, "loss": 1 / step} for step in (1, 2)]}
    client.value("upload", repo=repo, path="last-checkpoint/trainer_state.json", text=json.dumps(history))

    def run(*words):
        before = len(client.output.read_text())
        code = client.value("command_line", words=[str(word) for word in words], cache="commands")
        return code, client.output.read_text()[before:]

    assert run("verify", repo)[0] == 0
    assert run("inspect", repo, "--html", out / "page.html")[0] == 0
    assert "<h1>alice/commands</h1>" in (out / "page.html").read_text()
    assert '<figure class="chart">' in (out / "page.html").read_text()
    code, said = run("export", repo, "--to", "dense", "--output-dir", out / "dense", "--revision", first)
    assert code == 0, said
    assert {path.name for path in (out / "dense").iterdir()} == {
        *("config.json", "kron_export.json", "preprocessor_config.json", WEIGHTS)
    }
    assert not list((client.caches / "commands").rglob(f"last-checkpoint/{WEIGHTS}"))
    for words in (
        ("verify",),
        ("inspect", "--html", out / "no.html"),
        ("export", "--to", "dense", "--output-dir", out / "no"),
    ):
        code, said = run(words[0], "alice/absent", *words[1:])
        assert code == 1
        assert "kron-hf: error: alice/absent is no directory here, and no model on the Hub could be read" in said
    assert sorted(path.name for path in out.iterdir()) == ["dense", "page.html"]


@pytest.mark.parametrize(
    ("strategy", "token", "at_end"),
    [("every_save", True, False), ("checkpoint", False, True), ("end", False, True)],
    ids=["every_save-hub_token", "checkpoint", "end"],
)
def test_trainer_pushes_while_it_trains(hub, client, strategy, token, at_end):
    repo = f"alice/train-{strategy}"
    trained = client.value("train", repo=repo, strategy=strategy, token=token, push_at_end=at_end, cache=repo)
    assert client.value("pull", repo=repo, cache=repo) == trained
    files, titles = hub.files(repo), hub.repos["models", repo].titles
    if at_end:
        assert b"import kron_hf" in files["README.md"]
    if strategy == "end":
        assert not any("Training in progress" in title for title in titles)
    else:
        assert [title for title in titles if title.startswith("Training in progress, step 2")]
    if strategy == "checkpoint":
        state = json.loads(files["last-checkpoint/trainer_state.json"])
        assert state["global_step"] == 4
        assert files[f"last-checkpoint/{WEIGHTS}"] == files[WEIGHTS]


def test_stock_trainer_pushes_what_loads(client):
    trained = client.value("train", repo="alice/stock", strategy="every_save", trainer="stock", cache="stock")
    assert client.value("pull", repo="alice/stock", cache="stock") == trained


def test_command_trains_a_model_of_the_hub_and_pushes_it(hub, client, tmp_path):
    """Data and output lie at absolute paths, and the token is an argument: none of it is published."""
    client.value("push_dense", repo="alice/base-train", seed=0)
    data, output = write_idx_folder(client.home / "pictures"), client.home / "trained"
    words = [
        *("train", "--model", "alice/base-train", "--init-weights", "random", "--dataset", str(data)),
        *("--output-dir", str(output), "--block-size", "4", "--rank", "2", "--max-steps", "4", "--use-cpu"),
        *("--save-strategy", "steps", "--save-steps", "2", "--push-to-hub", "--hub-model-id", "alice/trained"),
        *("--hub-token", hub.tokens["alice"], "--disable-tqdm", "True"),
    ]
    assert client.value("command_line", words=words, cache="train") == 0
    files = hub.files("alice/trained")
    assert {"README.md", "config.json", WEIGHTS, "preprocessor_config.json"} <= files.keys()
    assert files[WEIGHTS] == (output / WEIGHTS).read_bytes()
    card = files["README.md"].decode()
    assert "from_pretrained('alice/trained')" in card
    assert "| accuracy |" in card
    trained = client.value("pull", repo=str(output), offline=True)
    assert client.value("pull", repo="alice/trained", cache="trained") == trained


@pytest.mark.parametrize(
    "sharded",
    [
        pytest.param((False, True), id="shards-and-whole"),
        pytest.param((False, False), id="whole-and-whole", marks=pytest.mark.slow),
    ],
)
def test_two_processes_push_to_one_repository(hub, client, digests, sharded):
    """Whoever commits last is overtaken at first, for the other's commit is held up on the way; both arrive whole."""
    repo = f"alice/shared-{sharded[0]}-{sharded[1]}"
    client.value("push", repo=repo, seed=0)
    hub.fail_next("POST", "/commit/", slow(0.7))
    started = [client.start("push", repo=repo, seed=seed, sharded=sharded[seed - 1]) for seed in (1, 2)]
    answers = [client.wait(number) for number in started]
    assert not [answer["error"] for answer in answers if "error" in answer]
    assert 412 in [call.status for call in hub.requested(f"{repo}/commit/")]
    assert len(hub.repos["models", repo].titles) == 4
    assert client.value("pull", repo=repo, cache=repo) in (digests[1], digests[2])
    for number, answer in enumerate(answers, 1):
        revision = answer["value"]
        assert client.value("pull", repo=repo, revision=revision, cache=repo) == digests[number]
    last = next(seed for seed in (1, 2) if answers[seed - 1]["value"] == hub.repos["models", repo].branches["main"])
    assert (WEIGHTS in hub.files(repo)) is not sharded[last - 1]


def test_two_stock_pushes_leave_one_of_the_two(hub, client, digests):
    client.value("push", repo="alice/race", seed=0, door="stock")
    hub.fail_next("POST", "/commit/", slow(0.3))
    started = [client.start("push", repo="alice/race", seed=seed, door="stock") for seed in (1, 2)]
    answers = [client.wait(number) for number in started]
    assert any("value" in answer for answer in answers)
    assert all("412" in answer["error"] for answer in answers if "error" in answer)
    assert client.value("pull", repo="alice/race", cache="race") in (digests[1], digests[2])


def test_four_processes_fill_one_cache(hub, client, digests):
    client.value("push", repo="alice/popular", seed=1)
    hub.calls.clear()
    hub.fail_next("GET", "/storage/", slow(0.3))
    started = [client.start("pull", repo="alice/popular", cache="common") for _ in range(4)]
    assert [client.wait(number).get("value") for number in started] == [digests[1]] * 4
    blobs = list((client.caches / "common" / "models--alice--popular" / "blobs").iterdir())
    assert len(hub.requested("/storage/")) == 1
    assert not [blob.name for blob in blobs if blob.name.endswith(".incomplete")]


def test_no_token_path_or_user_name_gets_out(hub, client):
    """What the clients wrote with logging at DEBUG, what they published and who got the token, here and above."""
    for door in ("stock", "kron"):
        client.value("push", repo="alice/leaks", seed=0, door=door)
        client.value("train", repo="alice/leaks-train", strategy="checkpoint", token=True, trainer="kron")
    assert "403" in client.run("push", repo="bob/not-mine", seed=0)["error"]
    written = client.output.read_text()
    assert "DEBUG:huggingface_hub" in written
    assert "Traceback (most recent call last)" in written
    tokens = list(hub.tokens.values())
    assert not [token for token in tokens if token in written]
    assert client.local_user not in written
    assert not [text for text in client.told if str(client.home) in text]
    assert "last-checkpoint/training_args.bin" in hub.files("alice/leaks-train")
    for data in hub.published:
        for secret in [*tokens, str(client.home), client.local_user]:
            assert secret.encode() not in data, data[:200]
    assert [call for call in hub.calls if call.storage]
    assert not [call for call in hub.calls if call.storage and call.authorized]
