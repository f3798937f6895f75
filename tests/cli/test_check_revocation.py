"""`neon-async check` shows whether the server's certificate has been revoked, and `--offline` fetches nothing."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.certificates import NOW, Entity
from support.command_line import STEPS, run
from support.crls import RevocablePKI, revocable_pki
from support.revocations import forget_everything
from support.signatures import PresentingServer, presenting_server

from neon_async._cli.check import check
from neon_async._cli.render import check_to_json


@pytest.fixture(autouse=True)
def cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return forget_everything(tmp_path, monkeypatch)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, postgres_bin_dir: str | None) -> Iterator[PresentingServer]:
    with presenting_server(tmp_path_factory.mktemp("anchor"), postgres_bin_dir) as made:
        yield made


@pytest.fixture
def pki(tmp_path: Path) -> Iterator[RevocablePKI]:
    with revocable_pki() as made:
        (tmp_path / "root.pem").write_bytes(made.root.pem)
        yield made


@pytest.fixture
def leaf(pki: RevocablePKI, server: PresentingServer) -> Entity:
    made = pki.leaf()
    server.present_chain(made, pki.issuer)
    return made


def test_check_shows_the_list_and_when_it_was_checked(
    server: PresentingServer, pki: RevocablePKI, leaf: Entity, tmp_path: Path
) -> None:
    pki.publish("/1.crl", *range(1, 8))
    finished = run("check", server.dsn, "--trust-anchor", str(tmp_path / "root.pem"))
    assert (finished.returncode, finished.stderr) == (0, "")
    shown = dict(line.strip().split(maxsplit=1) for line in finished.stdout.splitlines() if len(line.split()) > 1)
    assert (shown["status"], shown["list"], shown["entries"]) == ("good", pki.lists.url("/1.crl"), "7")
    assert shown["issuers"] == "CN=issuer, good"
    assert f"next update  {NOW.year}" in finished.stdout
    document = json.loads(run("check", "--json", server.dsn, "--trust-anchor", str(tmp_path / "root.pem")).stdout)
    assert document["revocation"]["status"] == "good"
    assert document["revocation"]["entries"] == 7
    assert [each["status"] for each in document["revocation"]["issuers"]] == ["good"]
    assert pki.lists.requests.count("/1.crl") == 1  # the second process took it from the disk


@pytest.mark.anyio
async def test_a_revoked_certificate_is_the_problem_of_the_check(
    server: PresentingServer, pki: RevocablePKI, leaf: Entity
) -> None:
    pki.publish("/1.crl", leaf)
    result = await check(server.dsn, trust_anchor=pki.root.pem)
    assert result.problem is not None
    assert (result.problem.type, result.problem.step) == ("CertificateRevokedError", "tls")
    assert result.verdict == "refused"
    # The list may come while the dial is under way, which is refused then and has no report.
    assert result.revocation is None or result.revocation.status == "revoked"
    again = await check(server.dsn, trust_anchor=pki.root.pem)  # the list is known now, and the dial is refused
    assert again.problem is not None
    assert (again.problem.type, again.problem.step) == ("CertificateRevokedError", "tls")


@pytest.mark.anyio
async def test_an_unknown_status_is_shown_and_is_no_problem_unless_the_dsn_requires_a_list(
    server: PresentingServer, pki: RevocablePKI, leaf: Entity
) -> None:
    del pki.lists.bodies["/1.crl"]
    result = await check(server.dsn, trust_anchor=pki.root.pem)
    assert result.verdict == "good"
    document: dict[str, Any] = json.loads(check_to_json(result))
    assert document["revocation"]["status"] == "unknown"
    assert "HTTP status 404" in document["revocation"]["reason"]
    required = await check(f"{server.dsn}&revocation=require", trust_anchor=pki.root.pem)
    assert required.problem is not None
    assert (required.problem.type, required.verdict) == ("RevocationUnknownError", "refused")


@pytest.mark.anyio
async def test_waiting_for_a_list_that_the_dsn_requires_is_a_part_of_the_step_tls(
    server: PresentingServer, pki: RevocablePKI, leaf: Entity
) -> None:
    result = await check(f"{server.dsn}&revocation=require", trust_anchor=pki.root.pem)
    assert result.verdict == "good"
    assert [step.name for step in result.steps] == STEPS


def test_offline_fetches_nothing_and_shows_nothing(
    server: PresentingServer, pki: RevocablePKI, leaf: Entity, tmp_path: Path
) -> None:
    arguments = ["check", "--offline", server.dsn, "--trust-anchor", str(tmp_path / "root.pem")]
    picture, document = run(*arguments), run(*arguments, "--json")
    assert (picture.returncode, picture.stderr) == (0, "")
    assert "Revocation\n" not in picture.stdout
    assert json.loads(document.stdout)["revocation"] is None
    assert pki.lists.requests == []


@pytest.mark.anyio
async def test_without_the_extra_the_check_says_what_to_install(
    server: PresentingServer, pki: RevocablePKI, leaf: Entity, monkeypatch: pytest.MonkeyPatch
) -> None:
    genuine = importlib.util.find_spec
    absent = {"cryptography", "platformdirs"}
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name in absent else genuine(name, *rest)
    )
    result = await check(server.dsn, trust_anchor=pki.root.pem)
    assert result.verdict == "good"
    assert result.revocation is not None
    assert "needs cryptography and platformdirs; run: python -m pip" in result.revocation.reason
    assert pki.lists.requests == []
    assert (await check(server.dsn, trust_anchor=pki.root.pem, offline=True)).revocation is None
