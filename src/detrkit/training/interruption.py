"""Signals that end a training: the first is answered when the step that is being done is done, the second at once."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

SAME_SECONDS = 1.0
"""A second signal within this time is the first one again: who starts several processes passes on what they got too."""


class Interrupted(BaseException):
    """A signal ends what may be left in the middle; no `Exception`, so that nothing takes it for an error."""


class Interruption:
    """Whether somebody wants the training to end: Ctrl-C (SIGINT), or SIGTERM as batch systems and containers send it.

    It is true from the first signal on. A second one goes to whoever handled it before, as a rule to end at once.
    Outside of `listening` nothing is changed, and `deliver` hands the first signal on when all is saved.
    """

    def __init__(self) -> None:
        self._signal = 0
        self._arrived = 0.0
        self._at_once = False
        self._before: dict[int, Any] = {}

    def __bool__(self) -> bool:
        return self._signal != 0

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Within it, signals are counted here. Those that are ignored stay so, and only the main thread can listen."""
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                if signal.getsignal(number) not in (signal.SIG_IGN, None):
                    self._before[number] = signal.signal(number, self._arrive)
        try:
            yield
        finally:
            self._restore()

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Within it, the first signal raises `Interrupted`: what is done there can be done again.

        Raises:
            Interrupted: also where the signal came before.
        """
        self._at_once = True
        try:
            if self:
                raise Interrupted
            yield
        finally:
            self._at_once = False

    def deliver(self) -> None:
        """Hand the signal to whoever handles it outside.

        Raises:
            KeyboardInterrupt: as a rule, and where another process got the signal; whoever handles it may raise
                something else, or end the process.
        """
        if self._signal:
            signal.raise_signal(self._signal)
        raise KeyboardInterrupt

    def _arrive(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self._signal:
            if now - self._arrived > SAME_SECONDS:
                self._restore()
                signal.raise_signal(number)
            return
        self._signal, self._arrived = number, now
        if self._at_once:
            raise Interrupted

    def _restore(self) -> None:
        while self._before:
            signal.signal(*self._before.popitem())
