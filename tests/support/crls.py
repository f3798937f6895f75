"""A CA that publishes its revocation lists in shards on a real HTTP server, and all that can be wrong with a list."""

from __future__ import annotations

import contextlib
import datetime
import http.server
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding

from neon_async.testing._impostor import SERVER_NAME
from support.certificates import DAY, NOW, Entity, Key, element, elements, issue
from support.probes import HANG

__all__ = ("ListServer", "RevocablePKI", "crl", "list_server", "long_crl", "point", "revocable_pki")

# What a server does instead of sending a body with status 200.
Answer = Callable[[http.server.BaseHTTPRequestHandler], None]


class ListServer:
    """An HTTP server on 127.0.0.1. What it does for a path can change at any time.

    Attributes:
        bodies: The body, or what to do instead, by path. 404 for any other path.
        requests: The path of each request so far.
    """

    def __init__(self, port: int) -> None:
        self.port = port
        self.bodies: dict[str, bytes | Answer] = {}
        self.requests: list[str] = []

    def url(self, path: str) -> str:
        return f"http://127.0.0.1:{self.port}{path}"

    def hold(self, path: str) -> threading.Event:
        """Send the body of `path` only when the event that is returned has been set."""
        body, release = self.bodies[path], threading.Event()
        assert isinstance(body, bytes)

        def answer(handler: http.server.BaseHTTPRequestHandler) -> None:
            release.wait(HANG)
            send(handler, body)

        self.bodies[path] = answer
        return release


@contextlib.contextmanager
def list_server() -> Iterator[ListServer]:
    """Run a `ListServer`."""

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            lists.requests.append(self.path)
            body = lists.bodies.get(self.path)
            with contextlib.suppress(ConnectionError):
                if callable(body):
                    body(self)
                elif body is None:
                    self.send_error(404)
                else:
                    send(self, body)

        def log_message(self, *_: Any) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        lists = ListServer(server.server_port)
        thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        try:
            yield lists
        finally:
            server.shutdown()
            thread.join()


def send(handler: http.server.BaseHTTPRequestHandler, body: bytes, *, length: int | None = None) -> None:
    """Answer with status 200 and `body`; `length` is what the header says instead of its length."""
    handler.send_response(200)
    handler.send_header("Content-Length", str(len(body) if length is None else length))
    handler.end_headers()
    handler.wfile.write(body)


def point(*urls: str) -> x509.CRLDistributionPoints:
    """Return the extension of a certificate that names `urls`, each on its own."""
    names = [[x509.UniformResourceIdentifier(url)] for url in urls]
    return x509.CRLDistributionPoints([x509.DistributionPoint(name, None, None, None) for name in names])


def scope(url: str | None = None, **only: Any) -> x509.IssuingDistributionPoint:
    """Return the extension of a list that names `url` and says what it covers."""
    return x509.IssuingDistributionPoint(
        full_name=None if url is None else [x509.UniformResourceIdentifier(url)],
        relative_name=None,
        only_contains_user_certs=only.get("users", False),
        only_contains_ca_certs=only.get("cas", False),
        only_some_reasons=only.get("reasons"),
        indirect_crl=only.get("indirect", False),
        only_contains_attribute_certs=only.get("attributes", False),
    )


def crl(
    issuer: Entity,
    *revoked: Entity | int,
    number: int | None = 1,
    last_update: datetime.datetime = NOW - DAY,
    next_update: datetime.datetime = NOW + 9 * DAY,
    key: Key | None = None,
    digest: Any = None,
    also: Sequence[tuple[x509.ExtensionType, bool]] = (),
    reason: x509.ReasonFlags | None = x509.ReasonFlags.key_compromise,
    entry: Sequence[tuple[x509.ExtensionType, bool]] = (),
) -> bytes:
    """Return `issuer`'s list of the `revoked` certificates or serial numbers in DER, signed with `key`.

    `also` are extensions of the list, `reason` and `entry` those of each entry.
    """
    builder = x509.CertificateRevocationListBuilder(
        issuer_name=issuer.certificate.subject, last_update=last_update, next_update=next_update
    )
    if number is not None:
        builder = builder.add_extension(x509.CRLNumber(number), False)
    for extension, critical in also:
        builder = builder.add_extension(extension, critical)
    for one in revoked:
        serial = one if isinstance(one, int) else one.certificate.serial_number
        made = x509.RevokedCertificateBuilder(serial_number=serial, revocation_date=NOW - DAY)
        if reason is not None:
            made = made.add_extension(x509.CRLReason(reason), False)
        for extension, critical in entry:
            made = made.add_extension(extension, critical)
        builder = builder.add_revoked_certificate(made.build())
    return builder.sign(key or issuer.key, digest or hashes.SHA256()).public_bytes(Encoding.DER)


def long_crl(issuer: Entity, serials: Sequence[int], **options: Any) -> bytes:
    """Return a list as `crl()` does, quickly: cryptography takes a minute for 100,000 entries.

    The serial numbers have the same number of bytes, so that one entry is the model of all.
    """
    assert isinstance(issuer.key, ec.EllipticCurvePrivateKey)
    body, algorithm, _ = elements(crl(issuer, serials[0], **options))
    fields = elements(body)
    (place,) = [number for number, field in enumerate(fields) if elements_of_entries(field)]
    (entry,) = elements(fields[place])
    first = serials[0].to_bytes(serials[0].bit_length() // 8 + 1)
    before, after = entry.split(first)
    size = len(first)
    fields[place] = element(0x30, b"".join(before + serial.to_bytes(size) + after for serial in serials))
    signed = element(0x30, b"".join(fields))
    signature = issuer.key.sign(signed, ec.ECDSA(hashes.SHA256()))
    return element(0x30, signed + algorithm + element(0x03, b"\0" + signature))


def elements_of_entries(field: bytes) -> bool:
    """Return whether a field of a list is the sequence of its entries: sequences that begin with a number."""
    inner = elements(field) if field[0] == 0x30 else []
    return bool(inner) and inner[0][0] == 0x30 and elements(inner[0])[0][0] == 0x02


class RevocablePKI:
    """A root, an intermediate CA with a list of the root, and leaves on shards of the intermediate's lists.

    Attributes:
        lists: The server of the lists.
        root: The root.
        issuer: The intermediate CA, which names `/root.crl`.
    """

    def __init__(self, lists: ListServer) -> None:
        self.lists = lists
        self.root = issue(subject="root", ca=True)
        self.issuer = issue(self.root, "issuer", ca=True, also=[(point(lists.url("/root.crl")), False)])
        self._numbers: dict[str, int] = {}
        self.publish_root()

    def leaf(self, shard: str | None = "/1.crl", **changes: Any) -> Entity:
        """Return a leaf for the name of `LocalPostgres` and for localhost, on `shard`, whose list is published."""
        also = [] if shard is None else [(point(self.lists.url(shard)), False)]
        names = [x509.DNSName(SERVER_NAME), x509.DNSName("localhost")]
        if shard is not None and shard not in self.lists.bodies:
            self.publish(shard)
        return issue(self.issuer, names=names, **{"also": also} | changes)

    def publish(self, shard: str, *revoked: Entity | int, **changes: Any) -> None:
        """Publish the next list of `shard`."""
        self._numbers[shard] = self._numbers.get(shard, 0) + 1
        named = scope(self.lists.url(shard), users=True)
        options: dict[str, Any] = {"number": self._numbers[shard], "also": [(named, True)]}
        self.lists.bodies[shard] = crl(self.issuer, *revoked, **options | changes)

    def publish_root(self, *revoked: Entity, **changes: Any) -> None:
        """Publish the next list of the root's. Let's Encrypt's lists of roots do not name their URL either."""
        self._numbers["/root.crl"] = self._numbers.get("/root.crl", 0) + 1
        options: dict[str, Any] = {"number": self._numbers["/root.crl"], "also": [(scope(cas=True), True)]}
        self.lists.bodies["/root.crl"] = crl(self.root, *revoked, **options | changes)


@contextlib.contextmanager
def revocable_pki() -> Iterator[RevocablePKI]:
    """Make a `RevocablePKI` and run the server of its lists."""
    with list_server() as lists:
        yield RevocablePKI(lists)
