"""A server of one's own may have a name of one label, which is verified as any other name."""

from __future__ import annotations

import pytest
from cryptography import x509
from support.certificates import issue, present, root
from support.logins import PLAIN, honest_login
from support.probes import HANG
from support.verified_servers import PASSWORD, connect_to, error_from

import neon_async
from neon_async.testing._impostor import Impostor, login, server_context

pytestmark = pytest.mark.anyio


def compose_service(name: str) -> Impostor:
    """Return a server with a certificate for `name`, which its clients know as `db`."""
    presented = present(issue(root(), name, names=[x509.DNSName(name)]))
    script = login(server_context(presented.chain), honest_login(PASSWORD, offer=[PLAIN]))
    return Impostor(script, trust_anchor=presented.anchor, host="db", password=PASSWORD)


async def test_a_server_with_a_name_of_one_label_is_verified_by_that_name() -> None:
    async with compose_service("db") as server:
        connection = await connect_to(server)
        assert neon_async.connection_tls_report(connection).server_name == "db"
        connection.terminate()
        await server.finish()


@pytest.mark.parametrize("name", ["cache", "db.example.com", "*"])
async def test_another_name_is_refused(name: str) -> None:
    async with compose_service(name) as server:
        error = await error_from(server, connect_timeout=HANG)
    assert isinstance(error, neon_async.CertificateError)
    assert "The certificate of db was refused: it is for another name" in str(error)
