"""A headless Chromium that pages are opened in, spoken to by its DevTools protocol."""

from __future__ import annotations

import asyncio
import base64
import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import aiohttp

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
FLAGS = ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run")
KEYS = {"Enter": 13, "Escape": 27, "ArrowLeft": 37, "ArrowRight": 39, "Tab": 9}


def found() -> str | None:
    """The program, if there is one."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


class Browser:
    """One page after another; `errors` are what went to the console of the page or failed in it, `requests` what it asked for."""

    def __init__(self) -> None:
        self._profile = tempfile.TemporaryDirectory(prefix="m4train-browser-", ignore_cleanup_errors=True)
        command = [str(found()), *FLAGS, "--remote-debugging-port=0", f"--user-data-dir={self._profile.name}"]
        environment = {**os.environ, "HOME": self._profile.name}
        self._process = subprocess.Popen(
            [*command, "about:blank"], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, env=environment
        )
        assert self._process.stderr is not None
        for line in self._process.stderr:
            if match := re.search(r"ws://\S+", line):
                break
        else:
            raise AssertionError("Chromium ended before it listened")
        self._loop = asyncio.new_event_loop()
        self._number = 0
        self.errors: list[str] = []
        self.requests: list[str] = []
        self._loaded = False
        self._run(self._connect(match[0]))

    def _run(self, work: Any) -> Any:
        return self._loop.run_until_complete(asyncio.wait_for(work, 120))

    async def _connect(self, address: str) -> None:
        self._session = aiohttp.ClientSession()
        self._link = await self._session.ws_connect(address, max_msg_size=0)
        self._page = None
        target = await self._ask("Target.createTarget", url="about:blank")
        attached = await self._ask("Target.attachToTarget", targetId=target["targetId"], flatten=True)
        self._page = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            await self._ask(f"{domain}.enable")

    async def _ask(self, method: str, **values: Any) -> Any:
        self._number += 1
        number, page = self._number, {"sessionId": self._page} if self._page else {}
        await self._link.send_json({"id": number, "method": method, "params": values, **page})
        while True:
            said = await self._link.receive_json()
            self._note(said)
            if said.get("id") == number:
                assert "error" not in said, (method, said["error"])
                return said["result"]

    def _note(self, said: dict[str, Any]) -> None:
        method, about = said.get("method"), said.get("params", {})
        if method == "Runtime.exceptionThrown":
            self.errors.append(str(about["exceptionDetails"]))
        elif method == "Runtime.consoleAPICalled":
            self.errors.append(str(about["args"]))
        elif method == "Log.entryAdded":
            self.errors.append(about["entry"]["text"])
        elif method == "Network.requestWillBeSent" and not about["request"]["url"].startswith(("data:", "about:")):
            self.requests.append(about["request"]["url"])
        elif method == "Page.loadEventFired":
            self._loaded = True

    def open(self, address: str | Path, width: int, dark: bool = False) -> None:
        """Opens a page at a width and waits until it is there."""
        self.errors, self.requests, self._loaded = [], [], False
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        url = address if isinstance(address, str) else address.as_uri()

        async def go() -> None:
            await self._ask(
                "Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=width < 500
            )
            await self._ask("Emulation.setEmulatedMedia", features=[scheme])
            await self._ask("Page.navigate", url=url)
            while not self._loaded:
                self._note(await self._link.receive_json())

        self._run(go())

    def value(self, expression: str) -> Any:
        """What an expression of JavaScript gives in the page."""
        told = self._run(self._ask("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True))
        assert "exceptionDetails" not in told, told["exceptionDetails"]
        return told["result"].get("value")

    def press(self, key: str) -> None:
        for kind in ("rawKeyDown", "keyUp"):
            code = {"windowsVirtualKeyCode": KEYS[key], "key": key, "code": key, "type": kind}
            self._run(self._ask("Input.dispatchKeyEvent", **code))

    def point(self, x: float, y: float, click: bool = False) -> None:
        """Moves the pointer to a place of the window, and clicks there."""
        for kind in ("mouseMoved", *(("mousePressed", "mouseReleased") if click else ())):
            self._run(self._ask("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1))

    def screenshot(self, path: Path) -> None:
        shot = self._run(self._ask("Page.captureScreenshot", captureBeyondViewport=True))
        path.write_bytes(base64.b64decode(shot["data"]))

    def close(self) -> None:
        self._run(self._link.close())
        self._run(self._session.close())
        self._process.terminate()
        self._process.wait(timeout=60)
        self._loop.close()
        self._profile.cleanup()
