"""A certificate factory for tests, and two tables of chains: those that must be accepted, and those that must not.

Certificates are made on demand. The tables serve the impostors, which present each chain to neon-async, and the
comparison with libpq.
"""

from __future__ import annotations

import datetime
import ipaddress
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from neon_async._wire.trust import find_isrg_root_x1
from neon_async.testing._impostor import SERVER_NAME

__all__ = (
    "ACCEPTED",
    "REFUSED",
    "Case",
    "Entity",
    "Presented",
    "element",
    "elements",
    "issue",
    "look_alike",
    "present",
    "revocation_list",
    "write_crl",
)

Key = ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey
Extension = tuple[x509.ExtensionType, bool]  # and whether it is critical
DNS = x509.DNSName

NOW = datetime.datetime.now(datetime.UTC).replace(microsecond=0)
DAY = datetime.timedelta(days=1)
OTHER_NAME = "ep-other-endpoint-654321.us-east-2.aws.neon.tech"


@dataclass(frozen=True)
class Entity:
    """A certificate with its private key."""

    certificate: x509.Certificate
    key: Key

    @property
    def pem(self) -> bytes:
        return self.certificate.public_bytes(Encoding.PEM)

    @property
    def der(self) -> bytes:
        return self.certificate.public_bytes(Encoding.DER)

    @property
    def key_pem(self) -> bytes:
        return self.key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


@dataclass(frozen=True)
class Presented:
    """What a server presents, and what its client verifies it against.

    Attributes:
        chain: The leaf's key, the leaf, and the issuers that are sent along, in PEM.
        anchor: The client's trust anchor in PEM, or None for its default.
        crl: The client's revocation lists in PEM, or None for no check.
    """

    chain: bytes
    anchor: bytes | None
    crl: bytes | None = None


@dataclass(frozen=True)
class Case:
    """A chain with an ID. `reason` is OpenSSL's for refusing it, empty where the chain is good."""

    id: str
    make: Callable[[], Presented]
    reason: str = ""


# ---------------------------------------------------------------------------------------------------------------------
# The factory


def issue(
    issuer: Entity | None = None,
    subject: str | x509.Name = "leaf",
    *,
    ca: bool = False,
    names: Sequence[x509.GeneralName] = (DNS(SERVER_NAME),),
    not_before: datetime.datetime = NOW - DAY,
    not_after: datetime.datetime = NOW + 30 * DAY,
    path_length: int | None = None,
    key: Key | None = None,
    also: Sequence[Extension] = (),
    without: Collection[type[x509.ExtensionType]] = (),
) -> Entity:
    """Return a certificate as RFC 5280 and VERIFY_X509_STRICT require it; self-signed without an `issuer`.

    `also` adds extensions, or replaces those of the same type; `without` omits types.
    """
    key = key or ec.generate_private_key(ec.SECP256R1())
    name = subject if isinstance(subject, x509.Name) else _name(subject)
    signing_key = issuer.key if issuer else key
    builder = x509.CertificateBuilder(
        issuer_name=issuer.certificate.subject if issuer else name,
        subject_name=name,
        public_key=key.public_key(),
        serial_number=x509.random_serial_number(),
        not_valid_before=not_before,
        not_valid_after=not_after,
    )
    extensions: dict[type[x509.ExtensionType], Extension] = {
        type(extension): (extension, critical)
        for extension, critical in [
            (x509.BasicConstraints(ca, path_length), True),
            (x509.SubjectKeyIdentifier.from_public_key(key.public_key()), False),
            (x509.AuthorityKeyIdentifier.from_issuer_public_key(signing_key.public_key()), False),
            *(_for_a_ca() if ca else _for_a_server(names)),
            *also,
        ]
    }
    for kind, (extension, critical) in extensions.items():
        if kind not in without:
            builder = builder.add_extension(extension, critical)
    return Entity(builder.sign(signing_key, hashes.SHA256()), key)


def present(leaf: Entity, *sent: Entity, anchor: Entity | None = None, crl: bytes | None = None) -> Presented:
    """Return `leaf` with the issuers that the server sends along. Default of `anchor`: the root of this module."""
    chain = leaf.key_pem + leaf.pem + b"".join(entity.pem for entity in sent)
    return Presented(chain, (anchor or root()).pem, crl)


def revocation_list(
    issuer: Entity,
    *revoked: Entity,
    last_update: datetime.datetime = NOW - DAY,
    next_update: datetime.datetime = NOW + DAY,
    key: Key | None = None,
    delta_of: int | None = None,
) -> bytes:
    """Return `issuer`'s CRL of the `revoked` certificates in PEM, signed with `key`; default: the issuer's own key.

    With `delta_of` it is a delta, and the number is that of the complete list.
    """
    builder = x509.CertificateRevocationListBuilder(
        issuer_name=issuer.certificate.subject, last_update=last_update, next_update=next_update
    )
    identifier = x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer.key.public_key())
    builder = builder.add_extension(identifier, False).add_extension(x509.CRLNumber(2), False)
    if delta_of is not None:
        builder = builder.add_extension(x509.DeltaCRLIndicator(delta_of), True)
    for entity in revoked:
        serial = entity.certificate.serial_number
        builder = builder.add_revoked_certificate(
            x509.RevokedCertificateBuilder(serial_number=serial, revocation_date=NOW - DAY).build()
        )
    return builder.sign(key or issuer.key, hashes.SHA256()).public_bytes(Encoding.PEM)


def write_crl(path: Path, *blocks: bytes) -> str:
    """Write `blocks` to a file at `path`, and return the path for `sslcrl`."""
    path.write_bytes(b"".join(blocks))
    return str(path)


def look_alike(original: x509.Certificate, issuer: Entity | None = None) -> Entity:
    """Return a certificate that equals `original`, key identifiers included, except for its key and signature."""
    return issue(
        issuer,
        original.subject,
        ca=True,
        not_before=original.not_valid_before_utc,
        not_after=original.not_valid_after_utc,
        key=_rsa_key(),
        also=[(extension.value, extension.critical) for extension in original.extensions],
        without=() if _identifier_of_issuer(original) else (x509.AuthorityKeyIdentifier,),
    )


@cache
def root() -> Entity:
    return issue(subject="root", ca=True)


@cache
def intermediate() -> Entity:
    return issue(root(), "intermediate", ca=True)


@cache
def isrg_root_x1() -> x509.Certificate:
    """Return the genuine ISRG Root X1."""
    return x509.load_der_x509_certificate(find_isrg_root_x1().der)


@cache
def _rsa_key(size: int = 2048) -> rsa.RSAPrivateKey:
    return rsa.generate_private_key(public_exponent=65537, key_size=size)


def _name(common_name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])


def _for_a_ca() -> list[Extension]:
    return [_key_usage("key_cert_sign", "crl_sign")]


def _for_a_server(names: Sequence[x509.GeneralName]) -> list[Extension]:
    usage: list[Extension] = [_key_usage("digital_signature"), _purpose(ExtendedKeyUsageOID.SERVER_AUTH)]
    return [*usage, (x509.SubjectAlternativeName(names), False)] if names else usage


def _key_usage(*allowed: str) -> Extension:
    usages = (
        "digital_signature",
        "content_commitment",
        "key_encipherment",
        "data_encipherment",
        "key_agreement",
        "key_cert_sign",
        "crl_sign",
        "encipher_only",
        "decipher_only",
    )
    return x509.KeyUsage(**{usage: usage in allowed for usage in usages}), True


def _purpose(*oids: x509.ObjectIdentifier) -> Extension:
    return x509.ExtendedKeyUsage(oids), False


def _identifier_of_issuer(certificate: x509.Certificate) -> x509.AuthorityKeyIdentifier | None:
    found = [one.value for one in certificate.extensions if isinstance(one.value, x509.AuthorityKeyIdentifier)]
    return found[0] if found else None


def _names(original: x509.Certificate) -> Extension:
    """Return the authority key identifier that names `original` as the issuer."""
    identifier = original.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
    return x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(identifier), False


# Certificates that the cryptography package refuses to make, although some CA made them, are assembled from DER.

_SHA1_WITH_RSA = bytes.fromhex("300d06092a864886f70d0101050500")
_MD5_WITH_RSA = bytes.fromhex("300d06092a864886f70d0101040500")


def _with_weak_signature(entity: Entity, signer: Entity, algorithm: bytes, digest: hashes.HashAlgorithm) -> Entity:
    assert isinstance(signer.key, rsa.RSAPrivateKey)
    fields = elements(entity.certificate.tbs_certificate_bytes)
    fields[2] = algorithm
    body = element(0x30, b"".join(fields))
    return _assemble(entity.key, body, algorithm, signer.key.sign(body, padding.PKCS1v15(), digest))


def _as_version_1(entity: Entity, signer: Entity) -> Entity:
    """Return `entity` without version number and extensions."""
    assert isinstance(signer.key, ec.EllipticCurvePrivateKey)
    fields = elements(entity.certificate.tbs_certificate_bytes)[1:-1]
    body = element(0x30, b"".join(fields))
    return _assemble(entity.key, body, fields[1], signer.key.sign(body, ec.ECDSA(hashes.SHA256())))


def _with_broken_signature(entity: Entity) -> Entity:
    body, algorithm, signature = elements(entity.der)
    return _assemble(entity.key, body, algorithm, signature[3:-1] + bytes([signature[-1] ^ 1]))


def _assemble(key: Key, body: bytes, algorithm: bytes, signature: bytes) -> Entity:
    der = element(0x30, body + algorithm + element(0x03, b"\0" + signature))
    return Entity(x509.load_der_x509_certificate(der), key)


def element(tag: int, content: bytes) -> bytes:
    size = len(content)
    if size < 0x80:
        return bytes([tag, size]) + content
    length = size.to_bytes((size.bit_length() + 7) // 8)
    return bytes([tag, 0x80 | len(length)]) + length + content


def elements(der: bytes) -> list[bytes]:
    """Return the elements inside a constructed element."""
    start, end = content(der, 0)
    found = []
    while start < end:
        _, following = content(der, start)
        found.append(der[start:following])
        start = following
    return found


def content(der: bytes, offset: int) -> tuple[int, int]:
    start, size = offset + 2, der[offset + 1]
    if size & 0x80:
        start += size & 0x7F
        size = int.from_bytes(der[offset + 2 : start])
    return start, start + size


# ---------------------------------------------------------------------------------------------------------------------
# The tables


def _leaf(*names: x509.GeneralName, **changes: object) -> Presented:
    """A leaf of the intermediate, which is sent along."""
    if names:
        changes["names"] = names
    return present(issue(intermediate(), **changes), intermediate())  # type: ignore[arg-type]


def _below(subordinate: Entity, **changes: object) -> Presented:
    """A leaf of another CA below the root, which is sent along."""
    return present(issue(subordinate, **changes), subordinate)  # type: ignore[arg-type]


def _ca(**changes: object) -> Entity:
    return issue(root(), "subordinate", ca=True, **changes)  # type: ignore[arg-type]


def _long_chain(path_length: int | None) -> Presented:
    upper = _ca(path_length=path_length)
    lower = issue(upper, "lower", ca=True)
    return present(issue(lower), lower, upper)


def _crl_case(make: Callable[[Entity], bytes]) -> Presented:
    """A leaf with the root's CRL, which libpq requires too, and the CRL that `make` returns for the leaf."""
    leaf = issue(intermediate())
    return present(leaf, intermediate(), crl=revocation_list(root()) + make(leaf))


def _crl(*revoked: Entity, **changes: datetime.datetime) -> bytes:
    return revocation_list(intermediate(), *revoked, **changes)  # type: ignore[arg-type]


def _foreign_crl(_leaf: Entity) -> bytes:
    return revocation_list(issue(subject="foreign", ca=True))


def _forged_crl(_leaf: Entity) -> bytes:
    return revocation_list(intermediate(), key=ec.generate_private_key(ec.SECP256R1()))


def _under_expired_root() -> Presented:
    expired = issue(subject="expired", ca=True, not_before=NOW - 2 * DAY, not_after=NOW - DAY)
    return present(issue(expired), anchor=expired)


def _weakly_signed(algorithm: bytes, digest: hashes.HashAlgorithm) -> Presented:
    signer = issue(subject="rsa root", ca=True, key=_rsa_key())
    return present(_with_weak_signature(issue(signer), signer, algorithm, digest), anchor=signer)


def _weakly_signed_issuer() -> Presented:
    signer = issue(subject="rsa root", ca=True, key=_rsa_key())
    weak = _with_weak_signature(issue(signer, "weak", ca=True), signer, _SHA1_WITH_RSA, hashes.SHA1())
    return present(issue(weak), weak, anchor=signer)


def _from_x1_look_alike(*, sent: bool) -> Presented:
    fake = look_alike(isrg_root_x1())
    chain = present(issue(fake, also=[_names(isrg_root_x1())]), *([fake] if sent else [])).chain
    return Presented(chain, anchor=None)


def _from_fake_intermediate_of_x1() -> Presented:
    fake_root = look_alike(isrg_root_x1())
    fake = issue(fake_root, "R13", ca=True, key=_rsa_key(), also=[_names(isrg_root_x1())])
    genuine = Entity(isrg_root_x1(), fake_root.key)
    return Presented(present(issue(fake), fake, genuine).chain, anchor=None)


def _constrained(permitted: str | None = None, excluded: str | None = None) -> Presented:
    constraints = x509.NameConstraints([DNS(permitted)] if permitted else None, [DNS(excluded)] if excluded else None)
    return _below(_ca(also=[(constraints, True)]))


_UNKNOWN_CRITICAL: Extension = (x509.UnrecognizedExtension(x509.ObjectIdentifier("2.25.1"), b"\x05\x00"), True)
_UNKNOWN: Extension = (x509.UnrecognizedExtension(x509.ObjectIdentifier("2.25.1"), b"\x05\x00"), False)
_BASIC, _USAGE, _SAN = x509.BasicConstraints, x509.KeyUsage, x509.SubjectAlternativeName
_AKI, _SKI = x509.AuthorityKeyIdentifier, x509.SubjectKeyIdentifier
_MISMATCH = "Hostname mismatch"
_CLIENT_ONLY = _purpose(ExtendedKeyUsageOID.CLIENT_AUTH)

ACCEPTED = (
    Case("exact-name", lambda: _leaf()),
    Case("wildcard-of-the-region", lambda: _leaf(DNS("*.us-east-2.aws.neon.tech"))),
    Case("upper-case-name", lambda: _leaf(DNS(SERVER_NAME.upper()))),
    Case("one-of-many-names", lambda: _leaf(DNS(OTHER_NAME), DNS(SERVER_NAME), DNS("example.com"))),
    Case("common-name-of-another", lambda: _leaf(subject="example.com")),
    Case("signed-by-the-root", lambda: present(issue(root()))),
    Case("root-sent-along", lambda: present(issue(intermediate()), intermediate(), root())),
    Case("stranger-sent-along", lambda: present(issue(intermediate()), issue(subject="x", ca=True), intermediate())),
    Case("two-intermediates", lambda: _long_chain(None)),
    Case("path-length-just-enough", lambda: _long_chain(1)),
    Case("rsa-leaf", lambda: _leaf(key=_rsa_key())),
    Case("p384-leaf", lambda: _leaf(key=ec.generate_private_key(ec.SECP384R1()))),
    Case("no-extended-key-usage", lambda: _leaf(without=[x509.ExtendedKeyUsage])),
    Case("unknown-extension", lambda: _leaf(also=[_UNKNOWN])),
    Case("name-permitted", lambda: _constrained(permitted="neon.tech")),
    Case("not-revoked", lambda: _crl_case(lambda _: _crl())),
)

REFUSED = (
    # Issuer
    Case("unknown-ca", lambda: present(issue(issue(subject="unknown", ca=True))), "unable to get local issuer"),
    Case("self-signed", lambda: present(issue()), "self-signed certificate"),
    Case("self-signed-ca", lambda: present(issue(ca=True, also=_for_a_server([DNS(SERVER_NAME)]))), "self-signed"),
    Case("missing-intermediate", lambda: present(issue(intermediate())), "unable to get local issuer"),
    Case("root-look-alike", lambda: present(issue(issue(subject="root", ca=True))), "unable to get local issuer"),
    Case("x1-look-alike", lambda: _from_x1_look_alike(sent=False), "certificate signature failure"),
    Case("x1-look-alike-sent-along", lambda: _from_x1_look_alike(sent=True), "certificate signature failure"),
    Case("fake-intermediate-of-x1", _from_fake_intermediate_of_x1, "certificate signature failure"),
    Case("broken-signature", lambda: present(_with_broken_signature(issue(root()))), "certificate signature failure"),
    # Validity
    Case("expired", lambda: _leaf(not_after=NOW - DAY / 24), "certificate has expired"),
    Case("not-yet-valid", lambda: _leaf(not_before=NOW + DAY), "certificate is not yet valid"),
    Case("expired-intermediate", lambda: _below(_ca(not_after=NOW - DAY / 24)), "certificate has expired"),
    Case("expired-root", _under_expired_root, "certificate has expired"),
    # Name
    Case("wrong-name", lambda: _leaf(DNS("db.example.com")), _MISMATCH),
    Case("name-of-another-endpoint", lambda: _leaf(DNS(OTHER_NAME)), _MISMATCH),
    Case("common-name-only", lambda: _leaf(subject=SERVER_NAME, without=[_SAN]), _MISMATCH),
    Case("common-name-beside-another", lambda: _leaf(DNS(OTHER_NAME), subject=SERVER_NAME), _MISMATCH),
    Case("no-name-at-all", lambda: _leaf(without=[_SAN]), _MISMATCH),
    Case("ip-of-hostaddr", lambda: _leaf(x509.IPAddress(ipaddress.ip_address("127.0.0.1"))), _MISMATCH),
    Case("name-as-uri", lambda: _leaf(x509.UniformResourceIdentifier(f"https://{SERVER_NAME}")), _MISMATCH),
    Case("name-as-email", lambda: _leaf(x509.RFC822Name(f"admin@{SERVER_NAME}")), _MISMATCH),
    Case("name-as-directory-name", lambda: _leaf(x509.DirectoryName(_name(SERVER_NAME))), _MISMATCH),
    Case("name-before-a-nul", lambda: _leaf(DNS(SERVER_NAME + "\0.example.com")), _MISMATCH),
    Case("name-with-a-trailing-label", lambda: _leaf(DNS(SERVER_NAME + ".example.com")), _MISMATCH),
    Case("parent-of-the-name", lambda: _leaf(DNS("us-east-2.aws.neon.tech")), _MISMATCH),
    Case("leading-dot", lambda: _leaf(DNS(".us-east-2.aws.neon.tech")), _MISMATCH),
    Case("wildcard-two-labels-up", lambda: _leaf(DNS("*.aws.neon.tech")), _MISMATCH),
    Case("wildcard-three-labels-up", lambda: _leaf(DNS("*.neon.tech")), _MISMATCH),
    Case("wildcard-for-all", lambda: _leaf(DNS("*")), _MISMATCH),
    Case("wildcard-in-every-label", lambda: _leaf(DNS("*.*.*.*.*")), _MISMATCH),
    Case("wildcard-below-the-name", lambda: _leaf(DNS(f"*.{SERVER_NAME}")), _MISMATCH),
    Case("wildcard-in-the-middle", lambda: _leaf(DNS(SERVER_NAME.replace("us-east-2", "*"))), _MISMATCH),
    Case("name-not-permitted", lambda: _constrained(permitted="example.com"), "permitted subtree violation"),
    Case("name-excluded", lambda: _constrained(excluded="neon.tech"), "excluded subtree violation"),
    # Purpose
    Case("client-only", lambda: _leaf(also=[_CLIENT_ONLY]), "unsuitable certificate purpose"),
    Case("mail-only", lambda: _leaf(also=[_purpose(ExtendedKeyUsageOID.EMAIL_PROTECTION)]), "unsuitable certificate"),
    Case("issuer-for-clients-only", lambda: _below(_ca(also=[_CLIENT_ONLY])), "unsuitable certificate purpose"),
    Case("issuer-is-no-ca", lambda: _below(issue(root(), "no ca")), "invalid CA certificate"),
    Case("issuer-says-nothing", lambda: _below(_ca(without=[_BASIC])), "invalid CA certificate"),
    Case("issuer-may-not-sign", lambda: _below(_ca(also=[_key_usage("crl_sign")])), "invalid CA certificate"),
    Case("path-length-violated", lambda: _long_chain(0), "path length constraint exceeded"),
    Case("unknown-critical-extension", lambda: _leaf(also=[_UNKNOWN_CRITICAL]), "unhandled critical extension"),
    Case("issuer-with-unknown-critical-extension", lambda: _below(_ca(also=[_UNKNOWN_CRITICAL])), "unhandled critical"),
    # Revocation
    Case("revoked", lambda: _crl_case(_crl), "certificate revoked"),
    Case("stale-crl", lambda: _crl_case(lambda _: _crl(next_update=NOW)), "CRL has expired"),
    Case("crl-of-tomorrow", lambda: _crl_case(lambda _: _crl(last_update=NOW + DAY / 2)), "not yet valid"),
    Case("foreign-crl", lambda: _crl_case(_foreign_crl), "unable to get certificate CRL"),
    Case("forged-crl", lambda: _crl_case(_forged_crl), "CRL signature failure"),
    Case("no-crl-of-the-issuer", lambda: _crl_case(lambda _: b""), "unable to get certificate CRL"),
    # Form: VERIFY_X509_STRICT and OpenSSL's security level
    Case("no-authority-key-identifier", lambda: _leaf(without=[_AKI]), "Missing Authority Key"),
    Case("issuer-without-key-identifier", lambda: _below(_ca(without=[_SKI])), "Missing Subject Key"),
    Case("issuer-without-key-usage", lambda: _below(_ca(without=[_USAGE])), "does not include key usage"),
    Case("issuer-not-critically-a-ca", lambda: _below(_ca(also=[(_BASIC(True, None), False)])), "Basic Constraints"),
    Case("leaf-that-may-sign", lambda: _leaf(also=[_key_usage("key_cert_sign")]), "keyCertSign invalid"),
    Case("empty-subject-and-uncritical-name", lambda: _leaf(subject=x509.Name([])), "Subject empty"),
    Case("version-1-leaf", lambda: present(_as_version_1(issue(root(), SERVER_NAME), root())), _MISMATCH),
    Case("version-1-issuer", lambda: _below(_as_version_1(_ca(), root())), "invalid CA certificate"),
    Case("md5-signature", lambda: _weakly_signed(_MD5_WITH_RSA, hashes.MD5()), "too weak"),
    Case("sha1-signature", lambda: _weakly_signed(_SHA1_WITH_RSA, hashes.SHA1()), "too weak"),
    Case("sha1-signature-on-the-issuer", _weakly_signed_issuer, "too weak"),
    Case("rsa-1024-leaf", lambda: _leaf(key=_rsa_key(1024)), "too weak"),
    Case("rsa-1024-issuer", lambda: _below(_ca(key=_rsa_key(1024))), "too weak"),
)
