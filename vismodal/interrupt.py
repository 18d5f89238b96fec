"""Stopping by Ctrl-C or SIGTERM: at once where nothing is lost by it, else at the next such place."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager


class Interrupts:
    """Turns the first SIGINT or SIGTERM into an orderly stop.

        stop = Interrupts()
        with stop.listening():
            with stop.interruptible():     # a signal ends this block at once ...
                while not stop.asked:
                    with stop.shielded():  # ... but never in here
                        ...
            save()

    Args:
        flag_only: only set `asked`: for one of several processes that must leave together; a second signal breaks.
    """

    def __init__(self, flag_only: bool = False) -> None:
        self.asked = False
        self._flag_only = flag_only
        self._inside = self._shield = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Takes the two signals, and gives them back. Python lets only the main thread do so; others never stop."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self._heard) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """A block that a stop may end at any moment outside `shielded`."""
        self._inside = True
        try:
            yield
        except KeyboardInterrupt:
            self.asked = True
        finally:
            self._inside = False

    @contextmanager
    def shielded(self) -> Iterator[None]:
        """What must not be left half done: a stop waits until its end."""
        self._shield = True
        try:
            yield
        finally:
            self._shield = False
        if self.asked and self._inside and not self._flag_only:
            raise KeyboardInterrupt

    def _heard(self, number: int, frame: object) -> None:
        # `asked` stays beside the exception, which Python swallows where it comes out of a __del__ or weakref callback
        again, self.asked = self.asked, True
        if not self._shield and (again or (self._inside and not self._flag_only)):
            raise KeyboardInterrupt
