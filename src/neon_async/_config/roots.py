"""The roots of Let's Encrypt that are known by their fingerprints. Data only."""

# No `from __future__ import annotations`: the classes take longer to define when their annotations are strings.

from datetime import UTC, datetime
from typing import Final, NamedTuple


class KnownRoot(NamedTuple):
    """A root certificate of Let's Encrypt (https://letsencrypt.org/certificates/).

    Attributes:
        name: The common name of its subject.
        sha256: The fingerprint of the self-signed certificate, in hexadecimal digits.
        key_identifier: The identifier of its key, in hexadecimal digits, by which certificates name their issuer.
        ends: When it stops being trusted.
        url: Where the certificate is published, in PEM.
    """

    name: str
    sha256: str
    key_identifier: str
    ends: datetime
    url: str


class KnownRoots(tuple[KnownRoot, ...]):
    """A set of known roots that `trust_anchor=` accepts."""

    __slots__ = ()

    __module__ = "neon_async"  # for the repr; the class itself is private

    def __repr__(self) -> str:
        return f"<KnownRoots {self}>"

    def __str__(self) -> str:
        return ", ".join(root.name for root in self)


ISRG_ROOT_X1: Final = KnownRoot(
    "ISRG Root X1",
    "96bcec06264976f37460779acf28c5a7cfe8a3c0aae11a8ffcee05c0bddf08c6",
    "79b459e67bb6e5e40173800888c81a58f6e99b6e",
    datetime(2030, 6, 4, tzinfo=UTC),  # root programs trust it until then; its notAfter is 2035-06-04
    "https://letsencrypt.org/certs/isrgrootx1.pem",
)
ISRG_ROOT_X1_SHA256: Final = ISRG_ROOT_X1.sha256
"""The SHA-256 fingerprint of ISRG Root X1, the root that is trusted by default, in hexadecimal digits."""

LETS_ENCRYPT_ROOTS: Final = KnownRoots(
    (
        ISRG_ROOT_X1,
        KnownRoot(
            "ISRG Root X2",
            "69729b8e15a86efc177a57afb7171dfc64add28c2fca8cf1507e34453ccb1470",
            "7c4296aede4b483bfa92f89e8ccf6d8ba9723795",
            datetime(2040, 9, 17, 16, 0, tzinfo=UTC),
            "https://letsencrypt.org/certs/isrg-root-x2.pem",
        ),
        KnownRoot(
            "Root YR",
            "e57b7e6f150c419102e8d5c055729ff967b9d1a829bf00cec89ca604ebf4a86f",
            "dee75b60d0226d40287d3f0d01fea4b552b45194",
            datetime(2045, 9, 2, 23, 59, 59, tzinfo=UTC),
            "https://letsencrypt.org/certs/gen-y/root-yr.pem",
        ),
        KnownRoot(
            "Root YE",
            "e14ffcad5b0025731006caa43a121a22d8e9700f4fb9cf852f02a708aa5d5666",
            "a3c8265a8ea14cd03563fc9b23c83aae56f34f56",
            datetime(2045, 9, 2, 23, 59, 59, tzinfo=UTC),
            "https://letsencrypt.org/certs/gen-y/root-ye.pem",
        ),
    )
)
"""For `trust_anchor=`: every root that Let's Encrypt may issue below: ISRG Root X1 and X2, Root YR and Root YE.

Neon needs ISRG Root X1 only: Let's Encrypt's default chains contain certificates of X1 for the other three
(cross-signs).
"""
