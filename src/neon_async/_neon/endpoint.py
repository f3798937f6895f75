"""Read the name of an endpoint from a Neon host name."""

# No `from __future__ import annotations`: see `_publish()` of the facade.

import re
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Endpoint:
    """The facts in a Neon host name: `ep-<name>[-pooler][.c-<n>].<region>.<aws|azure|gcp>.neon.tech`.

    Partners of Neon offer endpoints under domains of their own: `postgres.vercel-storage.com`, `pg.koyeb.app` and
    `retooldb.com` in place of `<provider>.neon.tech`.

    Attributes:
        id: The endpoint's ID, as the Neon console and API show it.
        pooled: Whether the host name leads to Neon's PgBouncer, where each transaction may run in another session.
        region: The cloud region, such as `us-east-2`.
        provider: The cloud provider: `aws`, `azure` or `gcp`. It is `aws` for the partners, whose regions are those of
            AWS.
        direct_host: The host name of the same endpoint without PgBouncer. LISTEN, session-level locks and session
            settings need it.
    """

    id: str
    pooled: bool
    region: str
    provider: str
    direct_host: str


# The ID is a name and 6 or more digits, or 8 base-36 characters (Neon's documentation).
_ID = r"ep-[a-z0-9]+-[a-z0-9]+-[a-z0-9]{6,}"
_HOST = (
    rf"(?P<id>{_ID})(?P<pooled>-pooler)?(?:\.c-[0-9]+)?"
    r"\.(?P<region>[a-z0-9-]+)\.(?:(?P<provider>[a-z]+)\.neon\.tech|postgres\.vercel-storage\.com|pg\.koyeb\.app|"
    r"retooldb\.com)"
)


def parse_host(host: str) -> Endpoint | None:
    """Return the endpoint that `host` names, or None where `host` is not an endpoint of Neon's."""
    match = re.fullmatch(_HOST, host)
    if match is None:
        return None
    return Endpoint(
        id=match["id"],
        pooled=match["pooled"] is not None,
        region=match["region"],
        provider=match["provider"] or "aws",
        direct_host=host.replace("-pooler.", ".", 1) if match["pooled"] else host,
    )


def is_named_pooled(host: str) -> bool:
    """Return whether `host` has the name of a pooled endpoint, whatever its domain: a partner may have a new one."""
    return re.match(rf"{_ID}-pooler\.", host) is not None


def short_name(host: str, endpoint: Endpoint | None) -> str:
    """Return the name of a database in log lines: the endpoint's ID, or the host.

    Args:
        host: The host name.
        endpoint: What `parse_host()` returned for it.
    """
    return endpoint.id if endpoint else host


def direct_host(endpoint: Endpoint | None) -> str:
    """Return the host without PgBouncer in words: by its name, where that is known."""
    return "a host without PgBouncer in between" if endpoint is None else f"the direct host {endpoint.direct_host}"
