"""ISRG Root X1 is found by its fingerprint in any store, and nothing but roots is an anchor."""

from __future__ import annotations

import base64
import hashlib
import os
import ssl
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import certifi
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from support.certificates import DAY, NOW, issue, look_alike, revocation_list
from support.files import make_huge
from support.handshakes import assert_policy, handshake, serve
from support.probes import assert_secret_free

import neon_async
from neon_async import LETS_ENCRYPT_ROOTS
from neon_async._wire import trust as _trust
from neon_async._wire.trust import find_isrg_root_x1, load_trust_anchor, survey

ROOT = issue(subject="root", ca=True)
OTHER_ROOT = issue(subject="other root", ca=True)
INTERMEDIATE = issue(ROOT, "intermediate", ca=True)
LEAF = issue(ROOT)


def bundle() -> list[bytes]:
    """Return certifi's certificates in DER, as OpenSSL reads them."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(certifi.where())
    return context.get_ca_certs(binary_form=True)


def pem_of(*ders: bytes) -> bytes:
    return b"".join(ssl.DER_cert_to_PEM_cert(der).encode() for der in ders)


BUNDLE = bundle()
X1_DER = next(der for der in BUNDLE if hashlib.sha256(der).hexdigest() == neon_async.ISRG_ROOT_X1_SHA256)
X1 = x509.load_der_x509_certificate(X1_DER)
X1_PEM = pem_of(X1_DER)
LOOK_ALIKE = look_alike(X1)
WITHOUT_X1 = pem_of(*(der for der in BUNDLE if der != X1_DER))


@pytest.fixture(autouse=True)
def empty_cache() -> Iterator[None]:
    _trust._complete.clear()
    find_isrg_root_x1.cache_clear()
    yield
    _trust._complete.clear()
    find_isrg_root_x1.cache_clear()


@pytest.fixture
def system(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., dict[str, Path]]:
    """Return a function that replaces the stores of certifi and of the system; a store of None does not exist."""

    def install(certifi_pem: bytes | None = WITHOUT_X1, **stores: bytes | None) -> dict[str, Path]:
        paths = {name: tmp_path / f"{name}.pem" for name in stores}
        for name, pem in stores.items():
            if pem is not None:
                paths[name].write_bytes(pem)
        bundle = tmp_path / "cacert.pem"
        if certifi_pem is not None:
            bundle.write_bytes(certifi_pem)
        monkeypatch.setattr(certifi, "where", lambda: str(bundle))
        monkeypatch.setattr(_trust, "_SYSTEM_STORES", tuple((name, str(path)) for name, path in paths.items()))
        return paths

    return install


def test_the_public_fingerprint_is_that_of_isrg_root_x1() -> None:
    assert neon_async.ISRG_ROOT_X1_SHA256 == "96bcec06264976f37460779acf28c5a7cfe8a3c0aae11a8ffcee05c0bddf08c6"
    assert X1.subject.rfc4514_string() == "CN=ISRG Root X1,O=Internet Security Research Group,C=US"


def test_x1_is_found_in_certifi_among_many() -> None:
    anchor = find_isrg_root_x1()
    assert len(BUNDLE) > 100
    assert anchor.der == X1_DER
    assert anchor.sha256 == neon_async.ISRG_ROOT_X1_SHA256
    assert anchor.subject == "CN=ISRG Root X1, O=Internet Security Research Group, C=US"
    assert str(anchor) == f"{anchor.subject}, from certifi ({certifi.where()})"
    assert "der" not in repr(anchor)


# A store

with_text = b"# ISRG Root X1\nCertificate:\n    Data: ...\n" + X1_PEM + b"trailing text\n"


@pytest.mark.parametrize(
    "pem",
    [
        pytest.param(X1_PEM, id="alone"),
        pytest.param(WITHOUT_X1 + X1_PEM, id="last of many"),
        pytest.param(LOOK_ALIKE.pem + X1_PEM, id="after its look-alike"),
        pytest.param(X1_PEM.replace(b"\n", b"\r\n"), id="Windows line endings"),
        pytest.param(with_text, id="surrounded by text"),
        pytest.param(
            b"-----BEGIN CERTIFICATE-----\n!!!!\n-----END CERTIFICATE-----\n" + X1_PEM, id="after a broken block"
        ),
        pytest.param(b"\xff\xfe\n" + X1_PEM, id="after bytes that are not text"),
    ],
)
def test_x1_is_found_in_a_system_store_when_certifi_does_not_contain_it(
    system: Callable[..., dict[str, Path]], pem: bytes
) -> None:
    paths = system(Absent=None, Empty=b"", Present=pem)
    anchor = find_isrg_root_x1()
    assert anchor.sha256 == neon_async.ISRG_ROOT_X1_SHA256
    assert anchor.source == f"Present ({paths['Present']})"


def test_x1_is_found_in_a_folder_of_certificates(system: Callable[..., dict[str, Path]]) -> None:
    folder = system(Android=None)["Android"]
    (folder / "00000000.0").mkdir(parents=True)
    (folder / "11111111.0").write_bytes(LOOK_ALIKE.pem)
    (folder / "22222222.0").write_bytes(b"\x00\x01 no certificate")
    (folder / "33333333.0").symlink_to(folder / "nowhere")
    (folder / "6187b673.0").write_bytes(X1_PEM + b"Certificate:\n    Data:\n")
    anchor = find_isrg_root_x1()
    assert (anchor.sha256, anchor.source) == (neon_async.ISRG_ROOT_X1_SHA256, f"Android ({folder})")


def test_certifi_is_searched_first(system: Callable[..., dict[str, Path]]) -> None:
    system(X1_PEM, Debian=X1_PEM)
    assert find_isrg_root_x1().source.startswith("certifi (")


@pytest.mark.parametrize(
    ("bundle", "stores"),
    [
        pytest.param(WITHOUT_X1, {"Debian": WITHOUT_X1}, id="others only"),
        pytest.param(LOOK_ALIKE.pem, {"Debian": LOOK_ALIKE.pem}, id="a look-alike with another key"),
        pytest.param(None, {"Debian": None}, id="no store at all"),
        pytest.param(b"", {}, id="nothing"),
        pytest.param(X1_PEM.replace(b"CERTIFICATE", b"TRUSTED CERTIFICATE"), {}, id="in OpenSSL's own format"),
    ],
)
def test_a_failed_search_for_x1_names_every_place_and_is_not_cached(
    system: Callable[..., dict[str, Path]], bundle: bytes | None, stores: dict[str, bytes | None]
) -> None:
    paths = system(bundle, **stores)
    for _ in range(2):
        with pytest.raises(neon_async.ConfigurationError, match="ISRG Root X1 was not found") as caught:
            find_isrg_root_x1()
        assert all(str(path) in str(caught.value) for path in (certifi.where(), *paths.values()))
    system(X1_PEM)
    assert find_isrg_root_x1().sha256 == neon_async.ISRG_ROOT_X1_SHA256


# sslrootcert


def test_a_sslrootcert_that_contains_x1_is_used(tmp_path: Path) -> None:
    path = tmp_path / "roots.pem"
    path.write_bytes(WITHOUT_X1 + X1_PEM)
    anchor = find_isrg_root_x1(str(path))
    assert (anchor.sha256, anchor.source) == (neon_async.ISRG_ROOT_X1_SHA256, f"sslrootcert ({path})")


@pytest.mark.parametrize(
    ("pem", "found"),
    [
        pytest.param(ROOT.pem, "1 certificate, which is not ISRG Root X1", id="a private root"),
        pytest.param(LOOK_ALIKE.pem, "1 certificate, which is not ISRG Root X1", id="an X1 look-alike"),
        pytest.param(WITHOUT_X1, f"{len(BUNDLE) - 1} certificates, none of them ISRG Root X1", id="all roots but X1"),
    ],
)
def test_a_sslrootcert_with_other_roots_only_is_insecure_and_refused(tmp_path: Path, pem: bytes, found: str) -> None:
    path = tmp_path / "roots.pem"
    path.write_bytes(pem)
    with pytest.raises(neon_async.InsecureConfigurationError, match=f"contains {found}"):
        find_isrg_root_x1(str(path))


def folder_of_odd_files(path: Path) -> None:
    path.mkdir()
    (path / "kmsg").symlink_to("/proc/kmsg")
    os.mkfifo(path / "fifo")
    make_huge(path / "huge")


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(lambda path: None, id="missing"),
        pytest.param(Path.touch, id="empty"),
        pytest.param(Path.mkdir, id="an empty folder"),
        pytest.param(lambda path: path.write_bytes(b"garbage"), id="garbage"),
        pytest.param(lambda path: path.symlink_to(path), id="a link to itself"),
        pytest.param(lambda path: path.write_bytes(LEAF.key_pem), id="a key"),
        pytest.param(lambda path: path.symlink_to("/proc/kmsg"), id="the kernel's log"),
        pytest.param(lambda path: path.symlink_to("/dev/zero"), id="a device without an end"),
        pytest.param(os.mkfifo, id="a FIFO"),
        pytest.param(make_huge, id="3 GB"),
        pytest.param(folder_of_odd_files, id="a folder of such files"),
    ],
)
def test_a_sslrootcert_without_a_certificate_is_refused(tmp_path: Path, make: Callable[[Path], object]) -> None:
    path = tmp_path / "roots.pem"
    make(path)
    with pytest.raises(neon_async.ConfigurationError, match="cannot be read or contains no certificate") as caught:
        find_isrg_root_x1(str(path))
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        pytest.param(make_huge, "larger than 16 MiB", id="3 GB"),
        pytest.param(os.mkfifo, "not a regular file", id="a FIFO"),
        pytest.param(lambda path: None, "No such file", id="missing"),
    ],
)
def test_a_sslrootcert_or_a_trust_anchor_that_cannot_be_read_is_refused_with_the_reason(
    tmp_path: Path, make: Callable[[Path], object], reason: str
) -> None:
    path = tmp_path / "roots.pem"
    make(path)
    for use in (find_isrg_root_x1, load_trust_anchor):
        with pytest.raises(neon_async.ConfigurationError, match=reason):
            use(str(path))


def test_the_kernels_log_is_no_trust_anchor() -> None:
    with pytest.raises(neon_async.ConfigurationError, match="contains no certificate"):
        load_trust_anchor("/proc/kmsg")


def test_a_folder_is_read_up_to_the_limit_of_one_file(tmp_path: Path) -> None:
    (tmp_path / "a.pem").write_bytes(X1_PEM + b"\0" * (16 << 20))  # too large, although it contains X1
    with pytest.raises(neon_async.ConfigurationError, match="contains no certificate"):
        find_isrg_root_x1(str(tmp_path))
    (tmp_path / "b.pem").write_bytes(X1_PEM)
    assert find_isrg_root_x1(str(tmp_path)).sha256 == neon_async.ISRG_ROOT_X1_SHA256


def test_sslrootcert_system_searches_the_system_stores_without_certifi(system: Callable[..., dict[str, Path]]) -> None:
    paths = system(X1_PEM, Debian=X1_PEM)
    assert find_isrg_root_x1("system").source == f"Debian ({paths['Debian']})"
    find_isrg_root_x1.cache_clear()
    system(X1_PEM, Debian=WITHOUT_X1)
    with pytest.raises(neon_async.ConfigurationError, match="was not found") as caught:
        find_isrg_root_x1("system")
    assert "cacert.pem" not in str(caught.value)


def test_sslrootcert_system_does_not_read_a_file_of_that_name(
    system: Callable[..., dict[str, Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    system(WITHOUT_X1)
    monkeypatch.chdir(tmp_path)
    Path("system").write_bytes(X1_PEM)
    with pytest.raises(neon_async.ConfigurationError, match="was not found"):
        find_isrg_root_x1("system")


# trust_anchor


class AnchorPath(os.PathLike[str]):
    def __init__(self, path: Path) -> None:
        self._path = path

    def __fspath__(self) -> str:
        return str(self._path)


@pytest.mark.parametrize(
    "pass_as",
    [
        pytest.param(lambda path: ROOT.pem, id="PEM bytes"),
        pytest.param(lambda path: ROOT.pem.decode(), id="PEM text"),
        pytest.param(lambda path: "Subject: root\n" + ROOT.pem.decode(), id="PEM text with a comment"),
        pytest.param(str, id="path as text"),
        pytest.param(lambda path: path, id="Path"),
        pytest.param(AnchorPath, id="PathLike"),
    ],
)
def test_a_trust_anchor_is_accepted_in_every_form(
    tmp_path: Path, pass_as: Callable[[Path], neon_async.AnchorSource]
) -> None:
    path = tmp_path / "root.pem"
    path.write_bytes(ROOT.pem)
    source = pass_as(path)
    anchor = load_trust_anchor(source)
    assert anchor.der == ROOT.der
    assert anchor.sha256 == hashlib.sha256(ROOT.der).hexdigest()
    assert anchor.subject == "CN=root"
    names_path = not isinstance(source, bytes) and "BEGIN" not in str(source)
    assert anchor.source == (f"trust_anchor {str(path)!r}" if names_path else "trust_anchor")


def one_block(*ders: bytes) -> bytes:
    return ssl.DER_cert_to_PEM_cert(b"".join(ders)).encode()


NO_PEM = "must be PEM bytes, PEM text or a path, not "
NO_CA = issue(subject="root", also=[(x509.BasicConstraints(False, None), True)])


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        pytest.param(WITHOUT_X1, f"contains {len(BUNDLE) - 1} certificates; .* at most 10 roots", id="a bundle"),
        pytest.param(LEAF.pem + ROOT.pem, "contains more than self-signed CA", id="leaf and root"),
        pytest.param(ROOT.pem + INTERMEDIATE.pem, "contains more than self-signed CA", id="root and intermediate"),
        pytest.param(LEAF.pem, "not a self-signed CA certificate", id="a leaf"),
        pytest.param(INTERMEDIATE.pem, "not a self-signed CA certificate", id="an intermediate"),
        pytest.param(NO_CA.pem, "not a self-signed CA certificate", id="self-signed without being a CA"),
        pytest.param(
            one_block(ROOT.der, OTHER_ROOT.der), "not a self-signed CA certificate", id="two roots in one block"
        ),
        pytest.param(one_block(ROOT.der[:-10]), "not a self-signed CA certificate", id="cut off"),
        pytest.param(one_block(b"garbage"), "not a self-signed CA certificate", id="a block of garbage"),
        pytest.param(b"", "contains no certificate", id="empty"),
        pytest.param(b"garbage", "contains no certificate", id="garbage"),
        pytest.param(ROOT.der, "contains no certificate", id="DER"),
        pytest.param(LEAF.key_pem, "contains no certificate", id="a key"),
        pytest.param(revocation_list(ROOT), "contains no certificate", id="a CRL"),
        pytest.param(b"/etc/ssl/cert.pem", "contains no certificate", id="a path as bytes"),
        pytest.param("", "cannot be read", id="empty text"),
        pytest.param("/nowhere/root.pem", "cannot be read: No such file", id="missing file"),
        pytest.param("/", "cannot be read: not a regular file", id="a folder"),
        pytest.param("a\0b", "cannot be read: not a path", id="NUL in the path"),
        pytest.param("a" * 5000, "cannot be read: File name too long", id="a path that is too long"),
        pytest.param("\ud800", "cannot be read", id="a surrogate as path"),
        pytest.param(bytearray(ROOT.pem), NO_PEM, id="bytearray"),
        pytest.param(17, NO_PEM, id="a file descriptor"),
        pytest.param(True, NO_PEM, id="True"),
        pytest.param(False, NO_PEM, id="False"),
        pytest.param([ROOT.pem], NO_PEM, id="a list"),
    ],
)
def test_anything_but_one_or_a_few_roots_is_refused_as_trust_anchor(
    source: neon_async.AnchorSource, reason: str
) -> None:
    for use in (
        load_trust_anchor,
        lambda source: neon_async.create_ssl_context(trust_anchor=source),
        lambda source: neon_async.create_pool("postgresql://u:s3cret@db.example.com/d", trust_anchor=source),
        lambda source: neon_async.connect("postgresql://u:s3cret@db.example.com/d", trust_anchor=source),
    ):
        with pytest.raises(neon_async.ConfigurationError, match=reason) as caught:
            use(source)
        assert_secret_free(caught.value, "s3cret", "BEGIN PRIVATE KEY-----\n")


def test_several_roots_are_all_trusted_and_a_repeated_one_counts_once() -> None:
    anchor = load_trust_anchor(ROOT.pem + OTHER_ROOT.pem + ROOT.pem)
    assert [root.der for root in anchor.roots] == [ROOT.der, OTHER_ROOT.der]
    assert str(anchor) == "CN=root, from trust_anchor; CN=other root, from trust_anchor"
    context = neon_async.create_ssl_context(trust_anchor=ROOT.pem + OTHER_ROOT.pem)
    assert_policy(context, ROOT.der, OTHER_ROOT.der)
    for leaf in (LEAF, issue(OTHER_ROOT)):
        assert handshake(context, serve(leaf))[0].version() == "TLSv1.3"
    with pytest.raises(ssl.SSLCertVerificationError):
        handshake(context, serve(issue(issue(subject="root", ca=True))))


# The roots of Let's Encrypt

PUBLISHED = Path(__file__).parents[1] / "data" / "letsencrypt"
FILES = ("gen-y_root-ye", "gen-y_root-yr", "isrg-root-x2", "isrgrootx1")
ALL_FOUR = b"".join((PUBLISHED / f"{name}.pem").read_bytes() for name in FILES)
NAMES = ["ISRG Root X1", "ISRG Root X2", "Root YR", "Root YE"]


def test_the_set_of_lets_encrypts_roots_is_what_is_published() -> None:
    published = {cert.fingerprint(hashes.SHA256()).hex(): cert for cert in x509.load_pem_x509_certificates(ALL_FOUR)}
    assert [root.name for root in LETS_ENCRYPT_ROOTS] == NAMES
    for root in LETS_ENCRYPT_ROOTS:
        certificate = published[root.sha256]
        identifier = certificate.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
        assert f"CN={root.name}" in certificate.subject.rfc4514_string()
        assert root.key_identifier == identifier.digest.hex()
        if root.name != "ISRG Root X1":  # which root programs remove before it expires
            assert root.ends == certificate.not_valid_after_utc


def test_nothing_in_the_set_of_lets_encrypts_roots_ends_within_a_year() -> None:
    # If this fails, the set needs new roots, and users a release that has them.
    assert [root.name for root in LETS_ENCRYPT_ROOTS if root.ends - NOW < 365 * DAY] == []


def test_the_set_of_roots_shows_its_names() -> None:
    assert repr(LETS_ENCRYPT_ROOTS) == "<KnownRoots ISRG Root X1, ISRG Root X2, Root YR, Root YE>"


def test_the_roots_of_lets_encrypt_are_found_by_their_fingerprints_in_every_place(
    system: Callable[..., dict[str, Path]], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    ye, yr, _x2, x1 = ((PUBLISHED / f"{name}.pem").read_bytes() for name in FILES)
    paths = system(WITHOUT_X1 + x1, Debian=yr + x1 + LOOK_ALIKE.pem)
    own = tmp_path / "own.pem"
    own.write_bytes(LEAF.pem + ye)
    anchor = load_trust_anchor(LETS_ENCRYPT_ROOTS, str(own))
    assert [root.sha256 for root in anchor.roots] == [root.sha256 for root in LETS_ENCRYPT_ROOTS]
    assert [root.source.split(" ")[0] for root in anchor.roots] == ["certifi", "certifi", "Debian", "sslrootcert"]
    assert caplog.text == ""
    only_system = load_trust_anchor(LETS_ENCRYPT_ROOTS, "system")
    assert caplog.text.count("not trusted: ISRG Root X2, Root YE. Name a PEM file with sslrootcert=") == 1
    assert [root.source for root in only_system.roots] == [f"Debian ({paths['Debian']})"] * 2
    context = neon_async.create_ssl_context(trust_anchor=LETS_ENCRYPT_ROOTS)
    assert_policy(context, *(root.der for root in load_trust_anchor(LETS_ENCRYPT_ROOTS).roots))


def test_a_root_that_was_missing_is_found_once_it_is_there(
    system: Callable[..., dict[str, Path]], tmp_path: Path
) -> None:
    system(X1_PEM)
    own = tmp_path / "own.pem"
    own.write_bytes((PUBLISHED / "isrg-root-x2.pem").read_bytes())
    assert len(load_trust_anchor(LETS_ENCRYPT_ROOTS, str(own)).roots) == 2
    own.write_bytes(ALL_FOUR)  # as the error for a chain that needs another one advises
    assert len(load_trust_anchor(LETS_ENCRYPT_ROOTS, str(own)).roots) == 4


def test_a_search_for_lets_encrypts_roots_that_finds_none_says_what_to_do(
    system: Callable[..., dict[str, Path]], tmp_path: Path
) -> None:
    system(ROOT.pem)
    with pytest.raises(neon_async.ConfigurationError, match=r"None of ISRG Root X1, .* was found\. Upgrade certifi"):
        load_trust_anchor(LETS_ENCRYPT_ROOTS)
    path = tmp_path / "other.pem"
    path.write_bytes(ROOT.pem)
    system(X1_PEM)
    with pytest.raises(neon_async.ConfigurationError, match=r"other.pem' cannot be read or contains none of ISRG"):
        load_trust_anchor(LETS_ENCRYPT_ROOTS, str(path))


def test_the_roots_of_lets_encrypt_can_be_named_together_with_a_sslrootcert_and_in_code_only(tmp_path: Path) -> None:
    path = tmp_path / "roots.pem"
    path.write_bytes(ALL_FOUR)
    dsn = "postgresql://u:p@db.example.com/d"
    pool = neon_async.create_pool(dsn, trust_anchor=LETS_ENCRYPT_ROOTS, sslrootcert=path)
    assert len(pool._connector.anchor.roots) == 4
    with pytest.raises(neon_async.InsecureConfigurationError, match="trust_anchor"):
        neon_async.create_pool(f"{dsn}?trust_anchor=LETS_ENCRYPT_ROOTS")


def test_a_leaf_hidden_after_the_root_in_one_block_is_refused() -> None:
    # OpenSSL continues after the first certificate, and get_ca_certs() returns only the CAs among them.
    with pytest.raises(neon_async.ConfigurationError):
        neon_async.create_ssl_context(trust_anchor=one_block(ROOT.der, LEAF.der))


def test_the_error_for_an_unreadable_trust_anchor_names_the_path_and_the_reason(tmp_path: Path) -> None:
    path = tmp_path / "root.pem"
    with pytest.raises(neon_async.ConfigurationError) as caught:
        load_trust_anchor(path)
    assert str(caught.value) == f"trust_anchor {str(path)!r} cannot be read: No such file or directory."


def test_trust_anchor_and_sslrootcert_together_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "roots.pem"
    path.write_bytes(X1_PEM)
    with pytest.raises(neon_async.ConfigurationError, match="trust_anchor and sslrootcert are both given"):
        neon_async.create_pool("postgresql://u:p@db.example.com/d", trust_anchor=ROOT.pem, sslrootcert=str(path))


@pytest.mark.parametrize("channel", ["DSN", "environment"])
def test_a_trust_anchor_wins_over_a_sslrootcert_in_dsn_or_environment(
    channel: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The anchor comes from code; the file that the DSN or the environment names is read only when there is no anchor.
    path = tmp_path / "roots.pem"
    path.write_bytes(OTHER_ROOT.pem)
    dsn = "postgresql://u:p@db.example.com/d"
    if channel == "DSN":
        dsn += f"?sslrootcert={path}"
    else:
        monkeypatch.setenv("PGSSLROOTCERT", str(path))
    with pytest.raises(neon_async.InsecureConfigurationError, match="which is not ISRG Root X1"):
        neon_async.create_pool(dsn)
    pool = neon_async.create_pool(dsn, trust_anchor=ROOT.pem)
    assert pool._connector.anchor.der == ROOT.der


# The survey


def test_the_survey_lists_every_place(system: Callable[..., dict[str, Path]], tmp_path: Path) -> None:
    paths = system(WITHOUT_X1, Debian=X1_PEM + ROOT.pem, Alpine=None, Empty=b"")
    places = {place.name: place for place in survey()}
    assert list(places) == ["certifi", "Debian", "Alpine", "Empty", "Windows"]
    assert places["certifi"] == _trust.Place("certifi", str(tmp_path / "cacert.pem"), len(BUNDLE) - 1, False)
    assert places["Debian"] == _trust.Place("Debian", str(paths["Debian"]), 2, True)
    assert places["Alpine"] == _trust.Place("Alpine", str(paths["Alpine"]), None, False)
    assert places["Empty"] == _trust.Place("Empty", str(paths["Empty"]), 0, False)
    assert (places["Windows"].certificates is None) == (sys.platform != "win32")


def test_the_survey_of_this_system_finds_x1_in_certifi() -> None:
    places = {place.name: place for place in survey()}
    assert places["certifi"].found
    assert places["certifi"].certificates == len(BUNDLE)
    assert {"Debian, Ubuntu, Gentoo", "CentOS, Fedora, RedHat", "openSUSE", "Alpine, macOS", "Android"} < set(places)
    assert Path(places["certifi"].location).is_file()


def test_x1_has_not_expired() -> None:
    assert X1.not_valid_after_utc > NOW


def test_the_fingerprint_covers_every_byte_of_a_block() -> None:
    # X1 with anything after it is not X1: nothing can be smuggled in under the known fingerprint.
    smuggled = base64.encodebytes(X1_DER + OTHER_ROOT.der)
    pem = b"-----BEGIN CERTIFICATE-----\n" + smuggled + b"-----END CERTIFICATE-----\n"
    ders = _trust._pem_to_der(pem)
    assert [hashlib.sha256(der).hexdigest() == neon_async.ISRG_ROOT_X1_SHA256 for der in ders] == [False]
