"""Every fault at every request of a push and of a pull: a retry or an error, and nothing half-written anywhere."""

import pytest
from hub_client import HubClient
from hub_faults import (
    DROP,
    DROP_ANSWER,
    DROP_REQUEST,
    FLIP,
    LOST,
    STATUS_401,
    STATUS_429,
    STATUS_500,
    TRUNCATE,
    slow,
)
from hub_server import LocalHub

REPO = "alice/model"
TIMEOUT = 2  # seconds; the slow answers take twice as long
ALWAYS = 1000

FAULTS = {
    "drop": DROP,
    "drop-request": DROP_REQUEST,
    "drop-answer": DROP_ANSWER,
    "lost": LOST,
    "500": STATUS_500,
    "429": STATUS_429,
    "401": STATUS_401,
}
READ_FAULTS = {**FAULTS, "slow": slow(2 * TIMEOUT), "flip": FLIP, "truncate": TRUNCATE}
PUSH_STAGES = {
    "create": ("POST", "^/api/repos/create$"),
    "card-head": ("HEAD", "README.md$"),
    "card": ("GET", "README.md$"),
    "card-check": ("POST", "^/api/validate-yaml$"),
    "info": ("GET", f"^/api/models/{REPO}$"),
    "preupload": ("POST", "/preupload/"),
    "batch": ("POST", "/objects/batch$"),
    "upload": ("PUT", "^/storage/"),
    "commit": ("POST", "/commit/"),
}
PULL_STAGES = {
    "config-head": ("HEAD", "/config.json$"),
    "config": ("GET", "/config.json$"),
    "weights-head": ("HEAD", "/model.safetensors$"),
    "weights": ("GET", "^/storage/"),
}
QUICK_PUSH = [("kron", "commit", "lost"), ("kron", "upload", "drop-request"), ("kron", "preupload", "500")]
QUICK_PULL = [("weights", "flip"), ("weights", "truncate"), ("weights", "drop-answer"), ("config", "flip")]
# What these classes say is the message of a known cause, not an accident of the code.
CLEAR = {"OSError", "HTTPError", "TransportError", "ValueError"}


def quick_or_slow(cases, quick):
    """The quick cases run by default, the whole matrix with `-m slow`."""
    params = []
    for case in cases:
        marks = () if case[: len(quick[0])] in quick and case[-1] == 1 else pytest.mark.slow
        name = "-".join(map(str, case[:-1])) + ("-always" if case[-1] > 1 else "")
        params.append(pytest.param(*case, marks=marks, id=name))
    return params


def push_cases():
    for door in ("stock", "kron"):
        stages = [stage for stage in PUSH_STAGES if (door, stage) != ("stock", "info")]
        for times in (1, ALWAYS) if door == "kron" else (1,):
            yield from ((door, stage, fault, times) for stage in stages for fault in FAULTS)


def pull_cases():
    for times in (1, ALWAYS):
        for stage in PULL_STAGES:
            body_only = {"flip", "truncate"} if stage.endswith("head") else set()
            yield from ((stage, fault, times) for fault in READ_FAULTS if fault not in body_only)


@pytest.fixture(scope="module")
def hub():
    with LocalHub() as hub:
        yield hub


@pytest.fixture(scope="module")
def client(hub, tmp_path_factory):
    with HubClient(hub, tmp_path_factory.mktemp("machine"), timeout=TIMEOUT) as client:
        yield client


@pytest.fixture(scope="module")
def digests(client):
    return {seed: client.value("expected", seed=seed) for seed in (0, 1)}


@pytest.fixture(scope="module")
def states(hub, client):
    """For each door the Hub with model 0, and what the repository holds with model 0 and with model 1."""
    states = {}
    for door in ("stock", "kron"):
        hub.restore(({}, {}))
        client.value("push", repo=REPO, seed=0, door=door, cache="prepare")
        states[door, 0] = hub.save(), hub.files(REPO)
        client.value("push", repo=REPO, seed=1, door=door, cache="prepare")
        states[door, 1] = hub.save(), hub.files(REPO)
        assert states[door, 0][1] != states[door, 1][1]
    return states


def assert_clear(answer, door="kron"):
    # huggingface_hub wraps what happens to a large upload in a RuntimeError.
    assert CLEAR & set(answer["kinds"]) or (door == "stock" and "Error while uploading" in answer["error"]), answer
    assert len(answer["error"].partition(":")[2].strip()) > 10, answer


@pytest.mark.parametrize(("door", "stage", "fault", "times"), quick_or_slow(push_cases(), QUICK_PUSH))
def test_push(hub, client, digests, states, request, door, stage, fault, times):
    hub.restore(states[door, 0][0])
    old, new = states[door, 0][1], states[door, 1][1]
    cache = request.node.name
    hub.fail_next(*PUSH_STAGES[stage], FAULTS[fault], times)
    answer = client.run("push", repo=REPO, seed=1, door=door, cache=cache)
    assert hub.committed, "the fault did not happen"
    if "error" in answer:
        assert_clear(answer, door)
        assert hub.files(REPO) in (old, new)
    else:
        assert hub.files(REPO) == new
    if door == "kron" and times == 1 and fault != "401":
        assert "value" in answer
    if door == "kron" and times == 1:
        assert len(hub.repos["models", REPO].titles) == (2 if "error" in answer else 3)
    hub.clear()
    loaded = client.value("pull", repo=REPO, cache=f"{cache}-between")
    assert loaded == digests[int(hub.files(REPO) == new)]
    client.value("push", repo=REPO, seed=1, door=door, cache=cache)
    assert hub.files(REPO) == new


@pytest.mark.parametrize(("stage", "fault", "times"), quick_or_slow(pull_cases(), QUICK_PULL))
def test_pull(hub, client, digests, states, request, stage, fault, times):
    hub.restore(states["kron", 1][0])
    cache = request.node.name
    hub.fail_next(*PULL_STAGES[stage], READ_FAULTS[fault], times)
    answer = client.run("pull", repo=REPO, cache=cache)
    assert hub.committed, "the fault did not happen"
    if "error" in answer:
        assert_clear(answer)
    else:
        assert answer["value"] == digests[1]
    hub.clear()
    offline = client.run("pull", repo=REPO, cache=cache, offline=True)
    assert offline.get("value", digests[1]) == digests[1]
    damaged = fault == "flip"
    assert client.value("pull", repo=REPO, cache=cache, **({"force_download": True} if damaged else {})) == digests[1]
    assert client.value("pull", repo=REPO, cache=cache, offline=True) == digests[1]


@pytest.mark.parametrize(
    ("stage", "fault"),
    [
        pytest.param(stage, fault, id=f"{stage}-{fault}", marks=pytest.mark.slow)
        for stage in ("create", "preupload", "upload", "commit")
        for fault in FAULTS
    ],
)
def test_first_push_of_a_repository(hub, client, digests, states, request, stage, fault):
    hub.restore(({}, {}))
    hub.fail_next(*PUSH_STAGES[stage], FAULTS[fault])
    answer = client.run("push", repo=REPO, seed=1, cache=request.node.name)
    assert hub.committed, "the fault did not happen"
    if "error" in answer:
        assert_clear(answer)
        assert ("models", REPO) not in hub.repos or hub.files(REPO) in ({}, states["kron", 1][1])
    hub.clear()
    client.value("push", repo=REPO, seed=1, cache=request.node.name)
    assert hub.files(REPO) == states["kron", 1][1]


@pytest.mark.parametrize("door", ["stock", "kron"])
def test_slow_answers_only_delay_a_push(hub, client, states, door):
    hub.restore(states[door, 0][0])
    for method, path in PUSH_STAGES.values():
        if method != "HEAD":
            hub.fail_next(method, path, slow(0.1))
    client.value("push", repo=REPO, seed=1, door=door, cache=f"slow-{door}")
    assert len(hub.committed) > 4
    assert hub.files(REPO) == states[door, 1][1]


def test_no_token_gets_out_of_errors(hub, client, states):
    """Runs last: over all the errors above, each written with its traceback."""
    hub.restore(states["kron", 0][0])
    hub.fail_next("POST", "/commit/", STATUS_401)
    assert "401" in client.run("push", repo=REPO, seed=1)["error"]
    written = client.output.read_text()
    assert "Traceback (most recent call last)" in written
    assert not [token for token in hub.tokens.values() if token in written]
    assert not [call for call in hub.calls if call.storage and call.authorized]
