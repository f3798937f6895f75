"""Issue the certificates of `LocalPostgres`: one certificate authority and one server certificate, made by trustme.

This module must not know servers or files: names go in, PEM comes out.
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Certificates:
    """The certificates of one server, as PEM text.

    Attributes:
        trust_anchor: The certificate of the authority.
        chain: The certificate of the server.
        key: The private key of the server.
    """

    trust_anchor: str
    chain: str
    key: str = field(repr=False)


def issue_certificates(*names: str) -> Certificates:
    """Create a certificate authority and let it issue one server certificate.

    The keys are ECDSA on P-256 and the signatures use SHA-256, as on Neon, so that channel binding with
    `tls-server-end-point` (RFC 5929) is possible. The private key of the authority is not kept.

    Args:
        names: The DNS names of the server certificate.

    Raises:
        ImportError: trustme is not installed.
    """
    import trustme

    authority = trustme.CA()
    server = authority.issue_cert(*names)
    return Certificates(
        trust_anchor=authority.cert_pem.bytes().decode(),
        chain="".join(certificate.bytes().decode() for certificate in server.cert_chain_pems),
        key=server.private_key_pem.bytes().decode(),
    )
