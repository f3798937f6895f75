"""Bytes on the network: a verified TLS channel, and the login inside it.

`files` reads what parameters name; `trust` finds the trust anchor and `tls` builds the context that verifies; `chain`
reads what was verified, and `revocation` checks it. `resolver` looks names up, `tcp` orders the addresses and connects
a socket, `dial` turns it into a verified channel, and `race` does so at several addresses. `scram` computes and `login`
exchanges the messages of a login. `transport` is what a finished session writes to, and `threads` runs what blocks.
Must not know asyncpg, pools or retries.
"""
