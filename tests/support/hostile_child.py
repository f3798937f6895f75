"""A child process in a hostile environment: `dump`, or `dial DSN ANCHOR`. Prints JSON.

Run by `tests/security/test_hostile_environment.py`.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import ssl
import sys
from urllib.parse import urlsplit

import neon_async


def dump(context: ssl.SSLContext) -> dict[str, object]:
    """Return every observable setting of an SSLContext."""
    return {
        "protocol": context.protocol.name,
        "versions": [context.minimum_version.name, context.maximum_version.name],
        "verify_mode": context.verify_mode.name,
        "check_hostname": context.check_hostname,
        "common_name": context.hostname_checks_common_name,
        "verify_flags": int(context.verify_flags),
        "options": int(context.options),
        "security_level": context.security_level,
        "ciphers": [cipher["name"] for cipher in context.get_ciphers()],
        "anchors": [hashlib.sha256(der).hexdigest() for der in context.get_ca_certs(binary_form=True)],
        "stored": context.cert_store_stats(),
        "keylog": context.keylog_filename,
        "post_handshake_auth": context.post_handshake_auth,
        "sni_callback": context.sni_callback is not None,
    }


async def dial(dsn: str, anchor: str) -> dict[str, object]:
    """Return the outcome of our connection, and of one with Python's own default context."""
    url = urlsplit(dsn)
    try:
        _, writer = await asyncio.open_connection(
            "127.0.0.1", url.port, ssl=ssl.create_default_context(), server_hostname=url.hostname
        )
        writer.transport.abort()
        default = "accepted"
    except ssl.SSLError as error:
        default = str(error)
    try:
        connection = await neon_async.connect(dsn, trust_anchor=anchor, connect_timeout=10)
    except neon_async.NeonAsyncError as error:
        return {"default": default, "ours": type(error).__name__, "text": str(error)}
    connection.terminate()
    return {"default": default, "ours": "accepted", "text": neon_async.connection_tls_report(connection).cipher}


def main() -> None:
    if sys.argv[1] == "dump":
        try:
            answer = dump(neon_async.create_ssl_context())
        except neon_async.NeonAsyncError as error:
            answer = {"refused": type(error).__name__, "text": str(error)}
        answer["python's own options"] = int(ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).options)
    else:
        answer = asyncio.run(dial(*sys.argv[2:]))
    sys.stdout.write(json.dumps(answer))


if __name__ == "__main__":
    main()
