"""Show a verified pool at work on a real PostgreSQL, then try every weaker setting and a row of impostor servers.

Nothing here is staged: the weaker settings lead to a server that runs and knows the password, and the impostors listen
on real sockets. A setting or server that is not refused, or is refused for another reason than its weakness, counts as
not refused. This module must not know how anything is refused. It needs the packages of the extra `demo`.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import os
import ssl
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

from rich.console import Console

from .. import AuthenticationError, InsecureConfigurationError, NeonAsyncError, TLSError, connect, create_pool
from ..testing import LocalPostgres
from ..testing._impostor import IMPOSTORS, Impostor
from .render import milliseconds, print_heading, print_wrapped

__all__ = ("demo",)

_CONNECTIONS = 5
_QUERIES = 500
_IMPOSTOR_TIMEOUT = 5.0  # seconds; an impostor that is refused only by this deadline does not count as refused


@dataclasses.dataclass(frozen=True, slots=True)
class _WeakerSetting:
    """One attempt to get a weaker connection: a parameter in the DSN, keywords, or environment variables."""

    title: str
    parameter: str = ""
    keywords: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    environment: Mapping[str, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, slots=True)
class _Finding:
    """The outcome of one attempt: whether it was refused for its weakness, and the reason that the error gives."""

    title: str
    refused: bool
    reason: str


def _weaker_settings(private_root: Path) -> tuple[_WeakerSetting, ...]:
    in_dsn = ("sslmode=disable", "sslmode=allow", "sslmode=prefer", "sslmode=require", "sslmode=verify-ca")
    others = ("channel_binding=disable", "require_auth=password", "ssl_max_protocol_version=TLSv1.2", "sslsni=0")
    context = ssl.create_default_context()
    context.check_hostname = False
    return (
        *(_WeakerSetting(parameter, parameter) for parameter in (*in_dsn, *others)),
        _WeakerSetting("sslkeylogfile=/tmp/keys", "sslkeylogfile=/tmp/keys"),
        _WeakerSetting("sslrootcert without ISRG Root X1", f"sslrootcert={quote(str(private_root))}"),
        _WeakerSetting("trust_anchor in the DSN", f"trust_anchor={quote(str(private_root))}"),
        _WeakerSetting("ssl=False", keywords={"ssl": False}),
        _WeakerSetting("ssl=an SSLContext that does not verify the name", keywords={"ssl": context}),
        _WeakerSetting("direct_tls=False", keywords={"direct_tls": False}),
        _WeakerSetting("host=/var/run/postgresql", keywords={"host": "/var/run/postgresql"}),
        _WeakerSetting("host=127.0.0.1", keywords={"host": "127.0.0.1"}),
        _WeakerSetting("two hosts", keywords={"host": "one.example.com,two.example.com"}),
        _WeakerSetting("PGSSLMODE=prefer", environment={"PGSSLMODE": "prefer"}),
    )


async def demo(console: Console) -> bool:
    """Run the demonstration and return whether the pool worked and everything weaker was refused.

    It takes a few seconds. The PG* variables of the environment are set aside while it runs.

    Args:
        console: Where the demonstration is printed.

    Raises:
        NeonAsyncError: PostgreSQL could not be started, or the pool does not work.
    """
    started = time.perf_counter()
    with _libpq_environment({}):
        async with LocalPostgres() as postgres:
            console.print(
                f"PostgreSQL on port {postgres.port} of 127.0.0.1, up in {time.perf_counter() - started:.1f} s",
                highlight=False,
            )
            await _show_pool(postgres, console)
            print_heading(console, "Weaker settings are refused before a packet is sent")
            settings = [_show(finding, console) for finding in _try_weaker_settings(postgres)]
        print_heading(console, "Impostor servers are refused")
        impostors = [_show(await _try_impostor(title, make()), console) for title, make in IMPOSTORS]
    findings = [*settings, *impostors]
    refused = sum(findings)
    console.print()
    console.print(
        f"{refused} of {len(findings)} refused ({len(settings)} weaker settings, {len(impostors)} impostors), "
        f"in {time.perf_counter() - started:.1f} s",
        style="bold green" if refused == len(findings) else "bold red",
        highlight=False,
    )
    return refused == len(findings)


@contextlib.contextmanager
def _libpq_environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Make `variables` the only PG* variables of this process for the duration of the block."""
    before = {name: value for name, value in os.environ.items() if name.startswith("PG")}
    _replace_environment(before, variables)
    try:
        yield
    finally:
        _replace_environment(variables, before)


def _replace_environment(old: Mapping[str, str], new: Mapping[str, str]) -> None:
    for name in old:
        del os.environ[name]
    os.environ.update(new)


# ---------------------------------------------------------------------------------------------------------------------
# The pool at work


async def _show_pool(postgres: LocalPostgres, console: Console) -> None:
    async with create_pool(postgres.dsn, trust_anchor=postgres.trust_anchor, max_size=_CONNECTIONS) as pool:
        started = time.perf_counter()
        await asyncio.gather(*(pool.fetchval("SELECT $1::int * 2", number) for number in range(_QUERIES)))
        seconds = time.perf_counter() - started
        # The server's own view of these connections, not ours.
        seen = await pool.fetch("""
            SELECT count(*) AS connections, version, cipher FROM pg_stat_ssl JOIN pg_stat_activity USING (pid)
            WHERE usename = current_user GROUP BY version, cipher
        """)
        version = await pool.fetchval("SHOW server_version")
        report = pool.tls_report()
    assert report is not None
    print_heading(console, "A verified pool at work")
    for name, value in (
        ("server", f"PostgreSQL {version}"),
        ("work", f"{_QUERIES} queries, {_CONNECTIONS} at a time, in {milliseconds(seconds)}"),
        *(("server sees", f"{row['connections']} connections, {row['version']}, {row['cipher']}") for row in seen),
        ("negotiation", f"{report.negotiation}, ALPN {report.alpn}"),
        ("login", str(report.mechanism)),
        ("certificate", f"{report.subject}, for {report.server_name}"),
        ("trust anchor", report.anchor),
    ):
        print_wrapped(console, value, label=f"  {name}", indent=16)


# ---------------------------------------------------------------------------------------------------------------------
# The refusals


def _try_weaker_settings(postgres: LocalPostgres) -> Iterator[_Finding]:
    with tempfile.TemporaryDirectory() as folder:
        private_root = Path(folder) / "private-root.pem"
        private_root.write_bytes(postgres.trust_anchor)
        for setting in _weaker_settings(private_root):
            yield _try_weaker_setting(setting, postgres)


def _try_weaker_setting(setting: _WeakerSetting, postgres: LocalPostgres) -> _Finding:
    dsn = f"{postgres.dsn}&{setting.parameter}" if setting.parameter else postgres.dsn
    with _libpq_environment(setting.environment):
        try:
            create_pool(dsn, **setting.keywords)
        except NeonAsyncError as error:
            return _Finding(setting.title, isinstance(error, InsecureConfigurationError), _reason(error))
    return _Finding(setting.title, False, "A pool was created.")


async def _try_impostor(title: str, impostor: Impostor) -> _Finding:
    async with impostor:
        try:
            connection = await connect(
                impostor.dsn, trust_anchor=impostor.trust_anchor, connect_timeout=_IMPOSTOR_TIMEOUT
            )
        except NeonAsyncError as error:
            refused, reason = isinstance(error, (TLSError, AuthenticationError)), _reason(error)
        else:
            connection.terminate()
            refused, reason = False, "A connection was established."
        conversations = await impostor.finish()
    password = impostor.password.encode()
    if not conversations:
        return _Finding(title, False, "No connection was tried.")
    if any(password in one.wire or password in one.decrypted for one in conversations):
        return _Finding(title, False, "The impostor received the password.")
    return _Finding(title, refused, reason)


def _reason(error: NeonAsyncError) -> str:
    """Return the first sentence of the message. The rest says what to do, which is of no use here."""
    return str(error).partition(". ")[0].removesuffix(".")


def _show(finding: _Finding, console: Console) -> bool:
    """Print one finding, and return whether it was refused."""
    word, style = ("refused", "green") if finding.refused else ("NOT REFUSED", "bold red")
    indent = len(word) + 2
    print_wrapped(console, finding.title, label=word, indent=indent, style="bold", label_style=style)
    print_wrapped(console, finding.reason, indent=indent, style="dim")
    return finding.refused
