"""Name the certificate for which a chain was refused.

OpenSSL has decided by then, and reports only a code. This module explains, and verifies nothing. It must not know
sockets, DSNs or pools.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Any, NamedTuple

from .._text import escape
from .chain import Described, describe
from .strict import fault_of_root
from .trust import TrustAnchor

_NOT_YET_VALID, _EXPIRED = 9, 10
_UNKNOWN_ISSUER = (2, 20, 21)
_NAME_CONSTRAINT = (47, 48)
_OTHER_NAME = 62
_NO_CA = 79
_SAYS_IT_ALL = (0, 3, 11, 12, 18, 23, 25)
_SELF_SIGNED_IN_CHAIN = 19


class Culprit(NamedTuple):
    """What made a chain fail.

    Attributes:
        reason: What is wrong, in words that follow "was refused:".
        advice: What to do about it; '' where that is what the code demands anyway.
    """

    reason: str
    advice: str


def find_culprit(code: int, served: Sequence[bytes], anchor: TrustAnchor, now: datetime) -> Culprit | None:
    """Return what made a chain fail, or None where the code says it all.

    Args:
        code: OpenSSL's verify code (x509_vfy.h).
        served: What the server sent, in DER, the leaf first.
        anchor: The trust anchor.
        now: The time, in UTC.
    """
    if not served:
        return None
    path = _path([describe(der) for der in served])
    if code in (_EXPIRED, _NOT_YET_VALID):
        return _outside_its_time(path, anchor, now)
    end = path[-1]
    if code in _UNKNOWN_ISSUER:
        return _unknown_issuer(path, anchor)
    if code == _SELF_SIGNED_IN_CHAIN and end.is_self_issued:
        return Culprit(f"its chain ends at another root, {end.shown.subject}", _OTHER_ROOT)
    if code == _OTHER_NAME:
        return Culprit(f"it is for another name: it names {_names(path[0])}", _WHICH_HOST)
    if code in _NAME_CONSTRAINT:
        return _constrained(path, anchor)
    if code in (*_SAYS_IT_ALL, _SELF_SIGNED_IN_CHAIN):
        return None
    return _faulty_issuer(path, "" if code == _NO_CA else _MUST_CONFORM)


_MUST_CONFORM = "The server must send a chain that conforms to RFC 5280."
_OTHER_ROOT = "Connect to the real server; for a private CA, pass trust_anchor= in code."
_WHICH_HOST = "Check the host; this name is verified, wherever hostaddr leads."
_CLOCK = "Check this machine's clock"


def _path(served: list[Described]) -> list[Described]:
    """Return the leaf and those of the other certificates that lead on from it, in order."""
    path, rest = served[:1], served[1:]
    while rest and not path[-1].is_self_issued:
        issuer = next((each for each in rest if _may_issue(each, path[-1])), None)
        if issuer is None:
            break
        path.append(issuer)
        rest.remove(issuer)
    return path


def _may_issue(issuer: Described, certificate: Described) -> bool:
    """Return whether OpenSSL looks for the issuer's signature on a certificate: name and key identifier agree."""
    keys = {issuer.key, certificate.issuer_key} - {""}
    return issuer.subject == certificate.issuer and len(keys) < 2


def _unknown_issuer(path: list[Described], anchor: TrustAnchor) -> Culprit:
    end = path[-1]
    roots = [describe(root.der) for root in anchor.roots]
    if any(root.subject == end.issuer for root in roots):
        return Culprit(
            f"its chain ends at a root that has the name of the trust anchor, {end.shown.issuer}, and another key",
            "Connect to the real server; where its CA has a new root of the same name, pass that as trust_anchor=.",
        )
    what = "its issuer" if len(path) == 1 else f"the issuer of {end.shown.subject}"
    return Culprit(
        f"the server did not send the certificate of {what}, {end.shown.issuer}",
        "The server must send every intermediate certificate. If this is the name of another root, connect to the "
        "real server; for a private CA, pass trust_anchor= in code.",
    )


def _outside_its_time(path: list[Described], anchor: TrustAnchor, now: datetime) -> Culprit | None:
    """Return the certificate that has expired or is not valid yet. OpenSSL looks at the root first, and so on down."""
    end = path[-1]
    for root in (describe(each.der) for each in anchor.roots):
        if root.subject in (end.subject, end.issuer) and (fault := _fault(root, now)):
            return Culprit(
                f"the trust anchor {root.shown.subject} {fault}",
                f"{_CLOCK}; if it is right, the CA needs a new root: pass that as trust_anchor= in code.",
            )
    for issuer in reversed(path[1:]):
        if fault := _fault(issuer, now):
            return Culprit(
                f"its issuer {issuer.shown.subject} {fault}",
                f"{_CLOCK}; if it is right, the server must send a valid intermediate certificate.",
            )
    if fault := _fault(path[0], now):
        return Culprit(f"it {fault}", f"{_CLOCK}; if it is right, the server must renew its certificate.")
    return None


def _fault(certificate: Described, now: datetime) -> str:
    if certificate.shown.not_after is not None and certificate.shown.not_after < now:
        return f"expired on {certificate.shown.not_after:%Y-%m-%d}"
    if certificate.not_before is not None and certificate.not_before > now:
        return f"is not valid before {certificate.not_before:%Y-%m-%d}"
    return ""


def _names(leaf: Described) -> str:
    """Return the hosts that a certificate names, in words."""
    try:
        names = [escape(name) for name in _read(leaf).subject_alt_name_value.native if isinstance(name, str)]
    except Exception:  # noqa: BLE001  as in `describe()`; an extension that is missing is None
        names = []
    if not names:
        return "no host (subjectAltName)"
    return ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")


_SHOWN = 5


def _constrained(path: list[Described], anchor: TrustAnchor) -> Culprit | None:
    """Return the CA that may not certify the name of the leaf."""
    roots = [(f"the trust anchor {each.shown.subject}", each) for each in map(_described, anchor.roots)]
    issuers = [(f"its issuer {each.shown.subject}", each) for each in reversed(path[1:])]
    for who, ca in roots + issuers:
        if _has_name_constraints(ca):
            return Culprit(f"{who} may not certify this name (nameConstraints)", _CONSTRAINED)
    return None


_CONSTRAINED = "Check the host; the CA must issue a certificate for a name that it may certify, or have no such limit."


def _described(root: TrustAnchor) -> Described:
    return describe(root.der)


def _has_name_constraints(ca: Described) -> bool:
    try:
        return _read(ca).name_constraints_value is not None
    except Exception:  # noqa: BLE001  as in `describe()`
        return False


def _faulty_issuer(path: list[Described], advice: str) -> Culprit | None:
    """Return the issuer that strict verification refuses; None where it is the leaf itself."""
    for issuer in reversed(path[1:]):
        if fault := fault_of_root(issuer.der):
            return Culprit(f"its issuer {issuer.shown.subject} {fault}", advice)
    return None


def _read(certificate: Described) -> Any:
    from asn1crypto.x509 import Certificate  # as in `describe()`

    return Certificate.load(certificate.der)
