"""What asyncpg, OpenSSL, the system and the server raise while connecting is raised as an error of neon-async."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import socket
import ssl
import struct
from collections.abc import Callable
from typing import Any

import asyncpg
import pytest
from support.forged_tls import receive_record
from support.handshakes import ROOT
from support.logins import BOTH, OK, READY, SESSION_START, honest_login, sasl
from support.probes import assert_secret_free
from support.verified_servers import BINDING, CERTIFICATE, PASSWORD, connect_to, error_from, final, verified_server

from neon_async import (
    AuthenticationError,
    CertificateError,
    ChannelBindingError,
    ComputeUnavailableError,
    ConnectError,
    ConnectTimeoutError,
    DatabaseNotFoundError,
    EndpointDisabledError,
    EndpointError,
    EndpointNotFoundError,
    InvalidPasswordError,
    IPNotAllowedError,
    NeonAsyncError,
    ProtocolError,
    QuotaExceededError,
    TLSError,
    TooManyConnectionsError,
)
from neon_async._driver.connector import prepare
from neon_async._driver.failures import Attempt, public_error
from neon_async.testing._impostor import (
    Conversation,
    Impostor,
    Script,
    error_response,
    message,
    play,
    server_context,
)

pytestmark = pytest.mark.anyio

HOST = "db.example.com"
STEPS = ("password", "start", "dns", "tcp", "tls", "authentication")


def attempt(step: str, *, expired: bool = False, **keywords: Any) -> Attempt:
    connector = prepare(f"postgresql://alex:{PASSWORD}@{HOST}/neondb", trust_anchor=ROOT.pem, **keywords)
    return Attempt(connector.parameters, connector.anchor, step, expired)


def record(kind: int, content: bytes) -> bytes:
    """Return a record of TLS 1.3 in plaintext (RFC 8446, section 5.1)."""
    return struct.pack("!BHH", kind, 0x0303, len(content)) + content


def openssl_error(reason: str) -> ssl.SSLError:
    error = ssl.SSLError(1, f"[SSL: {reason}] {reason.lower().replace('_', ' ')} (_ssl.c:1000)")
    error.reason = reason
    return error


def os_error(number: int) -> OSError:
    return OSError(number, os.strerror(number))


# (what is raised, in which step, the class of the public error, a part of its message)
LOCAL: list[Any] = [
    pytest.param(error, step, kind, text, id=f"{type(error).__name__} in {step}: {text[:40]}")
    for error, step, kind, text in (
        (socket.gaierror(-2, "Name or service not known"), "dns", ConnectError, "The name db.example.com cannot be"),
        (os_error(errno.ECONNRESET), "tls", ConnectError, "closed the connection during the TLS handshake"),
        (os_error(errno.EPIPE), "authentication", ConnectError, "closed the connection during authentication"),
        (os_error(errno.EMFILE), "tcp", ConnectError, "failed during the TCP connect (Too many open files)"),
        (os_error(errno.ETIMEDOUT), "tls", ConnectError, "failed during the TLS handshake (Connection timed out)"),
        (OSError("no strerror"), "tls", ConnectError, "failed during the TLS handshake (OSError)"),
        (asyncpg.ConnectionDoesNotExistError("lost"), "authentication", ConnectError, "during authentication"),
        (openssl_error("WRONG_VERSION_NUMBER"), "tls", TLSError, "something other than TLS"),
        (openssl_error("TLSV1_ALERT_PROTOCOL_VERSION"), "tls", TLSError, "does not support TLS 1.3"),
        (openssl_error("TLSV1_ALERT_NO_APPLICATION_PROTOCOL"), "tls", TLSError, "protocol name postgresql"),
        (openssl_error("SSLV3_ALERT_HANDSHAKE_FAILURE"), "tls", TLSError, "OPENSSL_CONF"),
        (openssl_error("NO_SUITABLE_SIGNATURE_ALGORITHM"), "tls", TLSError, "in common"),
        (openssl_error("TLSV1_UNRECOGNIZED_NAME"), "tls", TLSError, "does not know this host name"),
        (openssl_error("TLSV1_ALERT_UNKNOWN_CA"), "authentication", TLSError, "does not accept the client certificate"),
        (openssl_error("SSLV3_ALERT_CERTIFICATE_EXPIRED"), "authentication", TLSError, "Renew sslcert"),
        (openssl_error("SSLV3_ALERT_CERTIFICATE_REVOKED"), "authentication", TLSError, "Renew sslcert"),
        (openssl_error("TLSV13_ALERT_CERTIFICATE_REQUIRED"), "authentication", TLSError, "Set sslcert and sslkey"),
        (openssl_error("SOMETHING_NEW"), "tls", TLSError, "SOMETHING_NEW. Check the server"),
        (ssl.SSLError("no reason"), "tls", TLSError, "the connection was closed"),
        (ssl.SSLCertVerificationError(1, "no"), "tls", CertificateError, "The certificate of db.example.com was"),
        (LookupError("unknown encoding: NOSUCH"), "authentication", ProtocolError, "settings that asyncpg cannot read"),
        (AttributeError("server_version"), "authentication", ProtocolError, "cannot read (server_version)"),
        (ValueError("handshake not done yet"), "tls", TLSError, "something other than TLS"),
        (ValueError("a defect"), "tcp", ConnectError, "failed during the TCP connect (ValueError). Try again."),
        (RuntimeError("a defect"), "tls", ConnectError, "failed during the TLS handshake (RuntimeError)"),
        (RuntimeError("a defect"), "authentication", ConnectError, "failed during authentication (RuntimeError)"),
        (UnicodeError("label too long"), "dns", ConnectError, "failed during name resolution (UnicodeError)"),
        (EOFError(), "start", ConnectError, "failed during the start (EOFError)"),
        (asyncpg.InterfaceError("asyncpg's own"), "authentication", ConnectError, "authentication (InterfaceError)"),
    )
]


@pytest.mark.parametrize(("error", "step", "kind", "text"), LOCAL)
def test_an_error_of_the_system_or_of_a_library_is_raised_as_one_of_ours(
    error: Exception, step: str, kind: type[Exception], text: str
) -> None:
    public = public_error(error, attempt(step))
    assert type(public) is kind
    assert text in str(public)
    assert HOST in str(public)


@pytest.mark.parametrize("step", STEPS)
def test_an_expired_deadline_is_a_timeout_that_names_the_step(step: str) -> None:
    texts = {str(public_error(TimeoutError(), attempt(one, expired=True, connect_timeout=1.5))) for one in STEPS}
    public = public_error(TimeoutError(), attempt(step, expired=True, connect_timeout=1.5))
    assert type(public) is ConnectTimeoutError
    assert str(public).startswith(f"{HOST} was not ready within connect_timeout=1.5 s: ")
    assert len(texts) == len(STEPS)


@pytest.mark.parametrize(
    ("error", "step"),
    [
        pytest.param(ConnectError("ours"), "tls", id="one of ours"),
        pytest.param(OSError("the vault is sealed"), "password", id="raised by the password function"),
        pytest.param(asyncpg.UndefinedTableError("no secrets"), "password", id="asyncpg's, in a password function"),
    ],
)
def test_every_other_error_is_raised_unchanged(error: Exception, step: str) -> None:
    assert public_error(error, attempt(step)) is error


def test_the_text_of_an_unforeseen_error_stays_in_its_cause() -> None:
    """It may contain anything."""
    assert PASSWORD not in str(public_error(RuntimeError(f"what to do with {PASSWORD}"), attempt("authentication")))


def test_a_numeric_address_that_cannot_be_used_is_named_in_the_error() -> None:
    error = socket.gaierror(-9, "Address family for hostname not supported")
    public = public_error(error, attempt("tcp", hostaddr="::1"))
    assert str(public).startswith("::1 cannot be resolved (Address family")


# ---------------------------------------------------------------------------------------------------------------------
# Errors of the server

# Neon's proxy uses one SQLSTATE for everything; the others are PostgreSQL's.
TEXTS: tuple[tuple[str, str, type[Exception]], ...] = (
    ("XX000", "password authentication failed for user 'alex'", InvalidPasswordError),
    ("XX000", "The requested endpoint could not be found, or you don't have access to it.", EndpointNotFoundError),
    ("XX000", "The endpoint is disabled. Enable it using Neon API and retry.", EndpointDisabledError),
    ("XX000", "This IP address 192.0.2.1 is not allowed to connect to this endpoint.", IPNotAllowedError),
    ("XX000", "Your account or project has exceeded the compute time quota.", QuotaExceededError),
    ("XX000", "Couldn't connect to compute node", ComputeUnavailableError),
    ("XX000", "Too many connections attempts, please try again later", TooManyConnectionsError),
    ("XX000", 'database "nowhere" does not exist', DatabaseNotFoundError),
    ("XX000", "SCRAM-PLUS not used", ChannelBindingError),  # proxy/src/scram/exchange.rs, for gs2 flag y
    ("XX000", "insecure connection: secure channel data mismatch", ChannelBindingError),  # there, too
    ("XX000", "something unknown", ComputeUnavailableError),
    ("28P01", 'password authentication failed for user "alex"', InvalidPasswordError),
    ("28000", "SCRAM channel binding check failed", ChannelBindingError),
    ("28000", "SCRAM channel binding negotiation error", ChannelBindingError),
    ("28000", 'role "alex" is not permitted to log in', AuthenticationError),
    ("3D000", 'database "neondb" does not exist', DatabaseNotFoundError),
    ("53300", "sorry, too many clients already", TooManyConnectionsError),
    ("57P03", "the database system is starting up", ComputeUnavailableError),
    ("08P01", "query_wait_timeout", ComputeUnavailableError),  # PgBouncer
    ("08P01", "server login has been failing, try again later (server_login_retry)", ComputeUnavailableError),
    ("08P01", "server conn crashed?", ComputeUnavailableError),  # PgBouncer
    ("53100", "could not extend file: No space left on device", ComputeUnavailableError),
    ("57014", "canceling statement due to statement timeout", ComputeUnavailableError),
    ("58030", "could not read file: Input/output error", ComputeUnavailableError),
    ("55000", 'database "neondb" is not currently accepting connections', ComputeUnavailableError),
    ("22023", 'invalid value for parameter "work_mem": "x"', EndpointError),
    ("42704", 'unrecognized configuration parameter "nosuch"', EndpointError),
    ("P0001", "logins are not allowed on Sundays", EndpointError),  # a login trigger
    ("08P01", "malformed SCRAM message", ComputeUnavailableError),
    ("08P01", "no more connections allowed (max_client_conn)", TooManyConnectionsError),  # PgBouncer
    ("42501", 'permission denied for database "neondb"', AuthenticationError),
)
POINTS: dict[str, Callable[[bytes], bytes | Script]] = {
    "in-place-of-the-final": lambda error: final(lambda _: error),
    "in-place-of-the-offer": lambda error: error,
    "after-the-offer": lambda error: play(sasl(*BOTH), Conversation.read_message, error),
    "in-place-of-ok": lambda error: final(lambda data: data + error),
    "after-ok": lambda error: final(lambda data: data + OK + error),
}


@pytest.mark.parametrize(
    ("point", "code", "text", "kind"),
    [pytest.param("in-place-of-the-final", *case, id=f"{case[0]} {case[1][:40]}") for case in TEXTS]
    + [
        pytest.param(point, *case, id=f"{point} {case[0]} {case[1][:40]}")
        for point in list(POINTS)[1:]
        for case in (TEXTS[0], TEXTS[2], *TEXTS[-3:])
    ],
)
async def test_an_error_of_the_server_during_the_login_is_raised_as_its_class(
    point: str, code: str, text: str, kind: type[Exception]
) -> None:
    async with verified_server(POINTS[point](error_response(text, code=code))) as server:
        error = await error_from(server)
        assert type(error) is kind, error
        assert isinstance(error, asyncpg.PostgresError)
        assert isinstance(error, NeonAsyncError)
        assert error.sqlstate == code
        assert str(error).startswith(f"{server.host}: ")
        assert text.rstrip(".") in str(error)
        assert_secret_free(error, PASSWORD)


@pytest.mark.parametrize("body", [b"", b"\0", b"M\0\0", b"C28P01\0\0", b"\xff\xfe\0", b"Mhalf"], ids=repr)
async def test_an_error_without_fields_is_still_an_error_of_the_server(body: bytes) -> None:
    async with verified_server(message(b"E", body)) as server:
        error = await error_from(server)
        assert isinstance(error, asyncpg.PostgresError)
        assert isinstance(error, NeonAsyncError)
        assert str(error).startswith(f"{server.host}: ")


async def test_an_error_after_the_login_is_raised_as_its_class() -> None:
    refusal = error_response('database "nope" does not exist')
    script = honest_login(PASSWORD, binding=BINDING, last=OK + refusal)
    async with verified_server(script) as server:
        with pytest.raises(DatabaseNotFoundError, match="nope"):
            await connect_to(server)


@pytest.mark.parametrize(
    "body",
    [
        pytest.param(message(b"S", b"client_encoding\0NOSUCH\0"), id="an unknown encoding"),
        pytest.param(message(b"S", b"TimeZone\0\xff\0"), id="a setting that is not UTF-8"),
    ],
)
async def test_settings_that_asyncpg_cannot_read_are_a_protocol_error(body: bytes) -> None:
    script = honest_login(PASSWORD, binding=BINDING, last=OK + body + SESSION_START)
    async with verified_server(script) as server:
        with pytest.raises(ProtocolError, match="settings that asyncpg cannot read"):
            await connect_to(server)


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param(b"", id="no settings"),
        pytest.param(message(b"S", b"application_name\0x\0"), id="no version"),
        pytest.param(message(b"S", b"server_version\0newest\0"), id="a version that is no number"),
    ],
)
async def test_a_session_without_a_usable_server_version_is_a_protocol_error(settings: bytes) -> None:
    script = honest_login(PASSWORD, binding=BINDING, last=OK + settings + READY)
    async with verified_server(script) as server:
        with pytest.raises(ProtocolError, match="settings that asyncpg cannot read"):
            await connect_to(server)


@pytest.mark.parametrize(
    "junk",
    [
        pytest.param(record(23, secrets.token_bytes(32)), id="a record that no key opens"),
        pytest.param(record(22, secrets.token_bytes(32)), id="a handshake in plaintext"),
        pytest.param(record(21, b"\x02\x50"), id="an alert in plaintext"),
        pytest.param(record(20, b"\x01") * 40, id="too many ChangeCipherSpec"),
        pytest.param(b"\xee" * 50, id="no record"),
        pytest.param(b"\x17\x03\x03\xff\xff" + bytes(100), id="a record that is too long"),
    ],
)
@pytest.mark.parametrize("negotiation", ["direct", "postgres"])
async def test_junk_behind_the_flight_of_the_server_is_a_tls_error(junk: bytes, negotiation: str) -> None:
    """OpenSSL has finished the handshake then, and asyncio reports it as such."""

    def script(conversation: Conversation) -> None:
        conversation.consent_to_tls()
        incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        tls = server_context(CERTIFICATE.chain).wrap_bio(incoming, outgoing, server_side=True)
        incoming.write(receive_record(conversation))
        with contextlib.suppress(ssl.SSLWantReadError):
            tls.do_handshake()
        conversation.send(outgoing.read() + junk)

    async with Impostor(script, trust_anchor=CERTIFICATE.anchor) as server:
        with pytest.raises(TLSError, match="The TLS handshake with"):
            await connect_to(server, sslnegotiation=negotiation)
