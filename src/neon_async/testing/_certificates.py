"""The certificates of `LocalPostgres`: a certificate authority of its own and one server certificate, through trustme.

It must not know servers and files: names go in, PEM comes out.
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Certificates:
    """PEM texts: the authority's certificate, the server's certificate, and the server's private key."""

    trust_anchor: str
    chain: str
    key: str = field(repr=False)


def issue_certificates(*names: str) -> Certificates:
    """Make a certificate authority and let it issue one server certificate.

    The keys are ECDSA on P-256 and the signatures use SHA-256, as on Neon, so `tls-server-end-point` channel binding
    (RFC 5929) is possible. The authority's key is forgotten.

    Parameters:
        names: the DNS names the certificate is for.

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
