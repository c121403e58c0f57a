"""A headless Chromium driven over a pipe by its DevTools protocol: open, click, wait, see what it asked the network.

The protocol's messages are JSON, each ended by a zero byte, on file descriptors 3 and 4 of the browser
(--remote-debugging-pipe), so no library of sockets is needed.
"""

from __future__ import annotations

import base64
import contextlib
import fcntl
import json
import os
import select
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest


def _found() -> str | None:
    """The first browser that runs: one may be a stub that only says how to install it."""
    for name in ("chromium", "chromium-browser", "google-chrome"):
        place = shutil.which(name)
        if place and subprocess.run([place, "--version"], capture_output=True, timeout=60).returncode == 0:
            return place
    return None


FOUND = _found()
needs_chromium = pytest.mark.skipif(FOUND is None, reason="there is no Chromium here to open pages in")
# Gives a process its ends of the two pipes under the numbers the browser looks for, and becomes the browser. Not as
# Popen's preexec_fn, which would run Python between fork and exec of a process that has threads.
_NUMBERED = "import os, sys; [os.dup2(int(sys.argv[n]), n + 2) for n in (1, 2)]; os.execv(sys.argv[3], sys.argv[3:])"
_QUIET = (
    *("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-extensions"),
    *("--no-default-browser-check", "--disable-features=Translate,OptimizationHints,MediaRouter", "--mute-audio"),
    # A camera and a microphone of its own, which nobody has to allow.
    *("--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream"),
)


class Browser:
    """One page of a browser. Use it in a `with` block.

    Args:
        profile: folder for what the browser keeps.
        width: of the window, in pixels.

    Attributes:
        asked: address of every request that the page made.
        told: what its console said: errors and refusals of the policy.
    """

    def __init__(self, profile: Path, width: int = 1280):
        assert FOUND
        self.asked: list[str] = []
        self.told: list[str] = []
        self._number = 0
        self._rest = b""
        # The child's ends lie above 4, so that giving them their numbers cannot overwrite one another.
        commands, answers = os.pipe(), os.pipe()
        given = [fcntl.fcntl(end, fcntl.F_DUPFD, 10) for end in (commands[0], answers[1])]
        self._in, self._out = commands[1], answers[0]

        self._process = subprocess.Popen(
            [
                *(sys.executable, "-c", _NUMBERED, *map(str, given), FOUND, *_QUIET, "--remote-debugging-pipe"),
                *(f"--user-data-dir={profile}", f"--window-size={width},900"),
            ],
            pass_fds=given,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for end in (*given, commands[0], answers[1]):
            os.close(end)
        try:
            self._begin(width)
        except BaseException:
            self.__exit__()  # nobody else would end it
            raise

    def _begin(self, width: int) -> None:
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Network", "Runtime", "Log", "DOM"):
            self.call(f"{domain}.enable")
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=width < 600
        )

    def __enter__(self) -> Browser:
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(Exception):
            self.call("Browser.close")
        self._process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(10)
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()
        os.close(self._in)
        os.close(self._out)

    def open(self, address: str) -> None:
        """Opens an address and waits until it is loaded."""
        self.call("Page.navigate", url=address)
        self.until("document.readyState === 'complete' && location.href !== 'about:blank'")

    def run(self, script: str) -> Any:
        """The value of an expression in the page."""
        done = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True, userGesture=True)
        assert "exceptionDetails" not in done, done["exceptionDetails"]
        return done["result"].get("value")

    def until(self, script: str, seconds: float = 20.0) -> None:
        """Waits until an expression holds, and fails where it does not."""
        end = time.monotonic() + seconds
        while not self.run(script):
            assert time.monotonic() < end, f"never came: {script}; the page says: {self.run('document.body.innerText')}"
            time.sleep(0.05)

    def choose(self, selector: str, file: Path) -> None:
        """Puts a file into an input, as its user would."""
        root = self.call("DOM.getDocument")["root"]["nodeId"]
        node = self.call("DOM.querySelector", nodeId=root, selector=selector)["nodeId"]
        self.call("DOM.setFileInputFiles", files=[str(file)], nodeId=node)

    def picture(self, file: Path) -> None:
        """Writes a picture (PNG) of the whole page."""
        shot = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=True)
        file.write_bytes(base64.b64decode(shot["data"]))

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Calls a method of the protocol and waits for its result; what happens meanwhile is kept."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if hasattr(self, "_session"):
            message["sessionId"] = self._session
        os.write(self._in, json.dumps(message).encode() + b"\0")
        while True:
            told = self._next()
            if told.get("id") == self._number:
                assert "error" not in told, (method, told["error"])
                return told["result"]
            self._keep(told)

    def _next(self, seconds: float = 20.0) -> dict[str, Any]:
        while b"\0" not in self._rest:
            assert select.select([self._out], [], [], seconds)[0], "the browser says nothing"
            piece = os.read(self._out, 1 << 16)
            assert piece, "the browser has ended"
            self._rest += piece
        one, _, self._rest = self._rest.partition(b"\0")
        return json.loads(one)

    def _keep(self, event: dict[str, Any]) -> None:
        about = event.get("params", {})
        if event.get("method") == "Network.requestWillBeSent":
            self.asked.append(about["request"]["url"])
        elif event.get("method") == "Log.entryAdded":
            self.told.append(f"{about['entry']['text']} {about['entry'].get('url', '')}")
        elif event.get("method") == "Runtime.exceptionThrown":
            self.told.append(str(about["exceptionDetails"]))
