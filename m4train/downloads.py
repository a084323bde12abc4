"""Fetching a file that a person or a dataset names by URL, without trusting whoever answers."""

from __future__ import annotations

import http.client
import ipaddress
import os
import socket
import time
import urllib.error
import urllib.parse
import urllib.request
from typing import Any

ALLOW_PRIVATE = "M4TRAIN_ALLOW_PRIVATE_URLS"  # environment: also addresses of the own machine and network
_SCHEMES = ("http", "https")
_REDIRECTS = 5
_CHUNK = 1 << 16


class DownloadError(OSError):
    """A URL that cannot be fetched, or that is not allowed to be."""


def fetch(url: str, max_bytes: int, seconds: float) -> bytes:
    """The bytes behind an http or https URL.

    Redirects are followed to http and https only. Addresses of the own machine or network are refused, whatever the
    name, unless M4TRAIN_ALLOW_PRIVATE_URLS is set; a proxy of the environment decides that by itself. Raises
    DownloadError, also for more than `max_bytes` bytes and after `seconds` in all.
    """
    deadline = time.monotonic() + seconds
    opener = urllib.request.OpenerDirector()
    handlers: tuple[urllib.request.BaseHandler, ...] = (
        urllib.request.ProxyHandler(),
        _Http(deadline),
        _Https(deadline),
        _Redirects(),
        urllib.request.HTTPErrorProcessor(),
        urllib.request.HTTPDefaultErrorHandler(),
        urllib.request.UnknownHandler(),
    )
    for handler in handlers:
        opener.add_handler(handler)
    _check_scheme(url)
    try:
        request = urllib.request.Request(url, headers={"User-Agent": "m4train"})
        with opener.open(request, timeout=_left(deadline)) as response:
            return _body(response, max_bytes, deadline, seconds)
    except DownloadError:
        raise
    except urllib.error.HTTPError as error:
        raise DownloadError(f"the server answers {error.code} {error.reason}") from None
    except (OSError, ValueError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", error)
        if isinstance(reason, DownloadError):
            raise reason from None
        late = time.monotonic() >= deadline
        raise DownloadError(f"it took more than {seconds:g} seconds" if late else str(reason)) from None


def _body(response: Any, max_bytes: int, deadline: float, seconds: float) -> bytes:
    parts, size = [], 0
    while chunk := response.read1(_CHUNK):
        size += len(chunk)
        if size > max_bytes:
            raise DownloadError(f"it has more than {max_bytes} bytes")
        if time.monotonic() >= deadline:
            raise DownloadError(f"it took more than {seconds:g} seconds")
        parts.append(chunk)
    return b"".join(parts)


def _left(deadline: float) -> float:
    return max(0.001, deadline - time.monotonic())


def _check_scheme(url: str) -> None:
    scheme = urllib.parse.urlsplit(url).scheme.lower()
    if scheme not in _SCHEMES:
        raise DownloadError(f"only http and https URLs are fetched, and this is {scheme or 'neither'}")


def is_own_network(host: str) -> bool:
    """Whether a host given by its number is one of the own machine or network; names are not looked up."""
    try:
        address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return False
    address = getattr(address, "ipv4_mapped", None) or address
    return not address.is_global or address.is_multicast


def _refuse_private(connection: http.client.HTTPConnection, proxied: bool) -> None:
    """Looks at the address that was really connected to, so that no answer of a name server can change it later."""
    if proxied or os.environ.get(ALLOW_PRIVATE, "") not in ("", "0"):
        return
    address = connection.sock.getpeername()[0]
    if is_own_network(address):
        connection.close()
        raise DownloadError(
            f"{connection.host} is an address of the own machine or network ({address}): set {ALLOW_PRIVATE}=1 to allow that"
        )


class _Redirects(urllib.request.HTTPRedirectHandler):
    max_redirections = _REDIRECTS

    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
        _check_scheme(newurl)
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _checked(
    kind: type[http.client.HTTPConnection], deadline: float, proxied: bool
) -> type[http.client.HTTPConnection]:
    class Checked(kind):  # type: ignore[valid-type,misc]
        def connect(self) -> None:
            self.timeout = _left(deadline)
            self._create_connection = self._connected
            super().connect()

        def _connected(self, *args: Any, **options: Any) -> socket.socket:
            self.sock = socket.create_connection(*args, **options)
            _refuse_private(self, proxied)  # before anything is sent, a handshake too
            return self.sock

    return Checked


class _Http(urllib.request.HTTPHandler):
    def __init__(self, deadline: float) -> None:
        super().__init__()
        self._deadline = deadline

    def http_open(self, req: urllib.request.Request) -> Any:
        return self.do_open(_checked(http.client.HTTPConnection, self._deadline, req.has_proxy()), req)


class _Https(urllib.request.HTTPSHandler):
    def __init__(self, deadline: float) -> None:
        super().__init__()
        self._deadline = deadline

    def https_open(self, req: urllib.request.Request) -> Any:
        proxied = req.has_proxy() or bool(getattr(req, "_tunnel_host", None))
        return self.do_open(_checked(http.client.HTTPSConnection, self._deadline, proxied), req, context=self._context)  # type: ignore[attr-defined]
