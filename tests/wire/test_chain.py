"""What is reported about chains: as served and as verified, missing cross-signs, and when the path to X1 ends."""

from __future__ import annotations

from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from support.certificates import DAY, NOW, Entity, issue, present
from support.handshakes import LEAF, ROOT, handshake, serve

import neon_async
from neon_async import LETS_ENCRYPT_ROOTS
from neon_async._config.roots import KnownRoot, KnownRoots
from neon_async._driver.connector import prepare
from neon_async._wire.chain import Chain, ChainFacts, path_warning, read_chain
from neon_async._wire.tls import check_handshake
from neon_async._wire.trust import fingerprint, load_trust_anchor
from neon_async.testing._impostor import SERVER_NAME, Impostor, authentication_request, login, server_context

DATA = Path(__file__).parents[1] / "data" / "letsencrypt"
CLEARTEXT = authentication_request(3)  # TLS is up, and the login is refused


def published(name: str) -> Entity:
    """Return a certificate of Let's Encrypt, with a key that is not its own."""
    certificate = x509.load_pem_x509_certificate((DATA / f"{name}.pem").read_bytes())
    return Entity(certificate, ec.generate_private_key(ec.SECP256R1()))


YR1, YE1, E8 = published("gen-y_int-yr1"), published("gen-y_int-ye1"), published("2024_e8")
YR, YE, X2, X1 = (published(name) for name in ("gen-y_root-yr", "gen-y_root-ye", "isrg-root-x2", "isrgrootx1"))
YR_BY_X1, YE_BY_X2 = published("gen-y_root-yr-by-x1"), published("gen-y_root-ye-by-x2")
X2_BY_X1 = published("gen-y_root-x2-by-x1")


def leaf_of(issuer: Entity) -> Entity:
    """Return a leaf that names `issuer` and its key. Its signature is not good."""
    identifier = issuer.certificate.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
    return issue(issuer, also=[(x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(identifier), False)])


def facts_of(served: list[Entity], *further: Entity) -> ChainFacts:
    """Return the facts about a chain of which everything that was served was used, and `further` certificates."""
    ders = tuple(entity.der for entity in served)
    return read_chain(Chain(ders, ders + tuple(entity.der for entity in further)))


@pytest.mark.parametrize(
    ("served", "root", "ends"),
    [
        pytest.param([YR1, YR_BY_X1], X1, "2030-06-04", id="YR by X1"),
        pytest.param([YE1, YE_BY_X2, X2_BY_X1], X1, "2030-06-04", id="YE by X2 by X1"),
        pytest.param([YE1, YE_BY_X2], X2, "2032-09-02", id="YE by X2, which is trusted"),
        pytest.param([YR1], YR, "2045-09-02", id="YR, which is trusted"),
    ],
)
def test_the_path_ends_with_the_first_of_its_cross_signs_and_its_root(
    served: list[Entity], root: Entity, ends: str
) -> None:
    facts = facts_of([leaf_of(served[0]), *served], root)
    assert f"{facts.path_ends:%Y-%m-%d}" == ends
    assert facts.verified[1:-1] == facts.served[1:]
    assert facts.verified[-1].subject == root.certificate.subject.rfc4514_string().replace(",", ", ")


@pytest.mark.parametrize(
    ("days", "warns"), [pytest.param(366, False, id="more than a year"), pytest.param(365, True, id="a year")]
)
def test_a_path_that_ends_within_a_year_is_a_warning(days: int, warns: bool) -> None:
    x1 = LETS_ENCRYPT_ROOTS[0]
    warning = path_warning(x1.ends, x1.sha256, x1.ends - days * DAY)
    assert ("ISRG Root X1 ends on 2030-06-04" in warning) is warns
    assert path_warning(x1.ends, "00", x1.ends) == ""  # a private root is its owner's business


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("served", "missing"),
    [
        pytest.param([YR1], "Root YR", id="YR"),
        pytest.param([YR1, YR], "Root YR", id="YR, and the root itself"),
        pytest.param([YE1], "Root YE", id="YE"),
        pytest.param([YE1, YE_BY_X2], "ISRG Root X2", id="YE with one of its two"),
        pytest.param([E8], "ISRG Root X2", id="X2"),
        pytest.param([YR1, YR_BY_X1], None, id="complete below X1"),
        pytest.param([YE_BY_X2, X2_BY_X1, YE1], None, id="complete, in another order"),
        pytest.param([YR1, YR, YR_BY_X1], None, id="complete, and the root itself"),
        pytest.param([], None, id="a leaf alone"),
    ],
)
async def test_a_served_chain_without_its_cross_sign_is_named(served: list[Entity], missing: str | None) -> None:
    leaf = leaf_of(YE1 if YE1 in served else served[0]) if served else issue(ROOT)
    advice = facts_of([leaf, *served], X1).advice
    assert advice.startswith(f"The server sends no cross-sign that leads from {missing} to") if missing else not advice
    # The same chain, refused: OpenSSL finds no issuer before it looks at a signature.
    script = login(server_context(present(leaf, *served).chain), CLEARTEXT)
    async with Impostor(script) as impostor:
        with pytest.raises(neon_async.CertificateError) as caught:
            await neon_async.connect(impostor.dsn)
    text = str(caught.value)
    assert (f"its chain ends at {missing}, and the server sent no cross-sign" in text) == bool(missing)
    assert ("trust_anchor=neon_async.LETS_ENCRYPT_ROOTS" in text) == bool(missing)


class Known:
    """A PKI like that of Let's Encrypt, whose keys are known: a root, a younger one, and a cross-sign for it."""

    def __init__(self) -> None:
        self.old, self.young = issue(subject="Old Root", ca=True), issue(subject="ISRG Root X2", ca=True)
        self.cross_sign = issue(self.old, "ISRG Root X2", ca=True, key=self.young.key)
        self.issuer = issue(self.young, "E9", ca=True)
        self.leaf = issue(self.issuer)
        self.roots = KnownRoots(self.known(root) for root in (self.old, self.young))

    def known(self, root: Entity) -> KnownRoot:
        name = root.certificate.subject.rfc4514_string().removeprefix("CN=")
        return KnownRoot(name, fingerprint(root.der), "", NOW + 900 * DAY, "https://example.com")


@pytest.mark.anyio
@pytest.mark.parametrize("crossed", [pytest.param(True, id="with cross-sign"), pytest.param(False, id="without")])
async def test_a_set_of_known_roots_connects_with_and_without_the_cross_sign(tmp_path: Path, crossed: bool) -> None:
    pki = Known()
    sent = [pki.issuer, *([pki.cross_sign] if crossed else [])]
    script = login(server_context(present(pki.leaf, *sent).chain), CLEARTEXT)
    path = tmp_path / "roots.pem"
    path.write_bytes(pki.old.pem + pki.young.pem)
    async with Impostor(script) as impostor:
        connector = prepare(impostor.dsn, trust_anchor=pki.roots, sslrootcert=path)
        with pytest.raises(neon_async.AuthenticationError, match="cleartext"):  # TLS is up
            await connector.connect()
    report = connector.tls_report
    assert report is not None
    assert [each.sha256 for each in report.served] == [fingerprint(each.der) for each in (pki.leaf, *sent)]
    assert report.chain[-1].sha256 == report.anchor_sha256 == fingerprint(pki.young.der)
    assert report.anchor == f"CN=ISRG Root X2, from sslrootcert ({path})"
    assert report.warnings == ()  # only the name is that of a root of Let's Encrypt, not the key


@pytest.mark.anyio
async def test_a_known_root_that_was_not_found_is_named_when_a_chain_needs_it(tmp_path: Path) -> None:
    pki = Known()
    path = tmp_path / "roots.pem"
    path.write_bytes(pki.old.pem)
    # Two roots of four were found, and the chain ends below a third one.
    two = KnownRoots([*pki.roots, LETS_ENCRYPT_ROOTS[0]])
    leaf = leaf_of(YR1)
    async with Impostor(login(server_context(present(leaf, YR1).chain), CLEARTEXT)) as impostor:
        with pytest.raises(
            neon_async.CertificateError, match=r"ends at Root YR, .* Root YR was not found .* sslrootcert="
        ) as caught:
            await neon_async.connect(impostor.dsn, trust_anchor=two, sslrootcert=path)
    assert "https://letsencrypt.org/certs/gen-y/root-yr.pem" in str(caught.value)


def test_a_report_shows_a_private_chain_without_a_warning() -> None:
    context = neon_async.create_ssl_context(trust_anchor=ROOT.pem)
    anchor = load_trust_anchor(ROOT.pem)
    ours, _ = handshake(context, serve())
    report = check_handshake(ours, context, server_name=SERVER_NAME, negotiation="direct", anchor=anchor).report()
    assert [each.subject for each in report.chain] == ["CN=leaf", "CN=root"]
    assert report.served == report.chain[:1]
    assert (report.path_ends, report.warnings) == (ROOT.certificate.not_valid_after_utc, ())
    assert [each.not_after for each in report.chain] == [
        LEAF.certificate.not_valid_after_utc,
        ROOT.certificate.not_valid_after_utc,
    ]


def test_a_certificate_that_cannot_be_described_does_not_hide_the_others() -> None:
    facts = read_chain(Chain((LEAF.der, b"garbage"), (LEAF.der, ROOT.der)))
    assert [each.subject for each in facts.served] == ["CN=leaf", "unreadable"]
