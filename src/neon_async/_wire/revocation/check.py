"""Judge a verified chain by the lists that its certificates name, and watch it while a connection uses it.

The main path is `Checker.judge()`. This module must not know sockets, logins or pools.
"""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import logging
import math
import os
import time
import weakref
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any, Final, Generic, NamedTuple, TypeVar

from ..._errors import CertificateRevokedError, RevocationUnknownError
from ..._text import escape, log
from ..chain import Chain
from ..trust import fingerprint
from .lists import Source, is_of_lets_encrypt, objection_to, read_certificate
from .report import RevocationReport
from .shard import Shard, State, shard_of

_T = TypeVar("_T")

# CA/Browser Forum, Baseline Requirements, section 1.6.1: of a subscriber certificate that is valid for at most 7 days
# its CA need not say whether it is revoked.
_SHORT_LIVED = timedelta(days=7)
# A timer that waits longer would be late where the machine was suspended meanwhile.
_LONGEST_WAIT = 3600.0
_SHORTEST_WAIT = 0.1


class Checker:
    """Checks the chains of one server.

    Args:
        mode: `require` or `advise`.
        host: The host name that was verified, for messages.
    """

    def __init__(self, mode: str, host: str) -> None:
        self._is_required = mode == "require"
        self._host = host

    async def judge(self, chain: Chain, on_wait: Callable[[], None]) -> ChainCheck:
        """Return the check of a chain that has not been revoked as far as is known.

        With `require` it waits until the lists have been obtained, which the caller bounds. Otherwise, and where the
        lists are known, it returns at once; what is due is obtained meanwhile.

        Args:
            chain: A chain that OpenSSL has verified.
            on_wait: Called before it waits.

        Raises:
            CertificateRevokedError: A certificate of the chain has been revoked.
            RevocationUnknownError: With `require`: a certificate names no list, or none that can be used.
        """
        check = ChainCheck(known(chain.verified), self._host, is_required=self._is_required)
        check.refresh()
        if self._is_required and check.is_awaited:
            on_wait()
            await check.settle()
        check.require_good()
        return check


class ChainCheck:
    """What is known about one verified chain, for the connections of one server."""

    __slots__ = ("_chain", "_host", "_is_required")

    def __init__(self, chain: KnownChain, host: str, *, is_required: bool) -> None:
        self._chain: Final = chain
        self._host: Final = host
        self._is_required: Final = is_required

    def __repr__(self) -> str:
        return f"<ChainCheck of {self._host}: {self.report().status}>"

    @property
    def shards(self) -> tuple[Shard, ...]:
        """The lists that the certificates name."""
        return self._chain.shards

    @property
    def is_awaited(self) -> bool:
        """Whether a list is being obtained without which nothing is known."""
        verdict = self._chain.verdict()
        if verdict.unknown is None or verdict.revoked is not None:
            return False
        return any(shard.is_busy and shard.current is None for shard in self._chain.shards)

    def refresh(self) -> None:
        """Obtain in the background the lists that are missing or due."""
        self._chain.refresh()

    async def settle(self) -> None:
        """Wait until each list that is missing has been obtained, or could not be."""
        changed = asyncio.Event()
        wake = functools.partial(asyncio.get_running_loop().call_soon_threadsafe, changed.set)
        self._chain.listen(wake)
        try:
            while self.is_awaited:
                await changed.wait()
                changed.clear()
        finally:
            self._chain.ignore(wake)

    def watch(self, user: _T, on_revoked: Callable[[_T, CertificateRevokedError], None]) -> Watch[_T]:
        """Keep the lists current while `user` exists, and call `on_revoked(user, error)` once the chain is revoked."""
        return Watch(self, self._chain.renewal(), user, on_revoked)

    def report(self) -> RevocationReport:
        """Return what is known now."""
        leaf, *issuers = self._chain.verdict().reports
        return dataclasses.replace(leaf, issuers=tuple(issuers))

    def require_good(self) -> None:
        """Raise the error for which the chain must not be used, if there is one.

        Raises:
            CertificateRevokedError: A certificate of it has been revoked.
            RevocationUnknownError: The check is required, and a certificate names no list, or none that can be used.
        """
        verdict = self._chain.verdict()
        if verdict.revoked is not None:
            raise self._revoked(verdict, verdict.revoked)
        if verdict.unknown is not None and self._is_required:
            raise self._unknown(verdict, verdict.unknown)

    def revoked(self) -> CertificateRevokedError | None:
        """Return the error for a chain that has been revoked, or None."""
        verdict = self._chain.verdict()
        return None if verdict.revoked is None else self._revoked(verdict, verdict.revoked)

    def _revoked(self, verdict: Verdict, report: RevocationReport) -> CertificateRevokedError:
        return CertificateRevokedError(
            f"{self._name(verdict, report)} was refused: it has been revoked, according to {report.list_url}. Do not "
            "connect; report this to the operator of the server."
        )

    def _unknown(self, verdict: Verdict, report: RevocationReport) -> RevocationUnknownError:
        return RevocationUnknownError(
            f"{self._name(verdict, report)} was refused: whether it has been revoked is unknown, and "
            f"revocation=require. {report.reason[:1].upper()}{report.reason[1:]}. Try again; check that this machine "
            "can fetch the list over HTTP, and its clock."
        )

    def _name(self, verdict: Verdict, report: RevocationReport) -> str:
        if report is verdict.reports[0]:
            return f"The certificate of {self._host}"
        return f"The certificate {report.subject} in the chain of {self._host}"


class Watch(Generic[_T]):
    """The use of a chain by one connection, until `stop()` or the connection's end."""

    __slots__ = ("_check", "_on_revoked", "_renewal", "_user")

    def __init__(
        self,
        check: ChainCheck,
        renewal: Renewal,
        user: _T,
        on_revoked: Callable[[_T, CertificateRevokedError], None],
    ) -> None:
        self._check = check
        self._renewal = renewal
        # Weak, because all lists of the process lead here.
        self._user: weakref.ref[_T] | None = weakref.ref(user, self._end)
        self._on_revoked = on_revoked
        renewal.add(self)
        self.look()

    def stop(self) -> None:
        """End the watch. It can be called again, and where the event loop is closed."""
        self._user = None
        self._renewal.discard(self)

    def look(self) -> None:
        """Call `on_revoked` and end the watch, if the chain has been revoked."""
        error = self._check.revoked()
        if error is None or self._user is None:
            return
        user = self._user()
        self.stop()
        if user is not None:
            self._on_revoked(user, error)

    def _end(self, _: object) -> None:
        self.stop()


class Renewal:
    """Keeps the lists of a chain current in one event loop, and has the connections that use the chain look at them.

    There is one for all of these connections, so that a new list costs the event loop next to nothing.
    """

    __slots__ = ("_chain", "_loop", "_timer", "_watches")

    def __init__(self, chain: KnownChain) -> None:
        self._chain = chain
        self._loop = asyncio.get_running_loop()
        self._watches: set[Watch[Any]] = set()
        self._timer: asyncio.TimerHandle | None = None  # none before the first connection and after the last one

    def add(self, watch: Watch[Any]) -> None:
        """Keep the lists current for one more connection."""
        self._watches.add(watch)
        if self._timer is None:
            self._chain.listen(self._wake)
            self._set_timer()

    def discard(self, watch: Watch[Any]) -> None:
        """Keep the lists current for the other connections only."""
        self._watches.discard(watch)
        if self._timer is not None and not self._watches:
            self._chain.ignore(self._wake)
            self._timer.cancel()
            self._timer = None
            self._chain.renewals.pop(self._loop, None)

    def _wake(self) -> None:
        """Have `_look()` called in the event loop, from another thread."""
        self._loop.call_soon_threadsafe(self._look)

    def _look(self) -> None:
        """React to what is known now, and come back when a list is due."""
        if self._timer is None:  # it has ended
            return
        if self._chain.verdict().revoked is not None:
            for watch in [*self._watches]:
                self._loop.call_soon(watch.look)
        self._timer.cancel()
        self._set_timer()

    def _set_timer(self) -> None:
        wait = min((shard.next_refresh() for shard in self._chain.shards), default=_LONGEST_WAIT)
        self._timer = self._loop.call_later(min(max(wait, _SHORTEST_WAIT), _LONGEST_WAIT), self._renew)

    def _renew(self) -> None:
        self._chain.refresh()
        self._look()


# ---------------------------------------------------------------------------------------------------------------------
# Chains


class Verdict(NamedTuple):
    """What is known about a chain, as long as its lists stay the same and none of them expires.

    Attributes:
        states: What is known about its lists.
        since: When the latest of those lists expired that have expired, in seconds since the epoch.
        until: When the first of the others expires.
        reports: What is known about each certificate, the leaf first.
        revoked: The first of them that says "revoked", or None.
        unknown: The first of them that does not say whether its certificate has been revoked, or None.
    """

    states: list[State]
    since: float
    until: float
    reports: tuple[RevocationReport, ...]
    revoked: RevocationReport | None
    unknown: RevocationReport | None


class KnownChain:
    """The certificates of one verified chain, and the lists that they name. All connections with this chain share it.

    Attributes:
        shards: The lists.
        renewals: What keeps them current, by event loop.
    """

    __slots__ = ("_facts", "_verdict", "renewals", "shards")

    def __init__(self, facts: tuple[Facts, ...]) -> None:
        self._facts = facts
        self.shards: Final = tuple(shard_of(each.source) for each in facts if each.source is not None)
        self.renewals: dict[asyncio.AbstractEventLoop, Renewal] = {}
        self._verdict = self._judge()

    def refresh(self) -> None:
        """Obtain in the background the lists that are missing or due."""
        for shard in self.shards:
            shard.refresh()

    def listen(self, listener: Callable[[], object]) -> None:
        """Have `listener` called, in another thread, each time that a list has been obtained or could not be."""
        for shard in self.shards:
            shard.listeners.add(listener)

    def ignore(self, listener: Callable[[], object]) -> None:
        """Have `listener` called no more."""
        for shard in self.shards:
            shard.listeners.discard(listener)

    def renewal(self) -> Renewal:
        """Return what keeps the lists current in the running event loop."""
        loop = asyncio.get_running_loop()
        renewal = self.renewals.get(loop)
        if renewal is None:
            renewal = self.renewals[loop] = Renewal(self)
        return renewal

    def verdict(self) -> Verdict:
        """Return what is known now."""
        verdict = self._verdict
        # Every connect comes here, and almost always nothing has changed.
        if verdict.since <= time.time() < verdict.until and verdict.states == [each.state for each in self.shards]:
            return verdict
        self._verdict = verdict = self._judge()
        return verdict

    def _judge(self) -> Verdict:
        now, states = time.time(), [each.state for each in self.shards]
        of_certificates = iter(states)
        reports = tuple(
            each.unchecked if each.source is None else report_of(each, next(of_certificates), now)
            for each in self._facts
        )
        ends = [each.current.expires_at for each in states if each.current is not None]
        return Verdict(
            states,
            since=max((end for end in ends if end <= now), default=-math.inf),
            until=min((end for end in ends if end > now), default=math.inf),
            reports=reports,
            revoked=next((each for each in reports if each.status == "revoked"), None),
            unknown=next((each for each in reports if each.status in ("pending", "unknown")), None),
        )


@functools.lru_cache(maxsize=16)  # the chains of a few servers, with their lists
def known(verified: tuple[bytes, ...]) -> KnownChain:
    """Return what is known about a verified chain, which is given in DER."""
    return KnownChain(read(verified))


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=known.cache_clear)  # the child has other lists


def report_of(facts: Facts, state: State, now: float) -> RevocationReport:
    """Return what the state of the list that a certificate names says about it.

    Args:
        facts: What the certificate says.
        state: What is known about the list.
        now: The time, in seconds since the epoch.
    """
    current, unchecked = state.current, facts.unchecked
    is_revoked = current is not None and facts.serial_number in current
    # What has been revoked stays revoked when the list that says so has expired.
    if current is None or (now >= current.expires_at and not is_revoked):
        pending = state.is_busy or not state.failures
        reason = f"the list {unchecked.list_url} {'is being fetched' if pending else state.failure}"
        return dataclasses.replace(unchecked, status="pending" if pending else "unknown", reason=reason)
    return dataclasses.replace(
        unchecked,
        status="revoked" if is_revoked else "good",
        entries=current.entries,
        next_update=current.next_update,
        checked_at=datetime.fromtimestamp(state.checked_at, UTC),
        reason="its serial number is on the list" if is_revoked else "",
    )


# ---------------------------------------------------------------------------------------------------------------------
# Certificates


class Facts(NamedTuple):
    """What a certificate says about its own revocation.

    Attributes:
        serial_number: Its serial number.
        source: The list to fetch, or None.
        unchecked: What is reported without a list.
    """

    serial_number: int
    source: Source | None
    unchecked: RevocationReport


def read(verified: tuple[bytes, ...]) -> tuple[Facts, ...]:
    """Return the facts about the leaf, and about each intermediate certificate that names a list."""
    root = fingerprint(verified[-1])
    # A server's certificate can itself be the anchor.
    leaf, *issuers = [
        facts_of(der, issuer, root) for der, issuer in zip(verified, verified[1:] or verified, strict=False)
    ]
    checked = leaf, *(each for each in issuers if each.unchecked.list_url is not None)
    for report in (each.unchecked for each in checked if each.source is None):
        log(
            logging.WARNING,
            "the revocation of the certificate %(subject)s cannot be checked: %(reason)s",
            event="revocation_unchecked",
            subject=report.subject,
            reason=report.reason,
        )
    return checked


def facts_of(der: bytes, issuer: bytes, root: str) -> Facts:
    try:
        named = read_certificate(der)
    except Exception:  # noqa: BLE001  OpenSSL is more lenient than cryptography, which has many ways to refuse
        return Facts(0, None, RevocationReport("unknown", reason="the certificate cannot be read"))
    if named.serial_number <= 0:  # against RFC 5280, section 4.1.2.2; no list is searched for it
        reason = "its serial number is not positive"
        return Facts(0, None, RevocationReport("unknown", escape(named.subject), reason=reason))
    objections = {url: objection_to(url, root) for url in named.urls}
    url = next((url for url, objection in objections.items() if not objection), None)
    report = functools.partial(RevocationReport, subject=escape(named.subject))
    if url is not None:
        is_shard = not named.is_ca and is_of_lets_encrypt(root)
        source = Source(url, issuer, for_cas=named.is_ca, must_name_url=is_shard)
        return Facts(named.serial_number, source, report("pending", list_url=url))
    for refused, objection in objections.items():
        shown = escape(refused)
        return Facts(
            named.serial_number, None, report("unknown", list_url=shown, reason=f"the list {shown} {objection}")
        )
    if named.lifetime <= _SHORT_LIVED:
        reason = "it is valid for a few days only and names no list"
        return Facts(named.serial_number, None, report("short-lived", reason=reason))
    return Facts(named.serial_number, None, report("unknown", reason="it names no list that HTTP can fetch"))
