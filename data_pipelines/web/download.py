"""One image from the network: what came, or a word for why not. Nothing that answers is trusted."""

from __future__ import annotations

import asyncio
import socket
from dataclasses import dataclass
from typing import Any
from urllib.parse import urljoin, urlsplit

import aiohttp
from aiohttp.abc import AbstractResolver
from aiohttp.resolver import ThreadedResolver

from data_pipelines.web.hosts import Hosts, Manners
from data_pipelines.web.opt_outs import Listed, in_content, of_headers
from m4train.downloads import is_own_network
from m4train.errors import BadSample
from m4train.processing.images import ImageInfo, read_image_info

# What may go better another time
RETRYABLE = ("timeout", "connection", "name_not_found", "incomplete", "http_429", "http_5xx", "robots_unreachable")
_CHUNK = 1 << 16


@dataclass(frozen=True)
class Limits:
    """Of one download, and of all at once."""

    max_bytes: int = 20_000_000  # of an image
    max_redirects: int = 5
    seconds: float = 30.0  # for one image in all
    idle_seconds: float = 10.0  # without a byte
    concurrency: int = 64  # requests at once, over all hosts
    allow_private: bool = False  # also addresses of the own machine and network


@dataclass(frozen=True)
class Outcome:
    """What became of one URL."""

    status: str  # ok, or why not
    code: int = 0  # of HTTP, if there was an answer
    url: str = ""  # after redirects, if it differs
    content: bytes = b""
    info: ImageInfo | None = None
    wait: float = 0.0  # seconds the host asked to wait


class _Refused(OSError):
    """An address that must not be asked."""


class _Resolver(AbstractResolver):
    """Only addresses that may be asked; what is connected to is what was looked at, whatever a name server says next."""

    def __init__(self, allow_private: bool) -> None:
        self._inner = ThreadedResolver()
        self._allow = allow_private

    async def resolve(self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_UNSPEC) -> list[Any]:
        found = await self._inner.resolve(host, port, family)
        allowed = [one for one in found if self._allow or not is_own_network(one["host"])]
        if not allowed:
            raise _Refused(f"{host} is an address of the own machine or network")
        return allowed

    async def close(self) -> None:
        await self._inner.close()


class Downloader:
    """Downloads images within an event loop; `async with` opens and closes its connections."""

    def __init__(self, limits: Limits, manners: Manners, user_agent: str, listed: Listed) -> None:
        """`listed`: what must not be asked for."""
        self.limits, self.listed = limits, listed
        self.hosts = Hosts(manners, self._small)
        self._agent, self._user_agent = manners.agent, user_agent
        self._respect = manners.respect_opt_out

    async def __aenter__(self) -> Downloader:
        limits = self.limits
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=limits.concurrency, resolver=_Resolver(limits.allow_private)),
            timeout=aiohttp.ClientTimeout(total=limits.seconds, sock_read=limits.idle_seconds),
            headers={"User-Agent": self._user_agent, "Accept": "image/*"},
            cookie_jar=aiohttp.DummyCookieJar(),
        )
        self._slots = asyncio.Semaphore(limits.concurrency)
        return self

    async def __aexit__(self, *details: object) -> None:
        await self._session.close()

    async def get(self, url: str) -> Outcome:
        """The image behind a URL, following redirects by the rules of every host on the way."""
        here = url
        for _ in range(self.limits.max_redirects + 1):
            refusal = (
                "opt_out_listed"
                if here in self.listed
                else self._address_refusal(here) or await self.hosts.refusal(here)
            )
            if refusal:
                return Outcome(refusal)
            turn = await self.hosts.turn(here)
            try:
                async with self._slots:
                    outcome, location = await self._ask(here)
            finally:
                turn.release()
            if not location:
                return outcome if here == url else Outcome(**{**vars(outcome), "url": here})
            here = urljoin(here, location).partition("#")[0]
        return Outcome("too_many_redirects")

    def _address_refusal(self, url: str) -> str:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            return "not_http"
        # Numbers are not looked up, so that the resolver does not see them
        return "private_address" if not self.limits.allow_private and is_own_network(parts.hostname) else ""

    async def _ask(self, url: str) -> tuple[Outcome, str]:
        """What a host answers, and where it sends on to."""
        try:
            async with self._session.get(url, allow_redirects=False) as response:
                if response.status in (301, 302, 303, 307, 308) and response.headers.get("Location"):
                    return Outcome("redirect", response.status), response.headers["Location"]
                return await self._read(response), ""
        except _ERRORS as error:
            return Outcome(_word_for(error)), ""

    async def _read(self, response: aiohttp.ClientResponse) -> Outcome:
        code = response.status
        if code != 200:
            wait = response.headers.get("Retry-After", "")
            self.hosts.hold(str(response.url), float(wait)) if wait.isdigit() else None
            status = "http_5xx" if code >= 500 else f"http_{code}"
            return Outcome(status, code, wait=float(wait) if wait.isdigit() else 0.0)
        if self._respect and (asked := of_headers(response.headers.items(), self._agent)):
            return Outcome(f"opt_out_{min(asked)}", code)
        if (response.content_length or 0) > self.limits.max_bytes:
            return Outcome("too_large", code)
        parts, size = [], 0
        async for chunk in response.content.iter_chunked(_CHUNK):
            size += len(chunk)
            if size > self.limits.max_bytes:
                return Outcome("too_large", code)
            parts.append(chunk)
        content = b"".join(parts)
        return Outcome("opt_out_c2pa", code) if self._respect and in_content(content) else checked(content, code)

    async def _small(self, url: str, max_bytes: int) -> tuple[int, bytes] | str:
        """Status and beginning of a small text, over redirects; a word if there is no answer."""
        try:
            for _ in range(self.limits.max_redirects + 1):
                if refusal := self._address_refusal(url):
                    return refusal
                async with self._session.get(url, allow_redirects=False, headers={"Accept": "*/*"}) as response:
                    if response.status in (301, 302, 303, 307, 308) and response.headers.get("Location"):
                        url = urljoin(url, response.headers["Location"])
                        continue
                    body = b""
                    async for chunk in response.content.iter_chunked(_CHUNK):
                        body += chunk
                        if len(body) >= max_bytes:
                            break
                    return response.status, body[:max_bytes]
            return 404, b""  # RFC 9309: after five redirects as if it were not there
        except _ERRORS as error:
            return _word_for(error)


_ERRORS = (aiohttp.ClientError, OSError, ValueError)  # a time-out is an OSError


def _word_for(error: BaseException) -> str:
    """What went wrong with a request, in a word."""
    if isinstance(error, aiohttp.ClientConnectorDNSError):
        return "private_address" if isinstance(error.os_error, _Refused) else "name_not_found"
    words: list[tuple[str, tuple[type[BaseException], ...]]] = [
        ("private_address", (_Refused,)),
        ("timeout", (TimeoutError,)),
        ("incomplete", (aiohttp.ClientPayloadError,)),
        ("certificate", (aiohttp.ClientConnectorCertificateError, aiohttp.ClientSSLError)),
        ("not_http", (aiohttp.InvalidURL, ValueError)),
    ]
    return next((word for word, kinds in words if isinstance(error, kinds)), "connection")


def checked(content: bytes, code: int = 200) -> Outcome:
    """Bytes that should be an image, by what they begin with and not by what is said of them."""
    try:
        return Outcome("ok", code, content=content, info=read_image_info(content))
    except BadSample as error:
        return Outcome("too_many_pixels" if error.reason == "image_too_large" else "not_an_image", code)
