"""What is reported about the revocation of a chain."""

# No `from __future__ import annotations`: see `_publish()` of the facade.

from dataclasses import dataclass
from datetime import datetime

from ..._config.literals import RevocationStatus


@dataclass(frozen=True, slots=True)
class RevocationReport:
    """What is known about the revocation of one certificate.

    Attributes:
        status: `off`: not checked. `good`: not on a current list. `revoked`. `unknown`: no current list can be used.
            `pending`: a list is being obtained. `short-lived`: the certificate names no list and is valid for so few
            days that its CA need not revoke it.
        subject: The subject of the certificate, or "" where it was not checked.
        list_url: The URL of the list, or None.
        entries: The number of certificates on the list, or None without a list.
        next_update: Until when the list is valid, in UTC, or None without a list.
        checked_at: When the list was obtained and verified, in UTC, or None without a list.
        reason: Why the status is not `good`, or "".
        issuers: The same about the intermediate certificates that name a list.
    """

    __module__ = "neon_async"

    status: RevocationStatus = "off"
    subject: str = ""
    list_url: str | None = None
    entries: int | None = None
    next_update: datetime | None = None
    checked_at: datetime | None = None
    reason: str = ""
    issuers: "tuple[RevocationReport, ...]" = ()


OFF = RevocationReport()
