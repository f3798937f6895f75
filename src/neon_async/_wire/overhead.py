"""Limit the bytes below TLS that a server may send before its session is ready.

OpenSSL processes records without data (KeyUpdate, NewSessionTicket) inside one read, however many there are, and uvloop
reads up to 8 MiB before it does anything else. A server that sends nothing else would stop the event loop for seconds.
This module must not know what the data is.
"""

from __future__ import annotations

import ssl
from typing import Any

from .._errors import TLSError
from .chain import RecordingSSLObject

# A certificate chain has up to 100 KiB (OpenSSL's SSL_MAX_CERT_LIST_DEFAULT), and each record has 22 bytes besides its
# data (RFC 8446, section 5.2).
_MAX_OVERHEAD = 128 << 10


class LimitingContext(ssl.SSLContext):
    """A context for `LimitedTLS`, which must be its `sslobject_class`."""

    def wrap_bio(self, incoming: ssl.MemoryBIO, *args: Any, **kwargs: Any) -> LimitedTLS:
        tls = super().wrap_bio(incoming, *args, **kwargs)
        assert isinstance(tls, LimitedTLS)
        tls.limit(incoming)
        tls.call_directly("write", "pending")
        return tls


class LimitedTLS(RecordingSSLObject):
    """A TLS session that counts what OpenSSL takes from the network besides data, until the limit is lifted."""

    _incoming: ssl.MemoryBIO | None = None
    _overhead = 0
    _sslobj: Any

    def limit(self, incoming: ssl.MemoryBIO) -> None:
        """Count what is taken from `incoming`."""
        self._incoming = incoming

    def lift_limit(self) -> None:
        """Count no more: the session is ready, and the server has proved who it is."""
        self._incoming = None
        self.call_directly("read")

    def call_directly(self, *methods: str) -> None:
        """Spare every statement the frames of Python in which SSLObject only calls these methods of `_ssl`."""
        for method in methods:
            setattr(self, method, getattr(self._sslobj, method))

    def do_handshake(self) -> None:
        incoming = self._incoming
        if incoming is None:
            super().do_handshake()
            return
        before = incoming.pending
        try:
            super().do_handshake()
        finally:
            self._count(before - incoming.pending, b"")

    def read(self, len: int = 1024, buffer: Any = None) -> bytes:  # noqa: A002  the name in ssl
        incoming = self._incoming
        if incoming is None:  # uvloop keeps this method from the beginning
            data: bytes = self._sslobj.read(len, buffer) if buffer is not None else self._sslobj.read(len)
            return data
        before, data = incoming.pending, b""
        try:
            data = super().read(len, buffer)
        finally:
            self._count(before - incoming.pending, data)
        return data

    def _count(self, taken: int, data: bytes) -> None:
        """Add the bytes that were taken, less the data in them.

        Raises:
            TLSError: It is too much.
        """
        self._overhead += taken - len(data)
        if self._overhead > _MAX_OVERHEAD:
            raise TLSError(
                f"{self.server_hostname} sent more than {_MAX_OVERHEAD} bytes of TLS records without data before the "
                "session was ready, as no PostgreSQL server does. Check the server."
            ) from None
