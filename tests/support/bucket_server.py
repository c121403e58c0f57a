"""A server on this machine that speaks the part of Cloud Storage's JSON API which TensorStore and gcsfs use.

Objects appear whole or not at all, each write makes a new generation, and conditions on generations hold, as Google
documents them for the real service (https://cloud.google.com/storage/docs/json_api/v1/objects).
"""

from __future__ import annotations

import base64
import hashlib
import itertools
import json
import re
import sys
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import NamedTuple
from urllib.parse import parse_qsl, unquote, urlsplit

import google_crc32c

_OBJECT = re.compile(r"/(?:download/)?storage/v1/b/([^/]+)/o/(.+)")
_LISTING = re.compile(r"/storage/v1/b/([^/]+)/o/?")
_UPLOAD = re.compile(r"/upload/storage/v1/b/([^/]+)/o/?")


class Stored(NamedTuple):
    """An object."""

    data: bytes
    generation: int


class Refusal(Exception):
    """An answer other than success."""

    def __init__(self, status: int, reason: str = ""):
        super().__init__(reason)
        self.status = status


class BucketServer:
    """Serves one bucket until `close`.

    Attributes:
        objects: name -> Stored. Tests may look at them, and change them as somebody else would.
        requests: method and object name of every request so far; READ for a GET of the content.
        refuse: asked before each request with its method and object name; a status it gives is the answer.
    """

    name = "bucket"

    def __init__(self, port: int = 0):
        self.objects: dict[str, Stored] = {}
        self.requests: list[tuple[str, str]] = []
        self.refuse: Callable[[str, str], int | None] = lambda method, name: None
        self._generations = itertools.count(time.time_ns() // 1000)
        self._uploads: dict[str, tuple[str, dict[str, str], bytearray]] = {}
        self._lock = threading.RLock()
        self._server = _Server(("127.0.0.1", port), type("Handler", (_Handler,), {"bucket": self}))
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    @property
    def environment(self) -> dict[str, str]:
        """What makes the client libraries of a process come here instead of to Google."""
        return {
            "TENSORSTORE_GCS_HTTP_URL": self.url,
            "STORAGE_EMULATOR_HOST": self.url,
            "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",  # asks the kind of a bucket over gRPC
            "NO_GCE_CHECK": "true",
        }

    def put(self, name: str, data: bytes) -> None:
        """Writes an object as another client would."""
        with self._lock:
            self.objects[name] = Stored(data, next(self._generations))

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def answer(self, method: str, url: str, headers: dict[str, str], body: bytes) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and body of the answer to a request."""
        split = urlsplit(url)
        query = dict(parse_qsl(split.query))
        with self._lock:
            found = _OBJECT.fullmatch(split.path) or _LISTING.fullmatch(split.path) or _UPLOAD.fullmatch(split.path)
            if found is None or unquote(found[1]) != self.name:
                raise Refusal(404, f"no bucket at {split.path}")
            name = unquote(found[2]) if found.re is _OBJECT else query.get("name", "")
            if "upload_id" in query:
                name = self._uploads[query["upload_id"]][0]
            if method == "POST" and query.get("uploadType") == "multipart":
                name, body = _parts_of(body)
            self.requests.append(("READ" if query.get("alt") == "media" else method, name))
            if status := self.refuse(method, name):
                raise Refusal(status, "refused by the test")
            if found.re is _LISTING:
                return self._list(query)
            if found.re is _UPLOAD:
                return self._upload(name, query, headers, body)
            self._check_conditions(name, query)
            if name not in self.objects:
                raise Refusal(404, f"no object {name}")
            if method == "DELETE":
                del self.objects[name]
                return 204, {}, b""
            return self._content(name, headers) if query.get("alt") == "media" else _json(self._described(name))

    def _check_conditions(self, name: str, query: dict[str, str]) -> None:
        generation = self.objects[name].generation if name in self.objects else 0
        if int(query.get("ifGenerationMatch", generation)) != generation:
            raise Refusal(412, "another generation")
        if "ifGenerationNotMatch" in query and int(query["ifGenerationNotMatch"]) == generation:
            raise Refusal(304)

    def _upload(self, name: str, query: dict[str, str], headers: dict[str, str], body: bytes):
        if query["uploadType"] == "resumable":
            if "upload_id" not in query:
                number = f"upload-{next(self._generations)}"
                self._uploads[number] = (name, query, bytearray())
                path = f"/upload/storage/v1/b/{self.name}/o?uploadType=resumable&upload_id={number}"
                return 200, {"Location": self.url + path}, b""
            name, query, received = self._uploads[query["upload_id"]]
            received += body
            if len(received) < int(headers["content-range"].rpartition("/")[2]):
                return 308, {"Range": f"bytes=0-{len(received) - 1}"}, b""
            body = bytes(received)
        self._check_conditions(name, query)
        self.put(name, body)
        return _json(self._described(name))

    def _list(self, query: dict[str, str]):
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter", "")
        names = [name for name in sorted(self.objects) if name.startswith(prefix)]
        names = [name for name in names if name >= query.get("startOffset", "") and name > query.get("pageToken", "")]
        names = [name for name in names if not query.get("endOffset") or name < query["endOffset"]]
        page = names[: int(query.get("maxResults", 1000))]
        folders = {
            prefix + name[len(prefix) :].partition(delimiter)[0] + delimiter
            for name in page
            if delimiter and delimiter in name[len(prefix) :]
        }
        items = [self._described(name) for name in page if not name.startswith(tuple(folders))]
        answer = {"kind": "storage#objects", "items": items, "prefixes": sorted(folders)}
        return _json(answer | ({"nextPageToken": page[-1]} if len(page) < len(names) else {}))

    def _content(self, name: str, headers: dict[str, str]):
        stored = self.objects[name]
        about = {"x-goog-generation": str(stored.generation), "x-goog-hash": f"crc32c={_crc32c(stored.data)}"}
        asked = re.fullmatch(r"bytes=(\d*)-(\d*)", headers.get("range", ""))
        if asked is None:
            return 200, about, stored.data
        size = len(stored.data)
        start = int(asked[1]) if asked[1] else max(0, size - int(asked[2]))
        end = min(int(asked[2]) + 1, size) if asked[1] and asked[2] else size
        if start >= size:
            raise Refusal(416, "beyond the end")
        return 206, about | {"Content-Range": f"bytes {start}-{end - 1}/{size}"}, stored.data[start:end]

    def _described(self, name: str) -> dict[str, str]:
        stored = self.objects[name]
        made = time.strftime("%Y-%m-%dT%H:%M:%S.000Z", time.gmtime(stored.generation / 1e6))
        return {
            "kind": "storage#object",
            "id": f"{self.name}/{name}/{stored.generation}",
            "bucket": self.name,
            "name": name,
            "size": str(len(stored.data)),
            "generation": str(stored.generation),
            "metageneration": "1",
            "crc32c": _crc32c(stored.data),
            "md5Hash": base64.b64encode(hashlib.md5(stored.data).digest()).decode(),
            "timeCreated": made,
            "updated": made,
        }


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request, client_address) -> None:
        if not isinstance(sys.exception(), ConnectionError):  # clients that are killed, or no longer want the answer
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    bucket: BucketServer
    protocol_version = "HTTP/1.1"  # connections are kept
    disable_nagle_algorithm = True  # which would hold every second packet for 40 ms

    def _serve(self) -> None:
        headers = {name.lower(): value for name, value in self.headers.items()}
        body = self.rfile.read(int(headers.get("content-length", 0)))
        try:
            status, about, content = self.bucket.answer(self.command, self.path, headers, body)
        except Refusal as refusal:
            error = {"error": {"code": refusal.status, "message": str(refusal)}}
            status, about, content = refusal.status, {}, b"" if refusal.status == 304 else json.dumps(error).encode()
        self.send_response(status)
        for name, value in about.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    do_GET = do_POST = do_PUT = do_DELETE = _serve

    def log_message(self, *_) -> None:
        """Says nothing."""


def _parts_of(body: bytes) -> tuple[str, bytes]:
    """Name and content of a multipart upload, by RFC 2046: the break before a dividing line belongs to that line."""
    line = body.partition(b"\n")[0].rstrip(b"\r")
    _, described, content, *_ = re.split(rb"(?:^|\r?\n)" + re.escape(line) + rb"(?=\r?\n|--)", body)
    described, content = (re.split(rb"\r?\n\r?\n", part, maxsplit=1)[1] for part in (described, content))
    return json.loads(described)["name"], content


def _json(content: dict) -> tuple[int, dict[str, str], bytes]:
    return 200, {"Content-Type": "application/json; charset=UTF-8"}, json.dumps(content).encode()


def _crc32c(data: bytes) -> str:
    return base64.b64encode(google_crc32c.Checksum(data).digest()).decode()
