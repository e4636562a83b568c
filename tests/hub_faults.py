"""Faults that the local Hub can commit: what a client sees instead of the answer of a healthy server."""

import asyncio
import re
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from aiohttp import web

Handler = Callable[[web.Request], Awaitable[web.Response]]


@dataclass(frozen=True)
class Fault:
    """One kind of failure.

    Args:
        kind: "drop" (no answer), "drop-request" (half of the request is read, nothing done), "drop-answer" (the request
            is carried out, half of the answer sent), "lost" (carried out, no answer), "status", "slow", "flip" (one
            byte of the answer's body inverted) or "truncate" (half of the body, as if that were all).
        status: HTTP status of "status".
        retry_after: Seconds in its `Retry-After` header.
        seconds: Delay of "slow".
    """

    kind: str
    status: int = 500
    retry_after: int | None = None
    seconds: float = 0.0


DROP = Fault("drop")
DROP_REQUEST = Fault("drop-request")
DROP_ANSWER = Fault("drop-answer")
LOST = Fault("lost")
FLIP = Fault("flip")
TRUNCATE = Fault("truncate")
STATUS_500 = Fault("status", 500)
STATUS_401 = Fault("status", 401)
STATUS_429 = Fault("status", 429, retry_after=0)


def slow(seconds: float) -> Fault:
    return Fault("slow", seconds=seconds)


class FaultPlan:
    """The faults to come, each for the next requests that match; safe to fill from another thread."""

    def __init__(self) -> None:
        self._planned: list[tuple[str, re.Pattern, Fault, list[None]]] = []
        self.committed: list[tuple[str, str, str]] = []

    def fail_next(self, method: str, path: str, fault: Fault, times: int = 1) -> None:
        """The next `times` requests of this method whose path the pattern finds meet the fault."""
        self._planned.append((method, re.compile(path), fault, [None] * times))

    def clear(self) -> None:
        self._planned.clear()
        self.committed.clear()

    def take(self, method: str, path: str) -> Fault | None:
        for expected, pattern, fault, left in self._planned:
            if left and method == expected and pattern.search(path):
                left.pop()
                self.committed.append((method, path, fault.kind))
                return fault
        return None


async def commit_fault(fault: Fault, request: web.Request, handler: Handler) -> web.StreamResponse:
    """Answers a request as the fault says."""
    if fault.kind == "status":
        # Without the message the client takes a 401 for a missing repository.
        unauthorized = {"X-Error-Message": "Invalid credentials in Authorization header"} if fault.status == 401 else {}
        headers = {} if fault.retry_after is None else {"Retry-After": str(fault.retry_after)}
        headers |= unauthorized
        return web.json_response({"error": f"injected {fault.status}"}, status=fault.status, headers=headers)
    if fault.kind == "slow":
        await asyncio.sleep(fault.seconds)
        return await handler(request)
    if fault.kind == "drop-request":
        await request.content.read((request.content_length or 2) // 2)
    if fault.kind in ("drop", "drop-request"):
        return _hang_up(request)
    answer = await handler(request)
    if fault.kind == "lost":
        return _hang_up(request)
    body = bytes(answer.body or b"")
    if fault.kind == "flip":
        middle = len(body) // 2
        return _with_body(answer, body[:middle] + bytes([body[middle] ^ 0xFF]) + body[middle + 1 :])
    if fault.kind == "truncate":
        return _with_body(answer, body[: len(body) // 2])
    partial = web.StreamResponse(status=answer.status, headers=_own_headers(answer))
    partial.content_length = len(body)
    await partial.prepare(request)
    await partial.write(body[: len(body) // 2])
    _hang_up(request)
    return partial


def _hang_up(request: web.Request) -> web.Response:
    if request.transport is not None:
        request.transport.close()
    return web.Response(status=500)  # never sent: the connection is gone


def _with_body(answer: web.Response, body: bytes) -> web.Response:
    return web.Response(status=answer.status, headers=_own_headers(answer), body=body)


def _own_headers(answer: web.Response) -> dict[str, str]:
    return {name: value for name, value in answer.headers.items() if name.lower() != "content-length"}
