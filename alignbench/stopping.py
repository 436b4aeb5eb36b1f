"""A polite end: work that is asked to stop keeps what it has done first.

SIGTERM (a batch system's grace period) and SIGUSR2 (submitit's notice before a time limit) are heard here. Outside of
training they act at once. In training they wait for the end of the optimiser step and a checkpoint; then whatever the
signal meant before is done: submitit puts its job back into the queue, a plain process ends with status 128 + signal.
"""

from __future__ import annotations

import logging
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, Protocol

log = logging.getLogger(__name__)


class Stopped(SystemExit):
    """The process ends because it was asked to; not an Exception, so that a sweep does not go on to its next run."""

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)


class Requests(Protocol):
    """Where a training loop hears that it should save what it has."""

    def heard(self) -> Any:
        """Context manager of the loop: within it a request waits."""

    def pending(self) -> bool:
        """Whether one waits."""

    def done(self) -> None:
        """The work is safe: do as asked. Every rank calls it; it may not return."""


class Signals:
    """The process's own signals: one instance, `SIGNALS`."""

    def __reduce__(self) -> str:
        return "SIGNALS"  # of a frozen job: the other process's own

    def __init__(self) -> None:
        self._asked = 0
        self._deferred = 0
        self._before: dict[int, Any] = {}

    @contextmanager
    def handled(self) -> Iterator[None]:
        """Hear the signals in this process, from its main thread; elsewhere nothing changes."""
        import threading

        if threading.current_thread() is not threading.main_thread() or self._before:
            yield
            return
        self._asked = 0
        for number in (signal.SIGTERM, signal.SIGUSR2):
            before = signal.getsignal(number)
            # nobody but a batch system's own handler gives SIGUSR2 a meaning
            if number == signal.SIGTERM or callable(before):
                self._before[number] = before
                signal.signal(number, self._hear)
        try:
            yield
        finally:
            for known, before in self._before.items():
                signal.signal(known, before)
            self._before = {}

    def _hear(self, number: int, frame: FrameType | None) -> None:
        self._asked = number
        if self._deferred:
            log.warning("%s: stopping after this optimiser step, with a checkpoint", signal.Signals(number).name)
        else:
            self.done()

    @contextmanager
    def heard(self) -> Iterator[None]:
        """Within this a signal waits until `done` is called (or the body ends)."""
        self._deferred += 1
        try:
            yield
        finally:
            self._deferred -= 1
        if self._asked:
            self.done()

    def pending(self) -> bool:
        """Whether a signal waits."""
        return bool(self._asked)

    def done(self) -> None:
        """Do what the signal meant before; where that was the process's end, raise Stopped."""
        number, self._asked = self._asked, 0
        before: Callable[[int, FrameType | None], Any] | Any = self._before.get(number)
        if callable(before):
            before(number, None)
            return
        log.warning("stopped by %s; the same command goes on from here", signal.Signals(number).name)
        raise Stopped(number)


SIGNALS = Signals()
