"""Connects with a check of revocation: what each mode refuses, what it waits for, and what it fetches."""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import gc
import http.server
import os
import time
import warnings
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from support.certificates import DAY, NOW, Entity, issue, present
from support.crls import RevocablePKI, crl, point, scope, send
from support.probes import HANG, nothing_is_left, until
from support.revocations import forget_everything, let_expire, renew, shard_on

import neon_async
from neon_async._driver.connector import Connector, prepare
from neon_async._wire.chain import Chain
from neon_async._wire.revocation import check, disk
from neon_async._wire.revocation.lists import Source
from neon_async.testing._impostor import Impostor, authentication_request, login, server_context

pytestmark = pytest.mark.anyio

Handler = http.server.BaseHTTPRequestHandler
MODES = pytest.mark.parametrize("mode", ["advise", "require"])
CLEARTEXT = authentication_request(3)


@contextlib.asynccontextmanager
async def serving(pki: RevocablePKI, leaf: Entity, *issuers: Entity) -> AsyncIterator[Impostor]:
    """Run a server that presents `leaf`; it requests the password in cleartext, which shows that TLS is up."""
    chain = present(leaf, *(issuers or (pki.issuer,))).chain
    async with Impostor(login(server_context(chain), CLEARTEXT), trust_anchor=pki.root.pem) as server:
        yield server


def connector_for(server: Impostor, mode: str, **keywords: Any) -> Connector:
    return prepare(server.dsn, trust_anchor=server.trust_anchor, revocation=mode, **keywords)


async def outcome(connector: Connector) -> Exception | None:
    """Return the error of a connect, or None where TLS is up."""
    try:
        await connector.connect()
    except neon_async.AuthenticationError:
        return None
    except neon_async.NeonAsyncError as error:
        return error
    raise AssertionError("the server asked for the password in cleartext and got it")


def status(connector: Connector) -> str | None:
    report = connector.tls_report
    return None if report is None else report.revocation.status


# ---------------------------------------------------------------------------------------------------------------------
# Verdicts


async def test_off_fetches_nothing_whatever_the_certificate_names(pki: RevocablePKI) -> None:
    leaf = pki.leaf()
    pki.publish("/1.crl", leaf)
    async with serving(pki, leaf) as server:
        connector = prepare(server.dsn, trust_anchor=server.trust_anchor)
        assert await outcome(connector) is None
        assert connector.tls_report is not None
        assert connector.tls_report.revocation == neon_async.RevocationReport("off")
    assert pki.lists.requests == []


async def test_require_waits_for_the_lists_and_connects(pki: RevocablePKI) -> None:
    pki.publish("/1.crl", *range(1, 10))
    began = datetime.datetime.now(datetime.UTC)
    async with serving(pki, pki.leaf()) as server:
        connector = connector_for(server, "require")
        assert await outcome(connector) is None
        assert await outcome(connector) is None
    assert sorted(pki.lists.requests) == ["/1.crl", "/root.crl"]
    assert connector.tls_report is not None
    report = connector.tls_report.revocation
    assert (report.status, report.reason, report.subject) == ("good", "", "CN=leaf")
    assert (report.list_url, report.entries, report.next_update) == (pki.lists.url("/1.crl"), 9, NOW + 9 * DAY)
    assert report.checked_at is not None
    assert began <= report.checked_at <= datetime.datetime.now(datetime.UTC)
    (issuer,) = report.issuers
    assert (issuer.status, issuer.subject, issuer.list_url) == ("good", "CN=issuer", pki.lists.url("/root.crl"))


async def test_require_refuses_what_has_been_revoked(pki: RevocablePKI) -> None:
    leaf = pki.leaf()
    pki.publish("/1.crl", leaf)
    async with serving(pki, leaf) as server:
        error = await outcome(connector_for(server, "require"))
    assert type(error) is neon_async.CertificateRevokedError
    assert not neon_async.is_retryable(error)
    assert "it has been revoked, according to " + pki.lists.url("/1.crl") in str(error)


@MODES
async def test_a_revoked_intermediate_is_refused_in_both_modes(pki: RevocablePKI, mode: str) -> None:
    pki.publish_root(pki.issuer)
    release = pki.lists.hold("/root.crl")
    async with serving(pki, pki.leaf()) as server:
        connector = connector_for(server, mode)
        if mode == "require":
            release.set()
            error = await outcome(connector)
        else:
            assert await outcome(connector) is None
            release.set()
            await until(lambda: status_of_issuer(connector) == "revoked")
            error = await outcome(connector)
    assert type(error) is neon_async.CertificateRevokedError
    assert "The certificate CN=issuer in the chain of" in str(error)


def status_of_issuer(connector: Connector) -> str | None:
    report = connector.tls_report
    return report.revocation.issuers[0].status if report is not None else None


async def test_advise_does_not_wait_and_refuses_once_the_verdict_is_there(pki: RevocablePKI) -> None:
    leaf = pki.leaf()
    pki.publish("/1.crl", leaf)
    release = pki.lists.hold("/1.crl")
    async with serving(pki, leaf) as server:
        connector = connector_for(server, "advise")
        assert await outcome(connector) is None  # although the list is not there
        assert status(connector) == "pending"
        release.set()
        await until(lambda: status(connector) == "revoked")
        assert type(await outcome(connector)) is neon_async.CertificateRevokedError


# ---------------------------------------------------------------------------------------------------------------------
# Lists that cannot be used


def answer(code: int, *headers: tuple[str, str]) -> Callable[[Handler], None]:
    def respond(handler: Handler) -> None:
        handler.send_response(code)
        for name, value in (*headers, ("Content-Length", "0")):
            handler.send_header(name, value)
        handler.end_headers()

    return respond


def too_long(handler: Handler) -> None:
    send(handler, b"", length=71_000_000)


def published(pki: RevocablePKI, **changes: Any) -> None:
    pki.publish("/1.crl", **changes)


SPOILED: list[Any] = [
    pytest.param(lambda pki: published(pki, next_update=NOW), "expired at", id="expired"),
    pytest.param(lambda pki: published(pki, last_update=NOW + DAY), "from the future", id="from the future"),
    pytest.param(
        lambda pki: pki.lists.bodies.update({"/1.crl": crl(pki.root, also=[(scope(pki.lists.url("/1.crl")), True)])}),
        "of another issuer",
        id="by the wrong issuer",
    ),
    pytest.param(
        lambda pki: published(pki, also=[(scope(pki.lists.url("/2.crl"), users=True), True)]),
        "another shard",
        id="for another shard",
    ),
    pytest.param(lambda pki: published(pki, key=pki.root.key), "forged signature", id="forged"),
    pytest.param(
        lambda pki: published(
            pki, also=[(scope(pki.lists.url("/1.crl"), users=True), True), (x509.DeltaCRLIndicator(1), True)]
        ),
        "is a delta",
        id="delta",
    ),
    pytest.param(
        lambda pki: pki.lists.bodies.update({"/1.crl": pki.lists.bodies["/1.crl"][:-5]}), "truncated", id="truncated"
    ),
    pytest.param(lambda pki: pki.lists.bodies.update({"/1.crl": too_long}), "larger than 70 MB", id="71 MB"),
    pytest.param(
        lambda pki: pki.lists.bodies.update({"/1.crl": answer(302, ("Location", "/root.crl"))}),
        "was answered with HTTP status 302",
        id="redirect",
    ),
    pytest.param(lambda pki: pki.lists.bodies.pop("/1.crl"), "was answered with HTTP status 404", id="404"),
    pytest.param(
        lambda pki: pki.lists.bodies.update({"/1.crl": answer(500)}), "was answered with HTTP status 500", id="500"
    ),
]


@MODES
@pytest.mark.parametrize(("spoil", "reason"), SPOILED)
async def test_a_list_that_cannot_be_used_is_unknown(
    pki: RevocablePKI, mode: str, spoil: Callable[[RevocablePKI], None], reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    leaf = pki.leaf()
    spoil(pki)
    async with serving(pki, leaf) as server:
        connector = connector_for(server, mode)
        error = await outcome(connector)
        if mode == "require":
            assert type(error) is neon_async.RevocationUnknownError
            assert neon_async.is_retryable(error)
            assert reason in str(error)
            assert pki.lists.url("/1.crl") in str(error)
        else:
            assert error is None
            await until(lambda: status(connector) == "unknown")
            for _ in range(3):
                assert await outcome(connector) is None
            assert connector.tls_report is not None
            assert reason in connector.tls_report.revocation.reason
    assert caplog.text.count(reason) == 1


@MODES
@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        pytest.param({}, "unknown", id="for a month"),
        pytest.param({"not_after": NOW + 5 * DAY}, "short-lived", id="for six days"),
        pytest.param({"also": [(point("ldap://c.example.com/1"), False)]}, "unknown", id="by LDAP only"),
    ],
)
async def test_a_leaf_without_a_list_is_unknown_unless_it_is_short_lived(
    pki: RevocablePKI, mode: str, changes: dict[str, Any], expected: str, caplog: pytest.LogCaptureFixture
) -> None:
    leaf = pki.leaf(None, **changes)
    async with serving(pki, leaf) as server:
        connector = connector_for(server, mode)
        for _ in range(3):
            error = await outcome(connector)
            assert type(error) is (
                neon_async.RevocationUnknownError if (mode, expected) == ("require", "unknown") else type(None)
            )
            assert "names no list" in (str(error) if error else "names no list")
    if connector.tls_report is not None:
        assert connector.tls_report.revocation.status == expected
        assert "names no list" in connector.tls_report.revocation.reason
    assert caplog.text.count("names no list") == 1


async def test_an_intermediate_whose_list_cannot_be_fetched_is_unknown_and_one_that_names_none_is_not_checked(
    pki: RevocablePKI,
) -> None:
    silent = issue(pki.root, "silent", ca=True)
    leaf = issue(silent, also=[(point(pki.lists.url("/s.crl")), False)])
    pki.lists.bodies["/s.crl"] = crl(silent, also=[(scope(pki.lists.url("/s.crl")), True)])
    async with serving(pki, leaf, silent) as server:
        connector = connector_for(server, "require")
        assert await outcome(connector) is None
        assert connector.tls_report is not None
        assert connector.tls_report.revocation.issuers == ()
    del pki.lists.bodies["/root.crl"]
    async with serving(pki, pki.leaf()) as server:
        error = await outcome(connector_for(server, "require"))
    assert type(error) is neon_async.RevocationUnknownError
    assert "The certificate CN=issuer in the chain" in str(error)


async def test_a_list_that_comes_back_is_fetched_again_after_a_pause(pki: RevocablePKI) -> None:
    leaf = pki.leaf()
    body = pki.lists.bodies.pop("/1.crl")
    async with serving(pki, leaf) as server:
        connector = connector_for(server, "require")
        assert type(await outcome(connector)) is neon_async.RevocationUnknownError
        one = shard_on(pki)
        pause = one.state.retry_at - time.monotonic()
        one.state = one.state._replace(retry_at=time.monotonic() + HANG)
        pki.lists.bodies["/1.crl"] = body
        for _ in range(3):  # within the pause
            assert type(await outcome(connector)) is neon_async.RevocationUnknownError
        assert pki.lists.requests.count("/1.crl") == 1
        one.state = one.state._replace(retry_at=time.monotonic())
        assert await outcome(connector) is None
        assert pki.lists.requests.count("/1.crl") == 2
    assert pause <= 1


async def test_a_list_on_the_disk_that_is_due_is_used_while_the_next_one_is_fetched(
    pki: RevocablePKI, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    leaf = pki.leaf()
    pki.publish("/1.crl", last_update=NOW - 20 * DAY)
    async with serving(pki, leaf) as server:
        assert await outcome(connector_for(server, "require")) is None
        os.utime(disk._path(shard_on(pki).source), (0, 1.0))  # so old that it is time to renew
        forget_everything(tmp_path, monkeypatch)  # a restart
        release = pki.lists.hold("/1.crl")
        try:
            connector = connector_for(server, "require")
            assert await outcome(connector) is None
            assert status(connector) == "good"
            assert shard_on(pki).is_busy
        finally:
            release.set()


async def test_a_list_that_does_not_come_is_waited_for_until_connect_timeout(pki: RevocablePKI) -> None:
    leaf = pki.leaf()
    release = pki.lists.hold("/1.crl")
    async with serving(pki, leaf) as server:
        connector = connector_for(server, "require", connect_timeout=0.5)
        try:
            error = await outcome(connector)
        finally:
            release.set()
    assert type(error) is neon_async.ConnectTimeoutError
    assert "the revocation list of its certificate had not arrived" in str(error)


async def test_a_connect_that_is_cancelled_while_it_waits_leaves_nothing_open(pki: RevocablePKI) -> None:
    leaf = pki.leaf()
    release = pki.lists.hold("/1.crl")
    async with serving(pki, leaf) as server:
        connector = connector_for(server, "require")
        steps: list[str] = []
        connecting = asyncio.ensure_future(connector.connect(on_step=steps.append))
        await until(lambda: "revocation" in steps)
        connecting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await connecting
        release.set()
        async with nothing_is_left():
            assert await outcome(connector) is None
    assert pki.lists.requests.count("/1.crl") == 1  # the cancelled connect's, which the next one used


@MODES
async def test_what_has_been_revoked_stays_revoked_when_the_list_has_expired(pki: RevocablePKI, mode: str) -> None:
    leaf = pki.leaf()
    pki.publish("/1.crl", leaf)
    async with serving(pki, leaf) as server:
        connector = connector_for(server, mode)
        async with asyncio.timeout(HANG):
            while type(await outcome(connector)) is not neon_async.CertificateRevokedError:
                await asyncio.sleep(0.01)
        pki.lists.bodies.clear()
        let_expire(shard_on(pki))
        assert shard_on(pki).current is None
        assert type(await outcome(connector)) is neon_async.CertificateRevokedError


# ---------------------------------------------------------------------------------------------------------------------
# The watch


class User:
    """Something that uses a chain."""


async def judged(pki: RevocablePKI, leaf: Entity) -> check.ChainCheck:
    chain = (leaf.der, pki.issuer.der, pki.root.der)
    return await check.Checker("require", "db.example.com").judge(Chain(chain[:2], chain), lambda: None)


def listeners(of: check.ChainCheck) -> int:
    return sum(len(each.listeners) for each in of.shards)


def watches(of: check.ChainCheck) -> int:
    return sum(len(each._watches) for each in of._chain.renewals.values())


async def test_a_watch_ends_with_its_user_or_when_it_is_stopped(pki: RevocablePKI) -> None:
    watched = await judged(pki, pki.leaf())
    user, other = User(), User()
    watched.watch(user, lambda _, error: None)
    stopped = watched.watch(other, lambda _, error: None)
    assert (listeners(watched), watches(watched)) == (2, 2)
    del user
    assert (listeners(watched), watches(watched)) == (2, 1)
    stopped.stop()
    assert (listeners(watched), watches(watched)) == (0, 0)
    again = watched.watch(other, lambda _, error: None)
    stopped.stop()
    assert (listeners(watched), watches(watched)) == (2, 1)
    again.stop()
    assert (listeners(watched), watches(watched)) == (0, 0)


async def test_all_connections_on_a_chain_share_one_renewal_and_each_is_told(pki: RevocablePKI) -> None:
    leaf, seen = pki.leaf(), list[User]()
    one, other = await judged(pki, leaf), await judged(pki, leaf)
    users = [User() for _ in range(50)]
    for number, user in enumerate(users):
        (one, other)[number % 2].watch(user, lambda user, error: seen.append(user))
    assert (listeners(one), watches(one)) == (2, 50)
    pki.publish("/1.crl", leaf)
    renew(shard_on(pki))
    await until(lambda: len(seen) == len(users))
    assert {*seen} == {*users}
    assert (listeners(one), watches(one)) == (0, 0)


async def test_a_callback_that_fails_keeps_no_other_connection_in_use(pki: RevocablePKI) -> None:
    leaf, seen = pki.leaf(), list[User]()
    watched = await judged(pki, leaf)
    errors: list[object] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: errors.append(context["exception"]))

    def fail(_: User, error: Exception) -> None:
        raise ValueError("a callback")

    users = [User() for _ in range(10)]
    for number, user in enumerate(users):
        watched.watch(user, fail if number % 2 else lambda user, error: seen.append(user))
    pki.publish("/1.crl", leaf)
    renew(shard_on(pki))
    await until(lambda: len(seen) == len(errors) == 5)


async def test_a_watch_that_has_ended_is_freed_without_the_garbage_collector(pki: RevocablePKI) -> None:
    watched, user = await judged(pki, pki.leaf()), User()
    gc.collect()
    gc.disable()
    before = [each for each in gc.get_objects() if isinstance(each, check.Watch)]
    try:
        for _ in range(3):
            watched.watch(user, lambda _, error: None).stop()
        watched.watch(user, lambda _, error: None)
        del user
        await asyncio.sleep(0)
        assert [each for each in gc.get_objects() if isinstance(each, check.Watch)] == before
    finally:
        gc.enable()


async def test_a_watch_reports_once_also_what_is_known_when_it_begins(pki: RevocablePKI) -> None:
    leaf, user, seen = pki.leaf(), User(), list[Exception]()
    watched = await judged(pki, leaf)
    watched.watch(user, lambda _, error: seen.append(error))
    pki.publish("/1.crl", leaf)
    for each in watched.shards:
        disk._path(each.source).unlink()
        each.state = each.state._replace(renew_at=0.0)
        each.refresh()
    await until(lambda: seen)
    watched.watch(user, lambda _, error: seen.append(error))
    assert [type(error) for error in seen] == [neon_async.CertificateRevokedError] * 2
    assert listeners(watched) == 0


async def test_a_watch_whose_event_loop_has_ended_disturbs_nothing(pki: RevocablePKI) -> None:
    leaf, user = pki.leaf(), User()

    async def begin() -> check.Watch[User]:
        return (await judged(pki, leaf)).watch(user, lambda _, error: None)

    watch = await asyncio.to_thread(asyncio.run, begin())
    watched = await judged(pki, leaf)
    for each in watched.shards:
        each.state = each.state._replace(renew_at=0.0)
    watched.refresh()
    await until(lambda: not any(each.is_busy for each in watched.shards))
    watch.stop()
    assert listeners(watched) == 0


# ---------------------------------------------------------------------------------------------------------------------
# What is fetched, and what is not


async def test_two_servers_on_one_shard_share_the_list(pki: RevocablePKI) -> None:
    async with serving(pki, pki.leaf()) as one, serving(pki, pki.leaf()) as other:
        await asyncio.gather(*(outcome(connector_for(server, "require")) for server in (one, other) * 5))
    assert sorted(pki.lists.requests) == ["/1.crl", "/root.crl"]


async def test_a_chain_of_isrg_root_x1_cannot_make_the_client_fetch_from_elsewhere(pki: RevocablePKI) -> None:
    # The decision itself: a chain of the genuine root cannot be made here.
    facts = check.facts_of(pki.leaf().der, pki.issuer.der, neon_async.ISRG_ROOT_X1_SHA256)
    assert facts.source is None
    assert (facts.unchecked.status, facts.unchecked.list_url) == ("unknown", pki.lists.url("/1.crl"))
    assert "is not below c.lencr.org" in facts.unchecked.reason
    genuine = pki.leaf(None, also=[(point("http://ye1.c.lencr.org/119.crl"), False)])
    facts = check.facts_of(genuine.der, pki.issuer.der, neon_async.ISRG_ROOT_X1_SHA256)
    assert facts.source == Source("http://ye1.c.lencr.org/119.crl", pki.issuer.der, False, True)


async def test_a_certificate_that_is_its_own_anchor_needs_a_list_of_its_own(pki: RevocablePKI) -> None:
    facts = check.read((pki.root.der,))
    assert [each.unchecked.status for each in facts] == ["unknown"]


async def test_a_certificate_whose_serial_number_is_not_positive_is_unknown(pki: RevocablePKI) -> None:
    leaf = pki.leaf()
    serial_number = leaf.certificate.serial_number
    size = serial_number.bit_length() // 8 + 1
    for other in (0, -1, -serial_number):
        der = leaf.der.replace(serial_number.to_bytes(size), other.to_bytes(size, signed=True))
        assert der != leaf.der
        with warnings.catch_warnings(action="ignore"):  # cryptography's
            facts = check.facts_of(der, pki.issuer.der, "00")
        assert (facts.source, facts.unchecked.status) == (None, "unknown")


async def test_an_intermediate_whose_list_must_not_be_fetched_is_logged_once(
    pki: RevocablePKI, caplog: pytest.LogCaptureFixture
) -> None:
    url = "http:///root.crl"
    issuer = issue(pki.root, "odd", ca=True, also=[(point(url), False)])
    leaf = issue(issuer, also=[(point(pki.lists.url("/o.crl")), False)])
    pki.lists.bodies["/o.crl"] = crl(issuer, also=[(scope(pki.lists.url("/o.crl")), True)])
    async with serving(pki, leaf, issuer) as server:
        connector = connector_for(server, "advise")
        for _ in range(3):
            assert await outcome(connector) is None
        error = await outcome(connector_for(server, "require"))
    assert type(error) is neon_async.RevocationUnknownError
    assert caplog.text.count(f"CN=odd cannot be checked: the list {url} is not a URL") == 1


async def test_a_certificate_that_cannot_be_read_is_unknown() -> None:
    facts = check.read((b"garbage", b"garbage"))
    assert [each.unchecked.reason for each in facts] == ["the certificate cannot be read"]
