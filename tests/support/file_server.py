"""A server of files on this machine, which answers as servers do: wholly, partly, slowly, or not at all."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Event, Thread


class FileServer:
    """`files` by their names. Each request is answered by the next of `answers`, by `whole` after the last one."""

    def __init__(self, files: dict[str, bytes]) -> None:
        self.files, self.answers = files, list[Answer]()
        self.requests: list[tuple[str, str | None]] = []  # name and Range
        self.stopped = Event()
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                name = self.path.removeprefix("/")
                server.requests.append((name, self.headers.get("Range")))
                answer = server.answers.pop(0) if server.answers else whole
                with suppress(BrokenPipeError, ConnectionResetError):  # the client has left
                    answer(self, server.files[name])

            def log_message(self, *_: object) -> None:
                pass

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._http.daemon_threads = True
        self.address = f"http://127.0.0.1:{self._http.server_port}/"
        Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()

    def close(self) -> None:
        """Stop: nothing listens at the address any more."""
        self.stopped.set()
        self._http.shutdown()
        self._http.server_close()

    def stalled(self, count: int) -> Answer:
        """So many bytes of what is asked for, and then nothing, while the connection stays."""

        def answer(handler: BaseHTTPRequestHandler, content: bytes) -> None:
            handler.wfile.write(_promised(handler, content)[:count])
            self.stopped.wait()

        return answer


Answer = Callable[[BaseHTTPRequestHandler, bytes], None]


def _headers(handler: BaseHTTPRequestHandler, status: int, **more: object) -> None:
    handler.send_response(status)
    for name, value in more.items():
        handler.send_header(name.replace("_", "-"), str(value))
    handler.end_headers()


def _promised(handler: BaseHTTPRequestHandler, content: bytes) -> bytes:
    """What is asked for, after its headers are sent."""
    asked = handler.headers.get("Range")
    start = int(asked.removeprefix("bytes=").removesuffix("-")) if asked else 0
    if not asked:
        _headers(handler, 200, Content_Length=len(content))
    elif start < len(content):
        place = f"bytes {start}-{len(content) - 1}/{len(content)}"
        _headers(handler, 206, Content_Length=len(content) - start, Content_Range=place)
    else:
        _headers(handler, 416, Content_Length=0, Content_Range=f"bytes */{len(content)}")
    return content[start:]


def whole(handler: BaseHTTPRequestHandler, content: bytes) -> None:
    """The file, or the part of it that is asked for."""
    handler.wfile.write(_promised(handler, content))


def ignoring_range(handler: BaseHTTPRequestHandler, content: bytes) -> None:
    """The whole file, whatever is asked for."""
    _headers(handler, 200, Content_Length=len(content))
    handler.wfile.write(content)


def without_length(handler: BaseHTTPRequestHandler, content: bytes) -> None:
    """The whole file, until the connection ends."""
    _headers(handler, 200)
    handler.wfile.write(content)


def from_elsewhere(handler: BaseHTTPRequestHandler, content: bytes) -> None:
    """The last byte, whatever is asked for."""
    _headers(handler, 206, Content_Range=f"bytes {len(content) - 1}-{len(content) - 1}/{len(content)}")
    handler.wfile.write(content[-1:])


def broken(count: int) -> Answer:
    """So many bytes of what is asked for, then the end of the connection."""

    def answer(handler: BaseHTTPRequestHandler, content: bytes) -> None:
        handler.wfile.write(_promised(handler, content)[:count])

    return answer


def broken_chunks(count: int) -> Answer:
    """The same of the whole file by chunked transfer, which states no length."""

    def answer(handler: BaseHTTPRequestHandler, content: bytes) -> None:
        handler.protocol_version = "HTTP/1.1"
        _headers(handler, 200, Transfer_Encoding="chunked", Connection="close")
        handler.wfile.write(f"{len(content):x}\r\n".encode() + content[:count])

    return answer


def slow(pieces: int, pause: float) -> Answer:
    """In so many pieces, with a pause before each."""

    def answer(handler: BaseHTTPRequestHandler, content: bytes) -> None:
        body = _promised(handler, content)
        step = -(-len(body) // pieces)
        for start in range(0, len(body), step):
            time.sleep(pause)
            handler.wfile.write(body[start : start + step])

    return answer


def refused(status: int) -> Answer:
    """An error."""
    return lambda handler, content: _headers(handler, status, Content_Length=0)


def redirected(address: str) -> Answer:
    """To another address."""
    return lambda handler, content: _headers(handler, 302, Location=address, Content_Length=0)
