"""Whatever text a server sends, no error and no log line of ours carries it unescaped."""

from __future__ import annotations

import asyncio
import dataclasses
import datetime
import logging
import ssl
import struct
from collections.abc import Callable
from typing import Any

import asyncpg
import pytest
from cryptography import x509
from cryptography.x509.oid import NameOID
from support.certificates import issue, present, revocation_list
from support.impostors import chain
from support.logins import OK, READY, honest_login
from support.probes import HANG
from support.verified_servers import BINDING, PASSWORD, error_from, final, verified_server

import neon_async
from neon_async._driver.healing import _as_cached_statement_error, _stale_error
from neon_async._wire.chain import Chain, read_chain
from neon_async._wire.revocation import check
from neon_async._wire.revocation.lists import ListRefusedError, Source, read_list
from neon_async.testing._impostor import Impostor, authentication_request, login, message, server_context

pytestmark = pytest.mark.anyio

HOSTILE = "no\x1b[2J\r\nERROR forged line\u202e\u2028\u200b\x9b31m"
ESCAPED = r"no\x1b[2J\r\nERROR forged line\u202e\u2028\u200b\x9b31m"


def response(code: str, text: str = HOSTILE) -> bytes:
    fields = {"S": "FATAL", "V": "FATAL", "C": code, "M": text, "D": HOSTILE, "H": HOSTILE, "W": HOSTILE, "n": HOSTILE}
    return message(b"E", b"".join(f"{key}{value}\0".encode() for key, value in fields.items()) + b"\0")


def parameter(name: str, value: str) -> bytes:
    return message(b"S", f"{name}\0{value}\0".encode())


START = parameter("client_encoding", HOSTILE) + message(b"K", struct.pack("!ii", 4711, 42)) + READY


def accuse(_: bytes) -> bytes:
    """Return an error of the exchange in place of the server's proof; its text is the server's own (RFC 5802)."""
    return authentication_request(12, b"e=no\x1b[2J\nERROR forged line")


@pytest.mark.parametrize(
    "steps",
    [
        pytest.param([response("28000")], id="a known SQLSTATE"),
        pytest.param([response("XX000", f"{HOSTILE} endpoint is disabled")], id="a known text"),
        pytest.param([response("42704")], id="an unknown error"),
        pytest.param([response("3D000", f'database "{HOSTILE}" does not exist')], id="a quoted name"),
        pytest.param([honest_login(PASSWORD, binding=BINDING, last=OK + response("57P03"))], id="after the login"),
        pytest.param([honest_login(PASSWORD, binding=BINDING, last=OK + START)], id="a setting"),
        pytest.param([authentication_request(10, HOSTILE.encode() + b"\0\0")], id="a mechanism"),
        pytest.param([final(accuse)], id="an accusation within the exchange"),
        pytest.param([authentication_request(11, HOSTILE.encode())], id="a challenge out of turn"),
    ],
)
async def test_no_error_of_a_connect_carries_text_of_the_server_unescaped(steps: list[Any]) -> None:
    async with verified_server(*steps) as server:
        error = await error_from(server)
    for each in chain(error):
        attributes = [value for value in vars(each).values() if isinstance(value, str)]
        for text in (*str(each).split("\nDETAIL:  "), *attributes):  # asyncpg's own line breaks, between its fields
            assert text.replace("\nHINT:  ", "").isprintable(), text


def test_a_revocation_list_and_its_url_are_escaped(caplog: pytest.LogCaptureFixture) -> None:
    name = x509.Name([x509.NameAttribute(NameOID.ORGANIZATION_NAME, HOSTILE)])
    root, stranger = issue(subject="root", ca=True), issue(subject=name, ca=True)
    source = Source("http://example.com/1.crl", root.der, for_cas=False, must_name_url=False)
    der = ssl.PEM_cert_to_DER_cert(revocation_list(stranger).decode().replace("X509 CRL", "CERTIFICATE"))
    with pytest.raises(ListRefusedError, match="is of another issuer") as caught:
        read_list(der, source, datetime.datetime.now(datetime.UTC))
    assert str(caught.value).isprintable()
    url = x509.UniformResourceIdentifier("http://example.com/\x1b[2J\nERROR forged line")
    point = x509.DistributionPoint([url], None, None, None)
    leaf = issue(root, name, also=[(x509.CRLDistributionPoints([point]), False)])
    with caplog.at_level(logging.DEBUG, "neon_async"):
        [facts] = check.read((leaf.der, root.der))
    assert all(str(value).isprintable() for value in dataclasses.astuple(facts.unchecked))
    assert [record.getMessage().isprintable() for record in caplog.records] == [True]


async def test_the_text_of_the_server_stays_readable() -> None:
    async with verified_server(response("28000")) as server:
        error: Any = await error_from(server)
    assert f": {ESCAPED}. " in str(error)
    assert (error.detail, error.hint, error.sqlstate) == (ESCAPED, ESCAPED, "28000")


async def test_neither_the_log_nor_the_error_of_a_pool_carries_it_unescaped(caplog: pytest.LogCaptureFixture) -> None:
    async with verified_server(response("57P03")) as server:
        keywords: dict[str, Any] = {"trust_anchor": server.trust_anchor, "acquire_timeout": 0.3}
        with caplog.at_level(logging.DEBUG, "neon_async"):
            async with asyncio.timeout(HANG), neon_async.create_pool(server.dsn, **keywords) as pool:
                with pytest.raises(neon_async.PoolTimeoutError) as caught:
                    await pool.fetchval("SELECT 1")
    logged = [record.getMessage() for record in caplog.records if record.name == "neon_async"]
    assert any(ESCAPED in line for line in logged)
    assert all(line.isprintable() for line in logged)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("make", [_as_cached_statement_error, _stale_error])
def test_the_reason_why_a_statement_is_stale_is_escaped(make: Callable[[Exception], Exception]) -> None:
    """Where the server answers a statement, the error is asyncpg's, as it is; ours only quotes it."""
    answer = asyncpg.PostgresError.new({"C": "XX000", "M": f"cache lookup failed for type {HOSTILE}", "D": HOSTILE})
    assert f"cache lookup failed for type {ESCAPED}" in str(make(answer))
    assert str(make(answer)).isprintable()


async def test_names_in_certificates_are_escaped_in_reports() -> None:
    name = x509.Name([x509.NameAttribute(NameOID.ORGANIZATION_NAME, HOSTILE)])
    root = issue(subject=name, ca=True)
    presented = present(issue(root, name), anchor=root)
    steps = [honest_login(PASSWORD, binding=None, offer=("SCRAM-SHA-256",))]
    script = login(server_context(presented.chain), *steps)
    async with Impostor(script, trust_anchor=presented.anchor, password=PASSWORD) as server:
        connection = await neon_async.connect(server.dsn, trust_anchor=server.trust_anchor)
        report = neon_async.connection_tls_report(connection)
        connection.terminate()
    assert (report.subject, report.issuer) == (f"O={ESCAPED}", f"O={ESCAPED}")
    assert all(str(value).isprintable() for value in dataclasses.astuple(report))
    facts = read_chain(Chain((root.der,), (root.der,)))
    assert facts.served[0].subject == f"O={ESCAPED}"
    with pytest.raises(neon_async.NeonAsyncError) as caught:
        neon_async.create_pool(server.dsn, trust_anchor=f"/nonexistent/{HOSTILE}")
    assert str(caught.value).isprintable()
