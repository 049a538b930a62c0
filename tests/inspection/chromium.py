"""Drives headless Chromium over its debugging pipe; times a page of ``cppo inspect`` and takes its screenshots:

python tests/inspection/chromium.py PAGE [FOLDER]
"""

import base64
import json
import os
import shutil
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path

NAME = next(filter(shutil.which, ("chromium", "chromium-browser", "google-chrome")), None)
READY = "document.body?.dataset.ready !== undefined"


class Browser:
    """One page of one browser; ``requests``: every URL that it asked for, ``messages``: errors and dialogs."""

    def __init__(self, send, receive):
        self._send, self._receive = send, receive
        self._number, self._session = 0, None
        self.requests, self.messages = [], []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method, **params):
        self._number += 1
        message = {"id": self._number, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        self._send.write(json.dumps(message).encode() + b"\0")
        self._send.flush()
        while (answer := self._next()).get("id") != self._number:
            self._note(answer)
        assert "error" not in answer, answer["error"]
        return answer["result"]

    def _next(self):
        data = bytearray()
        while (byte := self._receive.read(1)) not in (b"\0", b""):
            data += byte
        assert data, "Chromium has ended"
        return json.loads(data)

    def _note(self, event):
        kind, params = event.get("method", ""), event.get("params", {})
        if kind == "Network.requestWillBeSent":
            self.requests.append(params["request"]["url"])
        elif kind in ("Runtime.exceptionThrown", "Log.entryAdded", "Page.javascriptDialogOpening"):
            self.messages.append(json.dumps(params)[:500])

    def run(self, expression):
        """The value of a JavaScript expression (or of the promise that it is)."""
        result = self.call("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in result, result["exceptionDetails"]
        return result["result"].get("value")

    def open(self, path):
        """Load a page of ``cppo inspect``; milliseconds from the navigation to the first response on the screen."""
        self.call("Page.navigate", url=Path(path).resolve().as_uri())
        loaded = self.run(
            f"new Promise(done => {{ const wait = () => {READY} ? requestAnimationFrame(() => done(performance.now()))"
            " : performance.now() > 20000 ? done(null) : setTimeout(wait, 5); wait(); })"
        )
        assert loaded is not None, f"the page did not get ready: {self.messages}"
        return loaded

    def key(self, key):
        for kind in ("keyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=key, text=key if len(key) == 1 else "")

    def size(self, width, height, scale=1, dark=False):
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=scale,
                  mobile=width < 600)  # fmt: skip
        theme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[theme])

    def screenshot(self, file):
        self.run("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")
        Path(file).write_bytes(base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"]))


@contextmanager
def browser():
    """Headless Chromium with a profile of its own."""
    to_browser, from_browser = os.pipe(), os.pipe()

    def connect():  # its ends of the pipe are file descriptors 3 and 4, by --remote-debugging-pipe
        ends = os.dup(to_browser[0]), os.dup(from_browser[1])
        os.dup2(ends[0], 3)
        os.dup2(ends[1], 4)

    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        command = [NAME, "--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe", "--hide-scrollbars",
                   "--disable-dev-shm-usage", f"--user-data-dir={profile}"]  # fmt: skip
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        with subprocess.Popen(command, close_fds=False, preexec_fn=connect, start_new_session=True, **quiet) as process:
            os.close(to_browser[0])
            os.close(from_browser[1])
            send, receive = os.fdopen(to_browser[1], "wb"), os.fdopen(from_browser[0], "rb")
            try:
                yield Browser(send, receive)
            finally:
                process.terminate()
                send.close()
                receive.close()


# The longest time between two frames while a response is scrolled to its end, 300 pixels a frame.
SCROLL = """new Promise((done) => {
  const box = document.querySelector("article"), end = box.scrollHeight, gaps = [];
  box.scrollTop = 0;
  let last = null;
  const frame = (now) => {
    if (last) gaps.push(now - last);
    last = now;
    box.scrollTop += 300;
    gaps.length < Math.max(end / 300, 20) ? requestAnimationFrame(frame) : done(Math.max(...gaps));
  };
  setTimeout(() => requestAnimationFrame(frame), 500);
})"""
# Until it is on the screen.
OPEN = """new Promise((done) => {
  const start = performance.now();
  open(state.step.rows[0]);
  requestAnimationFrame(() => requestAnimationFrame(() => done(performance.now() - start)));
})"""
SLIDE = """(() => {
  const times = [];
  for (const delta of [0.01, 0.5, 0.05, 0.2, 0.1]) {
    const start = performance.now();
    state.method.settings.delta = delta;
    recompute();
    document.body.offsetHeight; // laid out
    times.push(performance.now() - start);
  }
  return times;
})()"""


def times(chromium, page):
    """What is waited for on a page: name -> (milliseconds of each repetition, limit). It is open at the end."""
    chromium.size(1280, 800)
    loads = [chromium.open(page) for _ in range(3)]
    slides = chromium.run(SLIDE)
    opened, gaps = zip(*((chromium.run(OPEN), chromium.run(SCROLL)) for _ in range(3)), strict=True)
    return {"load": (loads, 2000), "open a response": (opened, 500), "slider": (slides, 100), "frame": (gaps, 100)}


def table(measured):
    rows = (f"  {name}: {', '.join(f'{value:.0f}' for value in values)}" for name, (values, _) in measured.items())
    return "\n".join(["milliseconds:", *rows])


VIEWS = {
    "inspect-light": ((1280, 800), False, None),
    "inspect-dark": ((1280, 800), True, ("other", "dppo")),
    "inspect-phone": ((390, 844), False, ("colour", "divergence")),
}


def main(page, folder=None):
    with browser() as chromium:
        measured = times(chromium, page)
        print(chromium.run("$('parity').textContent"), table(measured), sep="\n")
    for name, (size, dark, choice) in VIEWS.items() if folder else ():
        with browser() as chromium:
            chromium.size(*size, dark=dark)
            print(f"{name}: loaded in {chromium.open(page):.0f} ms")
            chromium.run("$('sort').value = 'share masked', arrange(), open(state.shown[0]), nextMasked(1)")
            if choice:
                chromium.run(
                    f"$('{choice[0]}').value = '{choice[1]}', $('{choice[0]}').dispatchEvent(new Event('change'))"
                )
            if size[0] < 600:
                chromium.run("document.querySelector('article').scrollIntoView()")
            chromium.screenshot(Path(folder) / f"{name}.png")
            assert not chromium.messages, chromium.messages


if __name__ == "__main__":
    main(*sys.argv[1:])
