"""How far work is that takes long: a bar on a terminal, lines in a server's log, else nothing."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from typing import TypeVar

Item = TypeVar("Item")
Log = Callable[[str], None]

# Seconds of silence, and between two lines of a log.
_SILENT, _BETWEEN_LINES = 2.0, 10.0
_LOG: ContextVar[Log | None] = ContextVar("flwr_fusion_progress_log", default=None)


@contextmanager
def progress_to(log: Log) -> Iterator[None]:
    """Send what `tracked` shows to a log instead of a terminal."""
    token = _LOG.set(log)
    try:
        yield
    finally:
        _LOG.reset(token)


def tracked(items: Sequence[Item], what: str) -> Iterator[Item]:
    """Yield items; where they take more than two seconds, show how many are done.

    Parameters
    ----------
    items : sequence
        What is worked on.
    what : str
        What is done with them.
    """
    begin = time.perf_counter()
    log, shown = _LOG.get(), -1.0
    with ExitStack() as stack:
        show: Callable[[int], None] | None = None
        for done, item in enumerate(items, start=1):
            yield item
            seconds = time.perf_counter() - begin
            if seconds < _SILENT or done == len(items):
                continue
            if log is not None:
                if shown < 0 or seconds - shown >= _BETWEEN_LINES:
                    shown = seconds
                    log(f"{what}: {done} of {len(items)} after {seconds:.0f} s")
            elif sys.stderr.isatty():
                show = show or _bar(stack, what, len(items))
                show(done)


def _bar(stack: ExitStack, what: str, total: int) -> Callable[[int], None]:
    """Return a function that sets how many are done in a bar on the terminal."""
    # Imported where it is used: most fusions are over before.
    from rich.console import Console
    from rich.progress import Progress

    bar = stack.enter_context(Progress(console=Console(stderr=True), transient=True))
    task = bar.add_task(what, total=total)
    return lambda done: bar.update(task, completed=done)
