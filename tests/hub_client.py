"""Starts `hub_worker.py` against a local Hub and asks it to push and pull."""

import json
import os
import selectors
import subprocess
import sys
from pathlib import Path

WORKER = Path(__file__).with_name("hub_worker.py")
PATIENCE = 120  # seconds without any answer: the worker hangs


class HubClient:
    """One client machine: a process that forks for each command.

    Args:
        hub: The `LocalHub`.
        home: Folder for the caches and for `output`, all that the processes have written.
        user: Whose token the commands carry unless they name another.
        timeout: Seconds that a client waits for an answer.
    """

    def __init__(self, hub, home: Path, user: str = "alice", timeout: int = 30):
        self.hub, self.home, self.user = hub, home, user
        self.output, self.caches = home / "output.txt", home / "caches"
        self._read, write = os.pipe()
        self.told: list[str] = []  # errors and warnings of all commands
        self._answers: dict[int, dict] = {}
        self._buffer = b""
        self._count = 0
        self.local_user = "zaphod7731"
        person = {"USER": self.local_user, "LOGNAME": self.local_user, "HOME": str(home / self.local_user)}
        timeouts = {"HF_HUB_DOWNLOAD_TIMEOUT": str(timeout), "HF_HUB_ETAG_TIMEOUT": str(timeout)}
        environment = hub.environment(user, home / "hf", **person, **timeouts)
        self._log = self.output.open("wb")
        self._process = subprocess.Popen(
            [sys.executable, str(WORKER), str(write)], env=environment, cwd=home, pass_fds=[write],
            stdin=subprocess.PIPE, stdout=self._log, stderr=self._log,
        )  # fmt: skip
        os.close(write)

    def __enter__(self) -> "HubClient":
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._log.close()
        os.close(self._read)

    def start(self, command: str, *, cache: str = "cache", user: str | None = None, offline=False, **arguments) -> int:
        """Begins a command and returns its number, for `wait`; several may run at once."""
        assert self._process.stdin is not None
        self._count += 1
        request = {
            "id": self._count, "command": command, "arguments": arguments, "cache": str(self.caches / cache),
            "offline": offline, "token": self.hub.tokens[user or self.user],
        }  # fmt: skip
        self._process.stdin.write(json.dumps(request).encode() + b"\n")
        self._process.stdin.flush()
        return self._count

    def wait(self, number: int) -> dict:
        """The answer: "value" and "warnings", or "error" and "kinds", the names of its classes."""
        with selectors.DefaultSelector() as selector:
            selector.register(self._read, selectors.EVENT_READ)
            while number not in self._answers:
                assert selector.select(PATIENCE), f"no answer; the worker wrote:\n{self.output.read_text()[-3000:]}"
                data = os.read(self._read, 2**16)
                assert data, f"the worker ended; it wrote:\n{self.output.read_text()[-3000:]}"
                *lines, self._buffer = (self._buffer + data).split(b"\n")
                self._answers |= {answer["id"]: answer for answer in map(json.loads, lines)}
        answer = self._answers.pop(number)
        self.told += [answer.get("error", ""), *answer.get("warnings", [])]
        return answer

    def run(self, command: str, **options) -> dict:
        return self.wait(self.start(command, **options))

    def value(self, command: str, **options):
        """What a command that must succeed returns."""
        answer = self.run(command, **options)
        assert "error" not in answer, answer["error"]
        return answer["value"]
