"""Environment variables of OpenSSL and Python neither weaken the TLS context nor reveal its keys."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from support.certificates import issue
from support.handshakes import OTHER_ROOT, ROOT, serve
from support.hostile_child import dump
from support.probes import HANG

import neon_async
from neon_async.testing import LocalPostgres
from neon_async.testing._impostor import Impostor, authentication_request, login

pytestmark = pytest.mark.anyio

CHILD = Path(__file__).parents[1] / "support" / "hostile_child.py"


@pytest.fixture
def hostile(tmp_path: Path) -> dict[str, str]:
    """Variables with which an attacker would add a CA, weaken what is negotiated, and log the keys."""
    (tmp_path / "ca.pem").write_bytes(OTHER_ROOT.pem)
    (tmp_path / "certs").mkdir()
    (tmp_path / "certs" / "ca.pem").write_bytes(OTHER_ROOT.pem)
    (tmp_path / "openssl.cnf").write_text(
        "openssl_conf = init\n[init]\nssl_conf = ssl\n[ssl]\nsystem_default = weak\n[weak]\n"
        "MinProtocol = TLSv1\nMaxProtocol = TLSv1.3\nCipherString = ALL:eNULL:@SECLEVEL=0\n"
        "Options = UnsafeLegacyRenegotiation\n"
        f"VerifyMode = None\nVerifyCAFile = {tmp_path / 'ca.pem'}\nChainCAFile = {tmp_path / 'ca.pem'}\n"
    )
    return {
        "SSL_CERT_FILE": str(tmp_path / "ca.pem"),
        "SSL_CERT_DIR": str(tmp_path / "certs"),
        "SSLKEYLOGFILE": str(tmp_path / "keys.log"),
        "OPENSSL_CONF": str(tmp_path / "openssl.cnf"),
    }


async def run_child(*arguments: str, **environment: str) -> dict[str, Any]:
    names = {"SSL_CERT_FILE", "SSL_CERT_DIR", "SSLKEYLOGFILE", "OPENSSL_CONF"}
    clean = {name: value for name, value in os.environ.items() if name not in names}
    process = await asyncio.create_subprocess_exec(
        sys.executable, str(CHILD), *arguments, stdout=subprocess.PIPE, env=clean | environment
    )
    async with asyncio.timeout(HANG):
        output, _ = await process.communicate()
    assert process.returncode == 0
    answer: dict[str, Any] = json.loads(output)
    return answer


async def test_a_hostile_environment_changes_nothing_in_the_context(hostile: dict[str, str], tmp_path: Path) -> None:
    usual = await run_child("dump")
    under_attack = await run_child("dump", **hostile)
    # The attack is real: it changes a context without defences.
    name = "python's own options"
    assert under_attack.pop(name) != usual.pop(name)
    assert under_attack == usual
    assert usual == json.loads(json.dumps(dump(neon_async.create_ssl_context())))
    assert not (tmp_path / "keys.log").exists()


@pytest.mark.parametrize(
    "weak",
    [
        pytest.param("TLS_AES_128_CCM_8_SHA256", id="64-bit tags"),
        pytest.param("TLS_AES_128_CCM_8_SHA256:TLS_AES_256_GCM_SHA384", id="64-bit tags first"),
    ],
)
async def test_a_weak_cipher_suite_from_openssl_conf_is_refused_by_name(hostile: dict[str, str], weak: str) -> None:
    configuration = Path(hostile["OPENSSL_CONF"])
    configuration.write_text(f"{configuration.read_text()}Ciphersuites = {weak}\n")
    answer = await run_child("dump", OPENSSL_CONF=str(configuration))
    assert answer["refused"] == "InsecureConfigurationError"
    assert "the weak cipher suite TLS_AES_128_CCM_8_SHA256 is on" in answer["text"]


# The suites of TLS 1.3 that the system policies of RHEL, CentOS and Fedora set (crypto-policies, opensslcnf.config).
ALL_SUITES = "TLS_AES_256_GCM_SHA384:TLS_CHACHA20_POLY1305_SHA256:TLS_AES_128_GCM_SHA256:TLS_AES_128_CCM_SHA256"


@pytest.mark.parametrize(
    ("suites", "level"),
    [
        pytest.param(ALL_SUITES, 2, id="DEFAULT"),
        pytest.param(ALL_SUITES, 1, id="LEGACY"),
        pytest.param("TLS_AES_256_GCM_SHA384:TLS_AES_128_GCM_SHA256:TLS_AES_128_CCM_SHA256", 2, id="FIPS"),
        pytest.param("TLS_AES_128_CCM_SHA256:TLS_AES_256_GCM_SHA384", 2, id="CCM preferred"),
    ],
)
async def test_the_openssl_policy_of_a_linux_distribution_is_accepted(
    postgres: LocalPostgres, tmp_path: Path, suites: str, level: int
) -> None:
    configuration, anchor = tmp_path / "openssl.cnf", tmp_path / "root.pem"
    configuration.write_text(
        "openssl_conf = init\n[init]\nssl_conf = ssl\n[ssl]\nsystem_default = policy\n[policy]\n"
        f"CipherString = @SECLEVEL={level}:kEECDH:kRSA:kEDH:kPSK:!DES:!RC4\nCiphersuites = {suites}\n"
        "TLS.MinProtocol = TLSv1.2\nTLS.MaxProtocol = TLSv1.3\nDTLS.MinProtocol = DTLSv1.2\n"
        "SignatureAlgorithms = ECDSA+SHA256:ECDSA+SHA384:ed25519:rsa_pss_rsae_sha256:RSA+SHA256:RSA+SHA384\n"
        "Groups = X25519:secp256r1:secp384r1\n"
    )
    anchor.write_bytes(postgres.trust_anchor)
    answer = await run_child("dial", postgres.dsn, str(anchor), OPENSSL_CONF=str(configuration))
    assert (answer["ours"], answer["text"] in suites.split(":")) == ("accepted", True), answer


async def test_a_policy_that_has_nothing_in_common_with_the_server_is_named(
    postgres: LocalPostgres, tmp_path: Path
) -> None:
    configuration, anchor = tmp_path / "openssl.cnf", tmp_path / "root.pem"
    configuration.write_text(
        "openssl_conf = init\n[init]\nssl_conf = ssl\n[ssl]\nsystem_default = policy\n[policy]\nGroups = ffdhe2048\n"
    )
    anchor.write_bytes(postgres.trust_anchor)
    answer = await run_child("dial", postgres.dsn, str(anchor), OPENSSL_CONF=str(configuration))
    assert answer["ours"] == "TLSError"
    assert "in common. Check the server, and OPENSSL_CONF, the OpenSSL configuration of this system." in answer["text"]


@pytest.mark.parametrize("variables", [("SSL_CERT_FILE", "SSL_CERT_DIR", "SSLKEYLOGFILE"), ("OPENSSL_CONF",)])
async def test_a_server_of_the_hostile_ca_is_refused_in_a_hostile_environment(
    hostile: dict[str, str], variables: tuple[str, ...], tmp_path: Path
) -> None:
    anchor = tmp_path / "root.pem"
    anchor.write_bytes(ROOT.pem)
    server = serve(issue(OTHER_ROOT), OTHER_ROOT)
    async with Impostor(login(server, authentication_request(3))) as impostor:
        environment = {name: hostile[name] for name in variables}
        answer = await run_child("dial", impostor.dsn, str(anchor), **environment)
        await impostor.finish()
    assert answer["ours"] == "CertificateError"
    assert impostor.password not in answer["text"]
    assert all(impostor.password.encode() not in one.decrypted for one in impostor.conversations)
    if "SSL_CERT_FILE" in variables:  # the attack is real: Python's default context accepts, and logs its keys
        assert answer["default"] == "accepted"
        assert (tmp_path / "keys.log").read_text().count("CLIENT_HANDSHAKE_TRAFFIC_SECRET") == 1
    else:
        assert not (tmp_path / "keys.log").exists()
