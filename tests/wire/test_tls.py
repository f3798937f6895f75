"""The TLS context has the whole policy of neon-async, whatever the parameters, and finished handshakes are checked."""

from __future__ import annotations

import os
import ssl
from collections.abc import Callable
from pathlib import Path
from typing import Any

import certifi
import pytest
from cryptography.x509 import DNSName
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.certificates import DAY, NOW, issue, revocation_list, write_crl
from support.handshakes import LEAF, OTHER_ROOT, PASSPHRASE, ROOT, assert_policy, handshake, serve
from support.probes import assert_secret_free

import neon_async
from neon_async._driver.connector import prepare
from neon_async._wire.dial import context_for
from neon_async._wire.tls import ALPN, build_context, check_handshake, openssl_reason
from neon_async._wire.trust import find_isrg_root_x1, load_trust_anchor
from neon_async.testing._impostor import SERVER_NAME

DSN = "postgresql://alex:s3cret@db.example.com/neondb"


def trust_everyone(context: ssl.SSLContext) -> None:
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE


def test_the_context_trusts_x1_alone_although_certifi_contains_over_a_hundred_roots() -> None:
    everything = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    everything.load_verify_locations(certifi.where())
    assert len(everything.get_ca_certs()) > 100
    assert_policy(neon_async.create_ssl_context(), find_isrg_root_x1().der)


def test_a_trust_anchor_replaces_x1() -> None:
    assert_policy(neon_async.create_ssl_context(trust_anchor=ROOT.pem), ROOT.der)


def test_every_call_returns_a_new_context() -> None:
    first, second = neon_async.create_ssl_context(), neon_async.create_ssl_context()
    assert first is not second
    first.check_hostname = False
    first.verify_mode = ssl.CERT_NONE
    first.load_verify_locations(cadata=OTHER_ROOT.der)
    for context in (second, neon_async.create_ssl_context()):
        assert_policy(context, find_isrg_root_x1().der)


def test_the_context_accepts_a_server_with_a_good_certificate() -> None:
    ours, _ = handshake(neon_async.create_ssl_context(trust_anchor=ROOT.pem), serve())
    assert ours.version() == "TLSv1.3"
    assert ours.selected_alpn_protocol() == ALPN == "postgresql"


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        pytest.param(lambda: serve(issue(OTHER_ROOT), OTHER_ROOT), "certificate verify failed", id="another root"),
        pytest.param(lambda: serve(issue(ROOT, names=[DNSName("db.example.com")])), "not valid for", id="another name"),
        pytest.param(lambda: serve(issue(ROOT, SERVER_NAME, names=[])), "not valid for", id="common name only"),
        pytest.param(lambda: serve(issue(ROOT, not_after=NOW - DAY / 2)), "expired", id="expired"),
        pytest.param(
            lambda: serve(maximum_version=ssl.TLSVersion.TLSv1_2), "(?i)unsupported.protocol|version", id="TLS 1.2"
        ),
    ],
)
def test_the_context_refuses_every_other_server(make: Callable[[], ssl.SSLContext], reason: str) -> None:
    with pytest.raises(ssl.SSLError, match=reason):
        handshake(neon_async.create_ssl_context(trust_anchor=ROOT.pem), make())


@pytest.mark.parametrize(
    ("weaken", "difference"),
    [
        pytest.param(
            lambda context: setattr(context, "check_hostname", False), "check_hostname is off", id="no host name"
        ),
        pytest.param(
            lambda context: setattr(context, "hostname_checks_common_name", True),
            "hostname_checks_common_name is on",
            id="common name",
        ),
        pytest.param(trust_everyone, "verify_mode is not CERT_REQUIRED; check_hostname is off", id="no verification"),
        pytest.param(
            lambda context: setattr(context, "minimum_version", ssl.TLSVersion.TLSv1_2),
            "minimum_version is below TLS 1.3",
            id="TLS 1.2",
        ),
        pytest.param(
            lambda context: setattr(context, "verify_flags", ssl.VERIFY_DEFAULT),
            "VERIFY_X509_STRICT is off",
            id="not strict",
        ),
        pytest.param(
            lambda context: setattr(context, "verify_flags", context.verify_flags | ssl.VERIFY_X509_PARTIAL_CHAIN),
            "VERIFY_X509_PARTIAL_CHAIN is on",
            id="partial chains",
        ),
        pytest.param(
            lambda context: context.set_ciphers("ALL:@SECLEVEL=0"),
            "the security level is 0, below 2",
            id="security level 0",
        ),
        pytest.param(
            lambda context: context.load_verify_locations(cadata=OTHER_ROOT.der),
            "2 root certificates are trusted",
            id="another anchor",
        ),
        pytest.param(
            lambda context: setattr(context, "keylog_filename", os.devnull),
            "the session keys are written to a file",
            id="key log",
        ),
    ],
)
def test_a_context_that_was_weakened_during_the_handshake_is_refused_after_it(
    weaken: Callable[[ssl.SSLContext], object], difference: str
) -> None:
    anchor = load_trust_anchor(ROOT.pem)
    context = build_context(anchor)
    ours, _ = handshake(context, serve())
    weaken(context)
    with pytest.raises(neon_async.InsecureConfigurationError, match="verifies less than it must") as caught:
        check_handshake(ours, context, server_name=SERVER_NAME, negotiation="direct", anchor=anchor)
    assert f"changed it: {difference}" in str(caught.value)  # and nothing that has not changed


def test_the_check_after_the_handshake_refuses_a_session_of_another_context_or_name() -> None:
    anchor = load_trust_anchor(ROOT.pem)
    context = build_context(anchor)
    weak = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    weak.load_verify_locations(cadata=ROOT.der)
    facts: dict[str, Any] = {"negotiation": "direct", "anchor": anchor}
    finished, _ = handshake(context, serve())
    report = check_handshake(finished, context, server_name=SERVER_NAME, **facts).report()
    assert (report.server_name, report.subject, report.issuer) == (SERVER_NAME, "CN=leaf", "CN=root")
    assert report.not_after == LEAF.certificate.not_valid_after_utc
    assert (report.anchor, report.anchor_sha256) == ("CN=root, from trust_anchor", anchor.sha256)
    for session, name in (
        (handshake(weak, serve())[0], SERVER_NAME),
        (finished, "db.example.com"),
    ):
        with pytest.raises(neon_async.CertificateError):
            check_handshake(session, context, server_name=name, **facts)


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        pytest.param(ssl.SSLError(1, "[SSL: NO_SUCH_REASON] no such reason (_ssl.c:1)"), "NO_SUCH_REASON", id="new"),
        pytest.param(ssl.SSLError(1, "[SSL] unknown error (_ssl.c:1)"), "UNKNOWN_ERROR", id="without a name"),
        pytest.param(ssl.SSLError(1, "something else"), None, id="another text"),
    ],
)
def test_a_reason_that_python_does_not_know_is_taken_from_the_text(error: ssl.SSLError, reason: str | None) -> None:
    assert openssl_reason(error) == reason


# ---------------------------------------------------------------------------------------------------------------------
# Every combination of parameters yields the whole policy, or a refusal


@pytest.fixture(scope="module")
def material(client_files: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[object]]:
    """Values to try for each parameter, good ones and bad ones."""
    folder = tmp_path_factory.mktemp("material")
    good_crl = write_crl(folder / "crl.pem", revocation_list(ROOT))
    bad_crl = write_crl(folder / "bad.pem", revocation_list(ROOT), OTHER_ROOT.pem)
    roots = str(folder / "roots.pem")
    Path(roots).write_bytes(OTHER_ROOT.pem)
    weak: list[object] = ["disable", "require", "verify-ca", "verify-full", "VERIFY-FULL", "", True, False, None]
    return {
        "trust_anchor": [ROOT.pem, ROOT.pem + OTHER_ROOT.pem, LEAF.pem, OTHER_ROOT.pem, None],
        "sslcrl": [good_crl, bad_crl, roots, None],
        "crl": [good_crl, bad_crl, None],
        "sslcert": [client_files["cert"], client_files["both"], roots, None],
        "sslkey": [client_files["key"], client_files["encrypted"], None],
        "sslpassword": [PASSPHRASE, "", None],
        "sslrootcert": [certifi.where(), "system", roots, None],
        "sslmode": weak,
        "ssl": [*weak, 0, 1, ssl.create_default_context()],
        "sslnegotiation": ["direct", "postgres", "requiredirect", None],
        "sslsni": [0, 1, "0", "1", False, True, None],
        "ssl_min_protocol_version": ["TLSv1", "TLSv1.2", "TLSv1.3", "SSLv3", None],
        "ssl_max_protocol_version": ["TLSv1.2", "TLSv1.3", None],
        "channel_binding": ["disable", "prefer", "require", None],
        "require_auth": ["none", "password", "scram-sha-256", "!scram-sha-256", None],
        "gssencmode": ["disable", "prefer", "require", None],
        "sslcompression": [0, 1, None],
    }


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_every_accepted_combination_of_parameters_yields_the_whole_policy(
    data: st.DataObject, material: dict[str, list[object]]
) -> None:
    names = data.draw(st.lists(st.sampled_from(sorted(material)), unique=True, max_size=6))
    keywords: dict[str, Any] = {name: data.draw(st.sampled_from(range(len(material[name])))) for name in names}
    keywords = {name: material[name][index] for name, index in keywords.items()}
    try:
        connector = prepare(DSN, **keywords)
    except neon_async.ConfigurationError as error:
        assert_secret_free(error, "s3cret", PASSPHRASE)
        return
    chosen = keywords.get("trust_anchor")
    expected = find_isrg_root_x1() if chosen is None else load_trust_anchor(chosen)
    crl = connector.parameters.sslcrl
    context = context_for(connector.parameters, connector.anchor)
    assert_policy(context, *(root.der for root in expected.roots), crl=crl is not None)


@settings(max_examples=150)
@given(
    trust_anchor=st.one_of(
        st.none(),
        st.binary(max_size=60),
        st.text(max_size=60),
        st.lists(st.sampled_from([ROOT.pem, OTHER_ROOT.pem, LEAF.pem, b"\n", b"garbage"]), max_size=3).map(b"".join),
    ),
    crl=st.one_of(st.none(), st.text(max_size=20)),
)
def test_create_ssl_context_returns_the_whole_policy_or_raises_configuration_error(
    trust_anchor: str | bytes | None, crl: str | None
) -> None:
    try:
        context = neon_async.create_ssl_context(trust_anchor=trust_anchor, crl=crl)
    except neon_async.ConfigurationError:
        return
    anchor = find_isrg_root_x1() if trust_anchor is None else load_trust_anchor(trust_anchor)
    assert_policy(context, *(root.der for root in anchor.roots), crl=crl is not None)
