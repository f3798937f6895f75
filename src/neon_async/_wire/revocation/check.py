"""Judge a verified chain by the lists that its certificates name, and watch it while a connection uses it.

The main path is `Checker.judge()`. This module must not know sockets, logins or pools.
"""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import logging
import weakref
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Final, Generic, NamedTuple, TypeVar

from ..._errors import CertificateError, CertificateRevokedError, RevocationUnknownError
from ..._text import escape, log
from ..chain import Chain
from ..trust import fingerprint
from .lists import Source, is_of_lets_encrypt, objection_to, read_certificate
from .report import RevocationReport
from .shard import shard_of

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

        With `require` it waits until the lists have been obtained, which the caller bounds. Otherwise it returns at
        once, and the lists are obtained meanwhile.

        Args:
            chain: A chain that OpenSSL has verified.
            on_wait: Called before it waits.

        Raises:
            CertificateRevokedError: A certificate of the chain has been revoked.
            RevocationUnknownError: With `require`: a certificate names no list, or none that can be used.
        """
        certificates = tuple(Certificate(facts) for facts in read(chain.verified))
        check = ChainCheck(certificates, self._host, is_required=self._is_required)
        check.refresh()
        if self._is_required and check.is_awaited:
            on_wait()
            await check.settle()
        check.require_good()
        return check


class ChainCheck:
    """The certificates of one verified chain, and the lists that they name."""

    def __init__(self, certificates: tuple[Certificate, ...], host: str, *, is_required: bool) -> None:
        self._certificates: Final = certificates
        self._host: Final = host
        self._is_required: Final = is_required
        self.shards: Final = [each.shard for each in certificates if each.shard is not None]

    def __repr__(self) -> str:
        return f"<ChainCheck of {self._host}: {self.report().status}>"

    @property
    def is_awaited(self) -> bool:
        """Whether a list is being obtained without which nothing is known."""
        return any(shard.is_awaited for shard in self.shards)

    def refresh(self) -> None:
        """Obtain in the background the lists that are missing or due."""
        for shard in self.shards:
            shard.refresh()

    async def settle(self) -> None:
        """Wait until each list that is missing has been obtained, or could not be."""
        changed = asyncio.Event()
        wake = functools.partial(asyncio.get_running_loop().call_soon_threadsafe, changed.set)
        self.listen(wake)
        try:
            while self.is_awaited:
                await changed.wait()
                changed.clear()
        finally:
            self.ignore(wake)

    def listen(self, listener: Callable[[], object]) -> None:
        """Have `listener` called, in another thread, each time that a list has been obtained or could not be."""
        for shard in self.shards:
            shard.listeners.add(listener)

    def ignore(self, listener: Callable[[], object]) -> None:
        """Have `listener` called no more."""
        for shard in self.shards:
            shard.listeners.discard(listener)

    def watch(self, user: _T, on_revoked: Callable[[_T, CertificateRevokedError], None]) -> Watch[_T]:
        """Keep the lists current while `user` exists, and call `on_revoked(user, error)` once the chain is revoked."""
        return Watch(self, user, on_revoked)

    def report(self) -> RevocationReport:
        """Return what is known now."""
        leaf, *issuers = [each.report() for each in self._certificates]
        return dataclasses.replace(leaf, issuers=tuple(issuers))

    def require_good(self) -> None:
        """Raise the error for which the chain must not be used, if there is one.

        Raises:
            CertificateRevokedError: A certificate of it has been revoked.
            RevocationUnknownError: The check is required, and a certificate names no list, or none that can be used.
        """
        error = self.revoked() or (self._unknown() if self._is_required else None)
        if error is not None:
            raise error

    def revoked(self) -> CertificateRevokedError | None:
        """Return the error for a chain that has been revoked, or None."""
        for which, report in self._named_reports():
            if report.status == "revoked":
                return CertificateRevokedError(
                    f"{which} was refused: it has been revoked, according to {report.list_url}. Do not connect; report "
                    "this to the operator of the server."
                )
        return None

    def _unknown(self) -> CertificateError | None:
        for which, report in self._named_reports():
            if report.status not in ("good", "short-lived"):
                return RevocationUnknownError(
                    f"{which} was refused: whether it has been revoked is unknown, and revocation=require. "
                    f"{report.reason[:1].upper()}{report.reason[1:]}. Try again; check that this machine can fetch the "
                    "list over HTTP, and its clock."
                )
        return None

    def _named_reports(self) -> list[tuple[str, RevocationReport]]:
        leaf, *issuers = [each.report() for each in self._certificates]
        above = [(f"The certificate {each.subject} in the chain of {self._host}", each) for each in issuers]
        return [(f"The certificate of {self._host}", leaf), *above]


class Watch(Generic[_T]):
    """Keeps the lists of one connection's chain current, in its event loop, until `stop()` or the connection's end."""

    __slots__ = ("_check", "_loop", "_on_revoked", "_timer", "_user", "_wake")

    def __init__(self, check: ChainCheck, user: _T, on_revoked: Callable[[_T, CertificateRevokedError], None]) -> None:
        self._loop = asyncio.get_running_loop()
        self._check = check
        # Weak, because all lists of the process lead here.
        self._user = weakref.ref(user, lambda _: self.stop())
        self._on_revoked: Callable[[_T, CertificateRevokedError], None] | None = on_revoked
        self._timer: asyncio.TimerHandle | None = None
        self._wake = functools.partial(self._loop.call_soon_threadsafe, self._look)
        check.listen(self._wake)
        self._look()

    def stop(self) -> None:
        """End the watch. It can be called again, and where the event loop is closed."""
        self._on_revoked = None
        self._check.ignore(self._wake)
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _look(self) -> None:
        """React to what is known now, and come back when a list is due."""
        if self._on_revoked is None:  # stopped
            return
        error = self._check.revoked()
        if error is not None:
            on_revoked, user = self._on_revoked, self._user()
            self.stop()
            if user is not None:
                on_revoked(user, error)
            return
        if self._timer is not None:
            self._timer.cancel()
        wait = min((shard.next_refresh() for shard in self._check.shards), default=_LONGEST_WAIT)
        self._timer = self._loop.call_later(min(max(wait, _SHORTEST_WAIT), _LONGEST_WAIT), self._renew)

    def _renew(self) -> None:
        self._check.refresh()
        self._look()


# ---------------------------------------------------------------------------------------------------------------------
# Certificates


class Certificate:
    """One certificate of a verified chain, and the list that covers it.

    Attributes:
        shard: The list, or None where there is none that may be fetched.
    """

    __slots__ = ("_facts", "shard")

    def __init__(self, facts: _Facts) -> None:
        self._facts = facts
        self.shard = None if facts.source is None else shard_of(facts.source)

    def report(self) -> RevocationReport:
        """Return what is known now."""
        unchecked = self._facts.unchecked
        if self.shard is None:
            return unchecked
        state = self.shard.state
        is_revoked = state.current is not None and self._facts.serial_number in state.current
        # What has been revoked stays revoked when the list that says so has expired.
        current = state.current if is_revoked else self.shard.current
        if current is None:
            pending = self.shard.is_busy or not state.failures
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


class _Facts(NamedTuple):
    """What a certificate says about its own revocation.

    Attributes:
        serial_number: Its serial number.
        source: The list to fetch, or None.
        unchecked: What is reported without a list.
    """

    serial_number: int
    source: Source | None
    unchecked: RevocationReport


@functools.lru_cache(maxsize=16)  # the chains of a few servers
def read(verified: tuple[bytes, ...]) -> tuple[_Facts, ...]:
    """Return the facts about the leaf, and about each intermediate certificate that names a list."""
    root = fingerprint(verified[-1])
    # A server's certificate can itself be the anchor.
    leaf, *issuers = [
        _facts_of(der, issuer, root) for der, issuer in zip(verified, verified[1:] or verified, strict=False)
    ]
    if leaf.source is None:
        report = leaf.unchecked
        log(
            logging.WARNING,
            "the revocation of the certificate %(subject)s cannot be checked: %(reason)s",
            event="revocation_unchecked",
            subject=report.subject,
            reason=report.reason,
        )
    return leaf, *(each for each in issuers if each.unchecked.list_url is not None)


def _facts_of(der: bytes, issuer: bytes, root: str) -> _Facts:
    try:
        named = read_certificate(der)
    except Exception:  # noqa: BLE001  OpenSSL is more lenient than cryptography, which has many ways to refuse
        return _Facts(0, None, RevocationReport("unknown", reason="the certificate cannot be read"))
    objections = {url: objection_to(url, root) for url in named.urls}
    url = next((url for url, objection in objections.items() if not objection), None)
    report = functools.partial(RevocationReport, subject=escape(named.subject))
    if url is not None:
        is_shard = not named.is_ca and is_of_lets_encrypt(root)
        source = Source(url, issuer, for_cas=named.is_ca, must_name_url=is_shard)
        return _Facts(named.serial_number, source, report("pending", list_url=url))
    for refused, objection in objections.items():
        shown = escape(refused)
        return _Facts(
            named.serial_number, None, report("unknown", list_url=shown, reason=f"the list {shown} {objection}")
        )
    if named.lifetime <= _SHORT_LIVED:
        reason = "it is valid for a few days only and names no list"
        return _Facts(named.serial_number, None, report("short-lived", reason=reason))
    return _Facts(named.serial_number, None, report("unknown", reason="it names no list that HTTP can fetch"))
