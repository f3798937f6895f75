"""TLS handshakes in memory, for tests of the client's context."""

from __future__ import annotations

import contextlib
import ssl
from typing import Any

from neon_async.testing._impostor import SERVER_NAME, server_context
from support.certificates import Entity, issue, present

__all__ = ("LEAF", "OTHER_ROOT", "PASSPHRASE", "ROOT", "assert_policy", "handshake", "serve")

ROOT = issue(subject="root", ca=True)
OTHER_ROOT = issue(subject="other root", ca=True)
LEAF = issue(ROOT)
PASSPHRASE = "open sesame"  # of encrypted keys
# RFC 8446, appendix B.4, without the suite with a tag of 64 bits.
FULL_TAG_SUITES = {
    "TLS_AES_256_GCM_SHA384",
    "TLS_CHACHA20_POLY1305_SHA256",
    "TLS_AES_128_GCM_SHA256",
    "TLS_AES_128_CCM_SHA256",
}


def handshake(
    client: ssl.SSLContext, server: ssl.SSLContext, name: str = SERVER_NAME
) -> tuple[ssl.SSLObject, ssl.SSLObject]:
    """Do a handshake in memory, and return the client's and the server's end. Raises the client's error."""
    to_client, to_server = ssl.MemoryBIO(), ssl.MemoryBIO()
    ours = client.wrap_bio(to_client, to_server, server_hostname=name)
    theirs = server.wrap_bio(to_server, to_client, server_side=True)
    for _ in range(4):
        for end in (ours, theirs):
            with contextlib.suppress(ssl.SSLWantReadError):
                end.do_handshake()
    return ours, theirs


def serve(leaf: Entity = LEAF, *issuers: Entity, **options: Any) -> ssl.SSLContext:
    """Return a server's context that presents `leaf` and `issuers`."""
    return server_context(present(leaf, *issuers).chain, **options)


def assert_policy(context: ssl.SSLContext, *anchors: bytes, crl: bool = False) -> None:
    """Check that `context` has the whole TLS policy of neon-async, with `anchors` (DER) as its only roots."""
    assert context.protocol is ssl.PROTOCOL_TLS_CLIENT
    assert context.minimum_version is ssl.TLSVersion.TLSv1_3
    assert context.maximum_version in (ssl.TLSVersion.TLSv1_3, ssl.TLSVersion.MAXIMUM_SUPPORTED)
    assert context.verify_mode is ssl.CERT_REQUIRED
    assert context.check_hostname is True
    assert context.hostname_checks_common_name is False
    assert context.verify_flags & ssl.VERIFY_X509_STRICT
    assert not context.verify_flags & ssl.VERIFY_X509_PARTIAL_CHAIN
    assert not context.verify_flags & ssl.VERIFY_ALLOW_PROXY_CERTS
    assert bool(context.verify_flags & ssl.VERIFY_CRL_CHECK_LEAF) is crl
    assert context.security_level >= 2
    assert sorted(context.get_ca_certs(binary_form=True)) == sorted(anchors)
    assert context.cert_store_stats() == {"x509": len(anchors), "x509_ca": len(anchors), "crl": int(crl)}
    assert context.keylog_filename is None
    assert {one["name"] for one in context.get_ciphers() if one["protocol"] == "TLSv1.3"} <= FULL_TAG_SUITES
