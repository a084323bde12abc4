"""How politely a host is asked: what its robots.txt allows, how many requests at once, and how long between two."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from data_pipelines.web.opt_outs import Reservations

_FRESH = 24 * 3600.0  # seconds that a robots.txt is kept, as RFC 9309 says
_LOOKED_UP = 500_000  # bytes of a robots.txt that are read
_UNREACHABLE, _ALLOWED = "robots_unreachable", "allowed"
_FINAL = ("private_address", "name_not_found", "not_http")  # reasons that say more than that robots.txt was not reached

# (url, bytes at most) -> status code and body, or a word for why there was no answer
Get = Callable[[str, int], Awaitable[tuple[int, bytes] | str]]


@dataclass
class Manners:
    """Limits of one rank towards one host."""

    agent: str = "m4train"  # the name that robots.txt and opt-outs are read for
    per_host: int = 2  # requests at once
    delay: float = 0.5  # seconds from the begin of a request to that of the next one
    max_delay: float = 30.0  # seconds; a host that asks for longer pauses gets this
    respect_robots: bool = True
    respect_opt_out: bool = True


@dataclass
class _Host:
    slots: asyncio.Semaphore
    next_start: float = 0.0
    rules: Any = None  # of robots.txt, or a word
    reservations: Reservations | None = None
    read_at: float = float("-inf")
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)


class Hosts:
    """The hosts that a rank has met, by scheme, name and port."""

    def __init__(self, manners: Manners, get: Get) -> None:
        self.manners, self._get = manners, get
        self._hosts: dict[str, _Host] = {}

    async def refusal(self, url: str) -> str:
        """Why a URL must not be asked for: robots, robots_unreachable, tdm_reservation; empty if it may be."""
        host = await self._known(url)
        parts = urlsplit(url)
        if self.manners.respect_robots:
            if isinstance(host.rules, str) and host.rules != _ALLOWED:
                return host.rules
            if host.rules != _ALLOWED and not host.rules.can_fetch(url, self.manners.agent):
                return "robots"
        path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        if self.manners.respect_opt_out and host.reservations is not None and path in host.reservations:
            return "tdm_reservation"
        return ""

    async def turn(self, url: str) -> asyncio.Semaphore:
        """Waits until the host may be asked again; the semaphore has to be released afterwards."""
        host = self._host(url)
        await host.slots.acquire()
        now = time.monotonic()
        start = max(now, host.next_start)
        host.next_start = start + self._pause(host, url)
        try:
            await asyncio.sleep(start - now)
        except BaseException:
            host.slots.release()
            raise
        return host.slots

    def hold(self, url: str, seconds: float) -> None:
        """Asks nothing of a host for so long, as it wished."""
        host = self._host(url)
        host.next_start = max(host.next_start, time.monotonic() + min(seconds, self.manners.max_delay))

    def _pause(self, host: _Host, url: str) -> float:
        asked = None
        if self.manners.respect_robots and host.rules is not None and not isinstance(host.rules, str):
            asked = host.rules.crawl_delay(self.manners.agent)
        return min(max(self.manners.delay, float(asked or 0)), max(self.manners.max_delay, self.manners.delay))

    def _host(self, url: str) -> _Host:
        origin = origin_of(url)
        if origin not in self._hosts:
            self._hosts[origin] = _Host(asyncio.Semaphore(self.manners.per_host))
        return self._hosts[origin]

    async def _known(self, url: str) -> _Host:
        """The host after its robots.txt and reservations were read, once a day."""
        host, origin = self._host(url), origin_of(url)
        async with host.lock:
            if time.monotonic() - host.read_at < _FRESH:
                return host
            if self.manners.respect_robots:
                host.rules = _rules(await self._get(f"{origin}/robots.txt", _LOOKED_UP))
            if self.manners.respect_opt_out and host.rules not in (_UNREACHABLE, *_FINAL):
                host.reservations = _reservations(await self._get(f"{origin}/.well-known/tdmrep.json", _LOOKED_UP))
            host.read_at = time.monotonic()
        return host


def origin_of(url: str) -> str:
    """Scheme, name and port of a URL."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}".lower()


def _rules(answer: tuple[int, bytes] | str) -> Any:
    """RFC 9309: no such file allows everything; no answer, or an error of the server, allows nothing."""
    if isinstance(answer, str):
        return answer if answer in _FINAL else _UNREACHABLE
    if answer[0] >= 500 or answer[0] == 429:
        return _UNREACHABLE
    if not 200 <= answer[0] < 300:
        return _ALLOWED
    from protego import Protego

    return Protego.parse(answer[1][:_LOOKED_UP].decode("utf-8", "replace"))


def _reservations(answer: tuple[int, bytes] | str) -> Reservations | None:
    if isinstance(answer, str) or answer[0] != 200:
        return None
    try:
        return Reservations(json.loads(answer[1]))
    except (ValueError, RecursionError):
        return None
