"""All `LineFeed`s of one group: streams are split into lines only while somebody wants lines."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, Protocol

from ._lines import LineFeed


class Splitting(Protocol):
    """What has streams: a worker."""

    def split_lines(self, deliver: Callable[..., None]) -> None: ...

    def stop_splitting(self) -> None: ...


class Working(Protocol):
    """What has workers, others at other times."""

    @property
    def workers(self) -> Sequence[Splitting]: ...


class Feeds:
    """Those that are read."""

    def __init__(self, passes: Working) -> None:
        self._passes = passes
        self._feeds: list[LineFeed] = []

    def add(self, when_full: Literal["block", "drop"], ranks: Iterable[int] | None, over: bool) -> LineFeed:
        """A new one; `over`: nothing comes any more."""
        feed = LineFeed(when_full, None if ranks is None else frozenset(ranks), self._closed)
        if over:
            feed.end()
            return feed
        self._feeds.append(feed)
        if len(self._feeds) == 1:
            for worker in self._passes.workers:
                worker.split_lines(self._deliver)
        return feed

    def started(self, worker: Splitting) -> None:
        """There is one more worker."""
        if self._feeds:
            worker.split_lines(self._deliver)

    def relax(self) -> None:
        """See `LineFeed.relax`."""
        for feed in self._feeds:
            feed.relax()

    def end(self) -> None:
        """All streams are over."""
        for feed in self._feeds:
            feed.end()
        self._workers = tuple  # there are none any more; who has us shall not be held by us

    def fail(self, problem: Exception) -> None:
        """See `LineFeed.fail`."""
        for feed in self._feeds:
            feed.fail(problem)

    def _deliver(self, *batch: Any) -> None:
        for feed in self._feeds:
            feed.deliver(*batch)

    def _closed(self, feed: LineFeed) -> None:
        self._feeds = [one for one in self._feeds if one is not feed]
        if not self._feeds:
            for worker in self._passes.workers:
                worker.stop_splitting()
