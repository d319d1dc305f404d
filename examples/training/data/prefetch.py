"""Results that threads make ahead, in their order, and a wait for them that can be given up.

The threads are daemons: one that waits for a dead disk, or for a worker that was suspended, does not keep the program
from ending. The program itself waits in short steps, between which it looks whether it was told to stop.
"""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, wait
from itertools import islice
from queue import SimpleQueue
from threading import Thread
from typing import TypeVar

from tqdm import tqdm

from training.runs.signals import StopRequested, stop_requested

Item = TypeVar("Item")
Result = TypeVar("Result")

POLL = 0.2  # seconds between two looks at the signals while a result is due
NOTICE = 60.0  # seconds of waiting after which a line says so
LIMIT = 1800.0  # seconds after which nothing is expected any more
END = 5.0  # seconds that a thread has to finish the item that it is making


def made_ahead(
    make: Callable[[Item], Result],
    items: Iterable[Item],
    *,
    threads: int = 1,
    ahead: int = 2,
    why_late: Callable[[], str] = lambda: "",
    begin: Callable[[], object] = lambda: None,
    abandon: Callable[[], None] = lambda: None,
) -> Generator[Result]:
    """`make(item)` for each item, in order. Up to `ahead` of them are made before they are asked for.

    Args:
        make: called in one of the threads. Its error is raised where that result is asked for.
        items: read in the caller's thread.
        threads: how many make results at the same time.
        ahead: results made in advance; with 0 a thread makes each when it is asked for.
        why_late: what is known of the cause when a result takes long.
        begin: called in each thread before anything else.
        abandon: called before the threads are waited for at the end; lets those that are stuck go on.

    Raises:
        StopRequested: if the program was told to stop while a result is due.
        OSError: if a result has not come after `LIMIT` seconds.
    """
    waiting = iter(items)
    coming: deque[Future[Result]] = deque()
    tasks: SimpleQueue[tuple[Future[Result], Item] | None] = SimpleQueue()

    def work() -> None:
        begin()
        while (task := tasks.get()) is not None:
            future, item = task
            if not future.set_running_or_notify_cancel():
                continue
            try:
                result = make(item)
            except BaseException as error:
                future.set_exception(error)
            else:
                future.set_result(result)
            del task, future, item

    def fill(count: int) -> None:
        for item in islice(waiting, max(0, count - len(coming))):
            coming.append(Future())
            tasks.put((coming[-1], item))

    crew = [Thread(target=work, name=f"ahead-{i}", daemon=True) for i in range(threads)]
    for thread in crew:
        thread.start()
    try:
        while True:
            fill(max(ahead, 1))
            if not coming:
                return
            due = coming.popleft()
            fill(ahead)
            _await(due, why_late)
            yield due.result()
    finally:
        for future in coming:
            future.cancel()
        for _ in crew:
            tasks.put(None)
        abandon()
        for thread in crew:
            thread.join(END)


def _await(future: Future[Result], why_late: Callable[[], str]) -> None:
    polls = 0  # not a clock, which goes on while the whole program is suspended
    while not wait([future], POLL).done:
        if stop_requested():
            raise StopRequested
        polls += 1
        if polls == round(LIMIT / POLL):
            raise OSError(f"nothing came for {LIMIT:.0f} s{why_late()}")
        if polls == round(NOTICE / POLL):
            tqdm.write(f"waiting for images since {NOTICE:.0f} s{why_late()}", file=sys.stderr)
