"""Fixtures of the tests of `_wire`."""

from __future__ import annotations

import os

import pytest
from cryptography.hazmat.primitives.serialization import BestAvailableEncryption, Encoding, PrivateFormat
from cryptography.x509 import ExtendedKeyUsage
from cryptography.x509.oid import ExtendedKeyUsageOID
from support.certificates import issue
from support.files import make_huge
from support.handshakes import OTHER_ROOT, PASSPHRASE, ROOT


@pytest.fixture(scope="module")
def client_files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The paths of a client certificate, its key, the encrypted key, both in one file, another key, and odd files."""
    purpose = ExtendedKeyUsage([ExtendedKeyUsageOID.CLIENT_AUTH]), False
    entity = issue(ROOT, "neon", names=[], also=[purpose])
    encrypted = entity.key.private_bytes(
        Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(PASSPHRASE.encode())
    )
    folder = tmp_path_factory.mktemp("client")
    files = {
        "cert": entity.pem,
        "key": entity.key_pem,
        "encrypted": encrypted,
        "both": entity.key_pem + entity.pem,
        "other": OTHER_ROOT.key_pem,
        "empty": b"",
    }
    for name, content in files.items():
        (folder / name).write_bytes(content)
    os.mkfifo(folder / "fifo")
    make_huge(folder / "huge")
    odd = {name: str(folder / name) for name in ("missing", "fifo", "huge")} | {"kmsg": "/proc/kmsg"}
    return {name: str(folder / name) for name in files} | odd
