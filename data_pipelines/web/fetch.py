"""The step `fetch`: the images of documents from the network, with manners. Results come in the order of the documents.

What became of every URL is kept in its node, as `fetch: {status, code, tries, url}`. With `retry: true` it is the second pass, which
asks only for what may succeed later.
"""

from __future__ import annotations

import asyncio
import os
import threading
from collections import OrderedDict, deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from typing import Any

from datatrove.data import Document

from data_pipelines.frame.document import images_of
from data_pipelines.frame.step import Step
from data_pipelines.web.download import Downloader, Limits, Outcome
from data_pipelines.web.hosts import Manners
from data_pipelines.web.images import settle, wanted, without_missing
from data_pipelines.web.opt_outs import NO_AI, RESERVED, Listed, of_page
from m4train.errors import ConfigError

_AHEAD = 2  # images asked for ahead of the document that is next, as a multiple of `concurrency`; so much memory holds


class Fetch(Step):
    """Downloads what `wanted` says of every document; a document whose page forbids training is dropped."""

    name = "fetch"

    def __init__(
        self,
        retry: bool = False,
        agent: str = "m4train",
        contact: str = "",
        per_host: int = 2,
        delay: float = 0.5,
        max_delay: float = 30.0,
        concurrency: int = 64,
        seconds: float = 30.0,
        idle_seconds: float = 10.0,
        max_bytes: int = 20_000_000,
        max_redirects: int = 5,
        respect_robots: bool = True,
        respect_opt_out: bool = True,
        allow_private: bool = False,
        refused: list[str] | None = None,
        drop_missing: bool = False,
    ) -> None:
        """`agent`: name for robots.txt; `contact`: address of who to ask, told to every server. `per_host`, `delay`, `max_delay`:
        requests at once, seconds between two, and the most a host may ask for. The numbers hold for one rank. `refused`: files of URLs
        and domains, one a line, that are not asked for, and whose pages are left out."""
        super().__init__()
        positive = {"per_host": per_host, "concurrency": concurrency, "seconds": seconds, "max_bytes": max_bytes}
        for key, value in positive.items():
            if value <= 0:
                raise ConfigError(f"fetch.{key}={value} must be above 0.")
        if delay < 0 or max_redirects < 0:
            raise ConfigError("fetch.delay and fetch.max_redirects must not be below 0.")
        self.retry, self.drop_missing = retry, drop_missing
        self.refused, self.listed = refused or [], Listed(refused or [])
        self.window = _AHEAD * concurrency
        self.limits = Limits(max_bytes, max_redirects, seconds, idle_seconds, concurrency, allow_private)
        self.manners = Manners(agent, per_host, delay, max_delay, respect_robots, respect_opt_out)
        self.user_agent = f"{agent}/1.0 (+{contact})" if contact else f"{agent}/1.0"

    def inputs(self) -> list[tuple[str, int]]:
        return [(path, os.path.getsize(path)) for path in self.refused]

    def process(self, documents: Iterable[Document], rank: int, world_size: int) -> Iterator[Document]:
        with _Loop(Downloader(self.limits, self.manners, self.user_agent, self.listed), self.window) as loop:
            waiting: deque[tuple[Document, list[tuple[dict[str, Any], Future[Outcome]]]]] = deque()
            for document in documents:
                if self._is_forbidden(document):
                    continue
                waiting.append((document, [(node, loop.fetch(node["url"])) for node in wanted(document, self.retry)]))
                while sum(len(nodes) or 1 for _, nodes in waiting) > self.window:
                    yield self._finished(*waiting.popleft())
            while waiting:
                yield self._finished(*waiting.popleft())

    def _is_forbidden(self, document: Document) -> bool:
        """Whether the page forbids training; `noimageai` of a page leaves its text."""
        if document.metadata["url"] in self.listed:
            self.count("opt_out_listed_page", example=document)
            return True
        if not self.manners.respect_opt_out:
            return False
        asked = of_page(document.metadata, self.manners.agent)
        if asked & {NO_AI, RESERVED}:
            self.count("opt_out_of_page", example=document, asked=sorted(asked))
            return True
        for node in images_of(document) if asked else ():
            if not node.get("sha256"):
                settle(document, node, Outcome("opt_out_of_page"))
                self.count("opt_out_of_page_images")
        return False

    def _finished(self, document: Document, nodes: list[tuple[dict[str, Any], Future[Outcome]]]) -> Document:
        for node, future in nodes:
            outcome = future.result()
            self.count(outcome.status)
            settle(document, node, outcome)
        if self.drop_missing:
            without_missing(document)
        return document


class _Loop:
    """An event loop in a thread of its own, and the downloads that were asked of it."""

    def __init__(self, downloader: Downloader, remembered: int) -> None:
        self._downloader = downloader
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._known: OrderedDict[str, Future[Outcome]] = OrderedDict()
        self._remembered = remembered

    def __enter__(self) -> _Loop:
        self._thread.start()
        self._run(self._downloader.__aenter__()).result()
        return self

    def __exit__(self, *details: object) -> None:
        self._run(self._end()).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _end(self) -> None:
        mine = asyncio.current_task()
        tasks = [task for task in asyncio.all_tasks() if task is not mine]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._downloader.__aexit__()

    def _run(self, task: Any) -> Future[Any]:
        return asyncio.run_coroutine_threadsafe(task, self._loop)

    def fetch(self, url: str) -> Future[Outcome]:
        """The outcome for a URL, which is asked for once even if several documents that are near each other show it."""
        if url in self._known:
            self._known.move_to_end(url)
            return self._known[url]
        self._known[url] = self._run(self._downloader.get(url))
        while len(self._known) > self._remembered:
            self._known.popitem(last=False)
        return self._known[url]
