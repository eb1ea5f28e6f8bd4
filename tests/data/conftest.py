"""A web server on this machine, and small archives of the published formats."""

from __future__ import annotations

import hashlib
import io
import threading
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
from PIL import Image

from locallearn.data import download
from locallearn.data.download import Archive
from locallearn.data.listening import Work


@dataclass
class Server:
    """What it serves, how, and what it was asked.

    Arguments:
        url: of its root.
        files: path -> content.
        has_ranges: whether it can go on in the middle.
        breaks: of each request in turn, after how many bytes the connection ends; then never.
        statuses: of each request in turn, an error to answer with; then none.
        login_page: answered instead of any file, where there is one; its length is not told.
        stalls: how many requests are left unanswered half-way, the connection open.
        goes_on: ends that.
        asked: each request's path and Range.
    """

    url: str
    files: dict[str, bytes] = field(default_factory=dict)
    has_ranges: bool = True
    breaks: list[int] = field(default_factory=list)
    statuses: list[int] = field(default_factory=list)
    login_page: bytes = b""
    stalls: int = 0
    goes_on: threading.Event = field(default_factory=threading.Event)
    asked: list[tuple[str, str | None]] = field(default_factory=list)

    def archive(self, name: str, content: bytes, **more) -> Archive:
        """Serve it, and describe it."""
        self.files[f"/{name}"] = content
        md5 = hashlib.md5(content).hexdigest()
        return Archive(f"{self.url}/{name}", len(content), **{"md5": md5, **more})

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        wanted = request.headers.get("Range")
        self.asked.append((request.path, wanted))
        status = self.statuses.pop(0) if self.statuses else 200
        if self.login_page:
            request.send_response(200)
            request.send_header("Content-Type", "text/html; charset=utf-8")
            request.end_headers()
            request.wfile.write(self.login_page)
            return
        content = self.files.get(request.path)
        if status == 302:  # to itself
            request.send_response(status)
            request.send_header("Location", request.path)
            request.end_headers()
            return
        if content is None or status != 200:
            request.send_error(404 if status == 200 else status)
            return
        start = 0
        if wanted is not None and self.has_ranges:
            start = int(wanted.removeprefix("bytes=").removesuffix("-"))
            if start >= len(content):
                request.send_error(416)
                return
            request.send_response(206)
            span = f"bytes {start}-{len(content) - 1}/{len(content)}"
            request.send_header("Content-Range", span)
        else:
            request.send_response(200)
        request.send_header("Content-Length", str(len(content) - start))
        request.end_headers()
        length = self.breaks.pop(0) if self.breaks else len(content)
        if self.stalls:
            self.stalls -= 1
            request.wfile.write(content[start : len(content) // 2])
            self.goes_on.wait()
            return
        request.wfile.write(content[start:][:length])
        request.close_connection = True


class _QuietServer(ThreadingHTTPServer):
    def handle_error(self, request, client_address) -> None:
        pass


@pytest.fixture
def server(monkeypatch) -> Iterator[Server]:
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(download, "_WAITS_SECONDS", (0.01, 0.01, 0.01))

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            served.answer(self)

        def log_message(self, *arguments) -> None:
            pass

    http = _QuietServer(("127.0.0.1", 0), Handler)
    served = Server(f"http://127.0.0.1:{http.server_port}")
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield served
    served.goes_on.set()
    http.shutdown()
    http.server_close()
    thread.join()


class Listener:
    """Remembers what it is told; ``at`` may interrupt."""

    def __init__(self, at: Callable[[Work, int], None] | None = None) -> None:
        self.works: list[Work] = []
        self.done: list[list[int]] = []
        self.errors: list[BaseException | None] = []
        self._at = at

    def on_work(self, work: Work) -> None:
        self.works.append(work)
        self.done.append([])

    def on_work_progress(self, done: int) -> None:
        self.done[-1].append(done)
        if self._at is not None:
            self._at(self.works[-1], done)

    def on_work_end(self, error: BaseException | None) -> None:
        self.errors.append(error)

    @property
    def verbs(self) -> list[str]:
        return [work.verb for work in self.works]


@pytest.fixture
def listener() -> Listener:
    return Listener()


@pytest.fixture
def make_listener() -> type[Listener]:
    return Listener


@pytest.fixture
def interrupting() -> Callable[[str, int], Listener]:
    """Makes a listener that Ctrl-C reaches once so much of a work is done."""

    def make(verb: str, after: int) -> Listener:
        def at(work: Work, done: int) -> None:
            if work.verb == verb and done >= after:
                raise KeyboardInterrupt

        return Listener(at)

    return make


def zip_of(files: dict[str, bytes]) -> bytes:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return content.getvalue()


def jpeg(height: int, width: int, level: int, mode: str = "RGB") -> bytes:
    rng = np.random.default_rng(level)
    shape = (height, width) if mode == "L" else (height, width, 3)
    pixels = np.clip(rng.normal(level, 20, shape), 0, 255).astype(np.uint8)
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, "JPEG")
    return content.getvalue()


@pytest.fixture
def make_zip() -> Callable[[dict[str, bytes]], bytes]:
    return zip_of


@pytest.fixture
def make_jpeg() -> Callable[..., bytes]:
    return jpeg


@pytest.fixture
def tiny_files() -> dict[str, bytes]:
    """tiny-imagenet-200 with three classes, ids and words such as the real one's."""
    root = "tiny-imagenet-200"
    wnids = ["n02124075", "n01629819", "n02012849"]
    files = {
        f"{root}/wnids.txt": "\n".join(wnids).encode() + b"\n",
        f"{root}/words.txt": (
            b"n00001740\tentity\nn02124075\tEgyptian cat\nn01629819\tcrane, fire salamander\n"
            b"n02012849\tcrane\n"
        ),
    }
    annotations = []
    for label, wnid in enumerate(wnids):
        boxes = []
        for i in range(4):
            name = f"{wnid}_{i}.JPEG"
            mode = "L" if i == 0 else "RGB"
            image = jpeg(64, 64, 40 + 70 * label + i, mode)
            files[f"{root}/train/{wnid}/images/{name}"] = image
            boxes.append(f"{name}\t0\t10\t63\t58\n")
        files[f"{root}/train/{wnid}/{wnid}_boxes.txt"] = "".join(boxes).encode()
        name = f"val_{2 - label}.JPEG"
        files[f"{root}/val/images/{name}"] = jpeg(64, 64, 44 + 70 * label)
        annotations.append(f"{name}\t{wnid}\t0\t32\t44\t62\n")
    files[f"{root}/val/val_annotations.txt"] = "".join(annotations).encode()
    files[f"{root}/test/images/test_0.JPEG"] = jpeg(64, 64, 9)
    return files
