"""Who may come in, and where the page may go: a password with patience, and headers that keep all requests here."""

from __future__ import annotations

import hmac
import threading
import time
from collections import deque
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

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
