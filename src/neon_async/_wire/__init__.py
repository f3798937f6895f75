"""Bytes on the network: a verified TLS channel, and the login inside it.

`files` reads what parameters name; `trust` finds the trust anchor and `tls` builds the context that verifies; `tcp`
connects a socket and `dial` turns it into a verified channel; `scram` computes and `login` exchanges the messages of a
login; `transport` is what a finished session writes to. Must not know asyncpg, pools or retries.
"""
