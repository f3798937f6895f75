"""Fetching a list: plain HTTP, within 5 s and 70 MB, without redirects, through the proxies of the environment."""

from __future__ import annotations

import http.server
import socket
import threading
import time
from collections.abc import Callable

import pytest
from support.crls import ListServer, send
from support.probes import HANG

from neon_async._wire.revocation import download
from neon_async._wire.revocation.download import fetch
from neon_async._wire.revocation.lists import ListRefusedError

Handler = http.server.BaseHTTPRequestHandler


def status(code: int, *headers: tuple[str, str]) -> Callable[[Handler], None]:
    """Return what answers with `code` and `headers`."""

    def answer(handler: Handler) -> None:
        handler.send_response(code)
        for name, value in (*headers, ("Content-Length", "0")):
            handler.send_header(name, value)
        handler.end_headers()

    return answer


def of_unknown_length(handler: Handler, size: int) -> None:
    """Send `size` zeros in chunks, without saying how many there will be."""
    handler.send_response(200)
    handler.send_header("Transfer-Encoding", "chunked")
    handler.end_headers()
    for _ in range(size // 1_000_000):
        handler.wfile.write(b"%x\r\n" % 1_000_000 + bytes(1_000_000) + b"\r\n")
    handler.wfile.write(b"0\r\n\r\n")


def cut_chunk(handler: Handler) -> None:
    handler.send_response(200)
    handler.send_header("Transfer-Encoding", "chunked")
    handler.end_headers()
    handler.wfile.write(b"ff\r\nxyz")
    handler.close_connection = True


def without_http(handler: Handler) -> None:
    handler.wfile.write(b"\x15\x03\x01\x00\x02\x02\x28\r\n\r\n")
    handler.close_connection = True


def slowly(handler: Handler, text: bytes) -> None:
    """Send a byte every 50 ms, again and again, until the client gives up."""
    while True:
        for byte in text:
            handler.wfile.write(bytes([byte]))
            time.sleep(0.05)


def cut_off(handler: Handler) -> None:
    send(handler, b"short", length=100)
    handler.close_connection = True


def test_a_body_is_returned_as_it_was_sent(lists: ListServer) -> None:
    lists.bodies["/1.crl"] = body = bytes(range(256)) * 1000
    assert fetch(lists.url("/1.crl")) == body
    lists.bodies["/2.crl"] = lambda handler: of_unknown_length(handler, 2_000_000)
    assert fetch(lists.url("/2.crl")) == bytes(2_000_000)


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        pytest.param(status(301, ("Location", "/good")), "HTTP status 301", id="moved"),
        pytest.param(status(302, ("Location", "/good")), "HTTP status 302", id="redirect"),
        pytest.param(status(307, ("Location", "file:///etc/passwd")), "HTTP status 307", id="redirect to a file"),
        pytest.param(status(204), "HTTP status 204", id="no content"),
        pytest.param(status(404), "HTTP status 404", id="404"),
        pytest.param(status(500), "HTTP status 500", id="500"),
        pytest.param(lambda handler: send(handler, b"", length=71_000_000), "larger than 70 MB", id="says 71 MB"),
        pytest.param(lambda handler: of_unknown_length(handler, 71_000_000), "larger than 70 MB", id="71 MB"),
        pytest.param(cut_off, "truncated", id="cut off"),
        pytest.param(cut_chunk, r"cannot be fetched \(IncompleteRead", id="cut off in a chunk"),
        pytest.param(without_http, "cannot be fetched", id="no HTTP"),
    ],
)
def test_any_other_answer_is_refused_with_the_reason(
    lists: ListServer, answer: Callable[[Handler], None], reason: str
) -> None:
    lists.bodies |= {"/1.crl": answer, "/good": b"good"}
    with pytest.raises(ListRefusedError, match=reason):
        fetch(lists.url("/1.crl"))
    assert lists.requests == ["/1.crl"]


@pytest.mark.parametrize(
    "sent",
    [
        pytest.param(b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n" + bytes(1000), id="in the body"),
        pytest.param(b"HTTP/1.1 200 OK\r\nX: " + b"x" * 1000, id="in the headers"),
    ],
)
def test_a_server_that_sends_byte_by_byte_is_given_up_after_the_limit(
    lists: ListServer, monkeypatch: pytest.MonkeyPatch, sent: bytes
) -> None:
    monkeypatch.setattr(download, "TIME_LIMIT", 0.5)
    lists.bodies["/1.crl"] = lambda handler: slowly(handler, sent)
    with pytest.raises(ListRefusedError, match=r"did not arrive within 0\.5 s"):
        fetch(lists.url("/1.crl"))


def test_a_server_that_says_nothing_is_given_up_after_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download, "TIME_LIMIT", 0.2)
    with (
        socket.create_server(("127.0.0.1", 0)) as silent,
        pytest.raises(ListRefusedError, match=r"did not arrive within 0\.2 s"),
    ):
        fetch(f"http://127.0.0.1:{silent.getsockname()[1]}/1.crl")


def test_a_resolver_that_does_not_answer_is_given_up_after_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download, "TIME_LIMIT", 0.2)
    answered = threading.Event()
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: answered.wait(HANG))
    try:
        with pytest.raises(ListRefusedError, match=r"did not arrive within 0\.2 s"):
            fetch("http://crl.example.com/1.crl")
    finally:
        answered.set()


def test_the_limit_is_five_seconds() -> None:
    assert (download.TIME_LIMIT, download.MAX_SIZE) == (5.0, 70_000_000)


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        pytest.param("http://no-such-host.invalid/1.crl", "cannot be fetched", id="an unknown name"),
        pytest.param("file:///etc/passwd", "cannot be fetched", id="a file"),
        pytest.param("ftp://127.0.0.1/1.crl", "cannot be fetched", id="FTP"),
        pytest.param("data:,x", "cannot be fetched", id="data"),
    ],
)
def test_what_is_not_http_is_refused(url: str, reason: str) -> None:
    with pytest.raises(ListRefusedError, match=reason):
        fetch(url)


def test_a_port_without_a_listener_is_refused() -> None:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        with pytest.raises(ListRefusedError, match=r"cannot be fetched \(Connection refused"):
            fetch(f"http://127.0.0.1:{held.getsockname()[1]}/1.crl")


def test_the_next_address_is_tried(lists: ListServer, monkeypatch: pytest.MonkeyPatch) -> None:
    lists.bodies["/1.crl"] = b"good"
    genuine, stream = socket.getaddrinfo, socket.SOCK_STREAM
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        refusing = (socket.AF_INET, stream, 6, "", held.getsockname())
        monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **options: [refusing, *genuine(*args, **options)])
        assert fetch(lists.url("/1.crl")) == b"good"


def test_a_proxy_of_the_environment_is_used_unless_no_proxy_names_the_host(
    lists: ListServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = "http://crl.example.com/1.crl"
    lists.bodies |= {url: b"by the proxy", "/1.crl": b"direct"}
    monkeypatch.setenv("http_proxy", lists.url(""))
    assert fetch(url) == b"by the proxy"
    assert lists.requests == [url]
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    assert fetch(lists.url("/1.crl")) == b"direct"


def test_the_request_says_who_asks_and_nothing_else(lists: ListServer) -> None:
    seen: dict[str, str] = {}

    def record(handler: Handler) -> None:
        seen.update(handler.headers.items())
        send(handler, b"good")

    lists.bodies["/1.crl"] = record
    fetch(lists.url("/1.crl"))
    of_tracers = {"baggage", "sentry-trace"}  # where another test has installed one
    sent = {name.lower() for name in seen} - of_tracers
    assert sent == {"host", "user-agent", "accept", "accept-encoding", "connection"}
    assert (seen["User-Agent"], seen["Accept-Encoding"]) == ("neon-async", "identity")


def test_no_thread_and_no_socket_is_left(lists: ListServer) -> None:
    lists.bodies["/1.crl"] = b"good"
    before = threading.active_count()
    fetch(lists.url("/1.crl"))
    with pytest.raises(ListRefusedError):
        fetch(lists.url("/2.crl"))
    # Two of the server, which end when they notice, and the one that looks names up, which is kept for a moment.
    assert threading.active_count() <= before + 3
