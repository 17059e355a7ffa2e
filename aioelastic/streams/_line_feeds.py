"""All who want the lines of one group: its streams are split into lines only while there are some."""

from __future__ import annotations

import functools
import re
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Literal, Protocol

from ._line_search import LineSearch
from ._lines import LineFeed


class Splitting(Protocol):
    """What has streams: a worker."""

    rank: int

    def split_lines(self, partial: float | None, deliver: Callable[..., None]) -> None: ...

    def stop_splitting(self, partial: float | None) -> None: ...

    def search(self, search: LineSearch) -> None: ...

    def stop_searching(self, search: LineSearch) -> None: ...


class Working(Protocol):
    """What has workers, others at other times."""

    @property
    def workers(self) -> Sequence[Splitting]: ...

    def is_over(self, rank: int) -> bool: ...


class Feeds:
    """Those that are read, and searches. A feed belongs to its reader: one that nobody refers to is not kept by us,
    but for those that somebody waits for."""

    def __init__(self, source: Working) -> None:
        self._source = source
        self._feeds: dict[float | None, list[weakref.ref[LineFeed]]] = {}  # by when unfinished lines are passed on
        self._awaited: set[LineFeed] = set()
        self._searches: list[LineSearch] = []

    def add(
        self,
        when_full: Literal["block", "drop"],
        ranks: Iterable[int] | None,
        partial: float | None,
        over: bool,
    ) -> LineFeed:
        """A new one; `over`: nothing comes any more."""
        wanted = None if ranks is None else frozenset(ranks)
        feed = LineFeed(when_full, wanted, partial, self._closed, self._awaited)
        if over:
            feed.end()
            return feed
        first = partial not in self._feeds
        self._feeds.setdefault(partial, []).append(weakref.ref(feed))
        if first:
            for worker in self._source.workers:
                self._split(worker, partial)
        self.look()
        return feed

    async def line(self, pattern: re.Pattern[str], ranks: Iterable[int] | None, over: bool) -> re.Match[str]:
        """The first line that matches.

        Args:
            over: nothing comes any more.

        Raises:
            EOFError: there is none.
        """
        search = LineSearch(pattern, None if ranks is None else frozenset(ranks))
        self._searches.append(search)
        try:
            for worker in self._source.workers:
                self._search(worker, search)
            if over:
                search.fail(_none(search))
            self.look()
            return await search.found()
        finally:
            self._searches.remove(search)
            for worker in self._source.workers:
                worker.stop_searching(search)

    def started(self, worker: Splitting) -> None:
        """There is one more worker."""
        for partial in self._feeds:
            self._split(worker, partial)
        for search in self._searches:
            self._search(worker, search)

    def look(self) -> None:
        """Some worker may have been the last of the ranks that somebody wants."""
        for feed in self._all():
            if feed.ranks is not None and all(map(self._source.is_over, feed.ranks)):
                feed.end()
        for search in self._searches:
            if search.ranks is not None and all(map(self._source.is_over, search.ranks)):
                search.fail(_none(search))

    def relax(self) -> None:
        """See `LineFeed.relax`."""
        for feed in self._all():
            feed.relax()

    def end(self) -> None:
        """All streams are over."""
        for feed in self._all():
            feed.end()
        for search in self._searches:
            search.fail(_none(search))

    def fail(self, problem: Exception) -> None:
        """See `LineFeed.fail`."""
        for feed in self._all():
            feed.fail(problem)
        for search in self._searches:
            search.fail(problem)

    def _all(self) -> Iterator[LineFeed]:
        return (feed for feeds in [*self._feeds.values()] for one in feeds if (feed := one()) is not None)

    def _search(self, worker: Splitting, search: LineSearch) -> None:
        if search.ranks is None or worker.rank in search.ranks:
            worker.search(search)

    def _split(self, worker: Splitting, partial: float | None) -> None:
        worker.split_lines(partial, functools.partial(self._deliver, partial))

    def _deliver(self, partial: float | None, *batch: Any) -> None:
        for one in self._feeds.get(partial, ()):
            feed = one()
            if feed is None:
                self._closed(partial)
            else:
                feed.deliver(*batch)

    def _closed(self, partial: float | None, closed: LineFeed | None = None) -> None:
        left = [one for one in self._feeds.get(partial, ()) if one() not in (None, closed)]
        if left:
            self._feeds[partial] = left
        elif self._feeds.pop(partial, None):
            for worker in self._source.workers:
                worker.stop_splitting(partial)


def _none(search: LineSearch) -> EOFError:
    who = "all workers" if search.ranks is None else f"ranks {sorted(search.ranks)}"
    return EOFError(f"{who} have ended, and no line matched {search.pattern.pattern!r}")
