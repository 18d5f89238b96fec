"""Who may come in, and where the page may go: a password with patience, and headers that keep all requests here."""

from __future__ import annotations

import hmac
import re
import threading
import time
from collections import deque
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any
from urllib.parse import unquote, urlsplit

from starlette.responses import PlainTextResponse

Message = MutableMapping[str, Any]
TRIES, MINUTE = 5, 60.0
HERE = ("127.0.0.1", "localhost")  # addresses that only this machine reaches

POLICY = (
    "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; connect-src 'self' data: blob:; "
    "frame-ancestors 'self'; form-action 'self'; base-uri 'self'; object-src 'none'"
)
HEADERS = {
    b"content-security-policy": POLICY.encode(),
    b"x-content-type-options": b"nosniff",
    b"referrer-policy": b"no-referrer",
}


class Gate:
    """Log-ins: after five wrong ones within a minute none is looked at until that minute is over.

    Not even a right one: whoever guesses must not learn by the exception. Who is in stays in.
    """

    def __init__(self, password: str, clock: Callable[[], float] = time.monotonic) -> None:
        self.password, self.clock = password, clock
        self.wrong: deque[float] = deque()
        self.turn = threading.Lock()

    def __call__(self, user: str, password: str) -> bool:
        """Whether this is the password; the user's name may be any."""
        with self.turn:
            now = self.clock()
            while self.wrong and now - self.wrong[0] > MINUTE:
                self.wrong.popleft()
            if len(self.wrong) >= TRIES:
                return False
            right = hmac.compare_digest(password.encode(), self.password.encode())
            if not right:
                self.wrong.append(now)
            return right


class Headers:
    """Adds `HEADERS` to every answer: a browser then asks no other machine, whatever the page says."""

    def __init__(self, app: Callable[..., Awaitable[None]]) -> None:
        self.app = app

    async def __call__(self, scope: Message, receive: Any, send: Callable[[Message], Awaitable[None]]) -> None:
        async def answer(message: Message) -> None:
            if message["type"] == "http.response.start":
                have = {name.lower() for name, _ in message["headers"]}
                message["headers"] = [*message["headers"], *(h for h in HEADERS.items() if h[0] not in have)]
            await send(message)

        await self.app(scope, receive, answer if scope["type"] == "http" else send)


class Doors:
    """Refuses what no page of ours asks for, before Gradio sees it.

    That the server fetch an address (Gradio's `file=http...` and `proxy=`); requests that another page makes in a
    visitor's browser, which tells its origin; uploads that are larger than is taken, or that nothing is left for.

    Args:
        most: bytes of an upload.
        full: whether the studio's folder has no room.
    """

    def __init__(self, app: Callable[..., Awaitable[None]], most: int, full: Callable[[], bool]) -> None:
        self.app, self.most, self.full = app, most, full

    async def __call__(self, scope: Message, receive: Any, send: Callable[[Message], Awaitable[None]]) -> None:
        refused = self._refused(scope) if scope["type"] in ("http", "websocket") else None
        if refused is None:
            await self.app(scope, receive, send)
        elif scope["type"] == "http":
            await PlainTextResponse(refused[1], refused[0])(scope, receive, send)

    def _refused(self, scope: Message) -> tuple[int, str] | None:
        """The status and the reason."""
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        path = unquote(scope["path"]).lower()
        if re.search(r"/(file[=/]+[a-z][a-z0-9+.-]*:|proxy=)", path):
            return 403, "this studio fetches nothing"
        origin = headers.get("origin")
        if origin is not None and urlsplit(origin).netloc != headers.get("host"):
            return 403, "this came from another page"
        if scope.get("method") == "POST" and path.endswith("/upload"):
            length = headers.get("content-length", "")
            if not length.isdigit():
                return 411, "an upload says how long it is"
            if int(length) > self.most or self.full():
                return 413, "there is no room for this upload; give less, or delete some jobs"
        return None
