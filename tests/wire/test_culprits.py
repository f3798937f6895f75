"""The message about a refused chain names the certificate that is to blame, and what to do."""

from __future__ import annotations

import ssl
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.x509 import DNSName, ExtendedKeyUsage, NameConstraints, SubjectKeyIdentifier
from cryptography.x509.oid import ExtendedKeyUsageOID
from hypothesis import given
from hypothesis import strategies as st
from support.certificates import DAY, NOW, Entity, issue, look_alike
from support.handshakes import OTHER_ROOT, ROOT, handshake, serve

from neon_async import CertificateError
from neon_async._wire.culprits import find_culprit
from neon_async._wire.tls import build_context, certificate_error
from neon_async._wire.trust import load_trust_anchor
from neon_async.testing._impostor import SERVER_NAME

YESTERDAY, TOMORROW = NOW - DAY, NOW + DAY
PAST = {"not_before": NOW - 3 * DAY, "not_after": YESTERDAY}
FUTURE = {"not_before": TOMORROW, "not_after": NOW + 3 * DAY}
INTERMEDIATE = issue(ROOT, "intermediate", ca=True)
LOWER = issue(INTERMEDIATE, "lower", ca=True)
OLD = issue(ROOT, "old intermediate", ca=True, **PAST)  # type: ignore[arg-type]
EARLY = issue(ROOT, "early intermediate", ca=True, **FUTURE)  # type: ignore[arg-type]
EXPIRED_ROOT = issue(subject="expired root", ca=True, **PAST)  # type: ignore[arg-type]
FUTURE_ROOT = issue(subject="future root", ca=True, **FUTURE)  # type: ignore[arg-type]


def error_for(anchor: Entity, leaf: Entity, *sent: Entity) -> CertificateError:
    """Return the error of a client that trusts `anchor` for a server that presents `leaf` and what is sent along."""
    loaded = load_trust_anchor(anchor.pem)
    with pytest.raises(ssl.SSLCertVerificationError) as caught:
        handshake(build_context(loaded), serve(leaf, *sent))
    return certificate_error(caught.value, server_name=SERVER_NAME, anchor=loaded)


def leaf(issuer: Entity, **changes: datetime) -> Entity:
    return issue(issuer, **changes)  # type: ignore[arg-type]


def below(*, ca: bool = True, **changes: Any) -> tuple[Entity, Entity, Entity]:
    """Return the root, and a leaf below an odd intermediate certificate, and that."""
    odd = issue(ROOT, "odd", ca=ca, **changes)
    return ROOT, leaf(odd), odd


CONSTRAINTS = NameConstraints([DNSName("internal.test")], None), True
LIMITED_ROOT = issue(subject="limited root", ca=True, also=[CONSTRAINTS])


@pytest.mark.parametrize(
    ("make", "reason", "advice"),
    [
        pytest.param(
            lambda: error_for(ROOT, leaf(INTERMEDIATE)),
            "the server did not send the certificate of its issuer, CN=intermediate (",
            "The server must send every intermediate certificate.",
            id="a missing intermediate",
        ),
        pytest.param(
            lambda: error_for(ROOT, leaf(LOWER), LOWER),
            "the server did not send the certificate of the issuer of CN=lower, CN=intermediate (",
            "The server must send every intermediate certificate.",
            id="a missing upper intermediate",
        ),
        pytest.param(
            lambda: error_for(ROOT, leaf(LOWER), INTERMEDIATE),
            "the server did not send the certificate of its issuer, CN=lower (",
            "The server must send every intermediate certificate.",
            id="a missing lower intermediate",
        ),
        pytest.param(
            lambda: error_for(ROOT, leaf(OTHER_ROOT)),
            "the server did not send the certificate of its issuer, CN=other root (",
            "for a private CA, pass trust_anchor= in code.",
            id="another root, which is not sent",
        ),
        pytest.param(
            lambda: error_for(ROOT, leaf(OTHER_ROOT), OTHER_ROOT),
            "its chain ends at another root, CN=other root (",
            "for a private CA, pass trust_anchor= in code.",
            id="another root, which is sent",
        ),
        pytest.param(
            lambda: error_for(ROOT, leaf(issue(subject="root", ca=True))),
            "its chain ends at a root that has the name of the trust anchor, CN=root, and another key (",
            "pass that as trust_anchor=.",
            id="a new root of the same name",
        ),
        pytest.param(
            lambda: error_for(EXPIRED_ROOT, leaf(EXPIRED_ROOT)),
            f"the trust anchor CN=expired root expired on {YESTERDAY:%Y-%m-%d} (",
            "the CA needs a new root: pass that as trust_anchor= in code.",
            id="an expired root",
        ),
        pytest.param(
            lambda: error_for(EXPIRED_ROOT, leaf(EXPIRED_ROOT), EXPIRED_ROOT),
            f"the trust anchor CN=expired root expired on {YESTERDAY:%Y-%m-%d} (",
            "pass that as trust_anchor= in code.",
            id="an expired root, which is sent, too",
        ),
        pytest.param(
            lambda: error_for(FUTURE_ROOT, leaf(FUTURE_ROOT)),
            f"the trust anchor CN=future root is not valid before {TOMORROW:%Y-%m-%d} (",
            "Check this machine's clock;",
            id="a root of tomorrow",
        ),
        pytest.param(
            lambda: error_for(ROOT, leaf(OLD), OLD),
            f"its issuer CN=old intermediate expired on {YESTERDAY:%Y-%m-%d} (",
            "the server must send a valid intermediate certificate.",
            id="an expired intermediate",
        ),
        pytest.param(
            lambda: error_for(ROOT, leaf(EARLY), EARLY),
            f"its issuer CN=early intermediate is not valid before {TOMORROW:%Y-%m-%d} (",
            "Check this machine's clock;",
            id="an intermediate of tomorrow",
        ),
        pytest.param(
            lambda: error_for(ROOT, leaf(INTERMEDIATE, **PAST), INTERMEDIATE),
            f"it expired on {YESTERDAY:%Y-%m-%d} (",
            "the server must renew its certificate.",
            id="an expired leaf",
        ),
        pytest.param(
            lambda: error_for(ROOT, leaf(INTERMEDIATE, **FUTURE), INTERMEDIATE),
            f"it is not valid before {TOMORROW:%Y-%m-%d} (",
            "Check this machine's clock;",
            id="a leaf of tomorrow",
        ),
        pytest.param(
            lambda: error_for(ROOT, leaf(INTERMEDIATE), issue(ROOT, "intermediate", ca=True)),
            "the server did not send the certificate of its issuer, CN=intermediate (",
            "The server must send every intermediate certificate.",
            id="another intermediate of the same name",
        ),
        pytest.param(
            lambda: error_for(
                ROOT, issue(INTERMEDIATE, names=[DNSName("a.test"), DNSName("b\x1b.test")]), INTERMEDIATE
            ),
            "it is for another name: it names a.test, b\\x1b.test (",
            "Check the host;",
            id="another name",
        ),
        pytest.param(
            lambda: error_for(ROOT, issue(INTERMEDIATE, names=[]), INTERMEDIATE),
            "it is for another name: it names no host (subjectAltName) (",
            "Check the host;",
            id="no name but the common one",
        ),
        pytest.param(
            lambda: error_for(*below(also=[CONSTRAINTS])),
            "its issuer CN=odd may not certify this name (nameConstraints) (",
            "a name that it may certify",
            id="an intermediate with name constraints",
        ),
        pytest.param(
            lambda: error_for(LIMITED_ROOT, leaf(LIMITED_ROOT)),
            "the trust anchor CN=limited root may not certify this name (nameConstraints) (",
            "a name that it may certify",
            id="a root with name constraints",
        ),
        pytest.param(
            lambda: error_for(*below(without=[SubjectKeyIdentifier])),
            "its issuer CN=odd has no subjectKeyIdentifier (",
            "The server must send a chain that conforms to RFC 5280.",
            id="an intermediate that strict verification refuses",
        ),
        pytest.param(
            lambda: error_for(*below(also=[(ExtendedKeyUsage([ExtendedKeyUsageOID.CLIENT_AUTH]), False)])),
            "its issuer CN=odd is not meant for servers (extendedKeyUsage) (",
            "The server must send a chain that conforms to RFC 5280.",
            id="an intermediate for clients",
        ),
        pytest.param(
            lambda: error_for(*below(key=rsa.generate_private_key(65537, 1024))),
            "its issuer CN=odd has a key that is too small (",
            "The server must send a chain that conforms to RFC 5280.",
            id="an intermediate with a small key",
        ),
        pytest.param(
            lambda: error_for(*below(ca=False)),
            "its issuer CN=odd does not say that it is a CA (basicConstraints) (",
            "Do not connect; report this to the operator of the server.",
            id="a leaf that issues certificates",
        ),
    ],
)
def test_the_certificate_that_is_to_blame_is_named(
    make: Callable[[], CertificateError], reason: str, advice: str
) -> None:
    message = str(make())
    assert f"was refused: {reason}OpenSSL: " in message
    assert advice in message


def test_where_the_code_says_it_all_nothing_is_added() -> None:
    anchor, now = load_trust_anchor(ROOT.pem), datetime.now(UTC)
    for code in (23, 26, 47, 79, 0):
        assert find_culprit(code, [leaf(ROOT).der], anchor, now) is None
    for code in (9, 10, 19):  # and nothing of what was sent is to blame
        assert find_culprit(code, [leaf(ROOT).der], anchor, now) is None
    assert find_culprit(20, [], anchor, now) is None


def test_a_chain_that_goes_in_circles_ends() -> None:
    one = issue(subject="one", ca=True)
    two = issue(one, "two", ca=True)
    back = look_alike(one.certificate, two)
    culprit = find_culprit(20, [leaf(two).der, two.der, back.der, two.der], load_trust_anchor(ROOT.pem), NOW)
    assert culprit is not None


@given(st.lists(st.binary(max_size=60), max_size=3), st.sampled_from([2, 9, 10, 19, 20, 21]))
def test_whatever_a_server_sends_is_explained_without_an_exception(served: list[bytes], code: int) -> None:
    find_culprit(code, served, load_trust_anchor(ROOT.pem), NOW)
