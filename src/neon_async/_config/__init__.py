"""Turn text into frozen values: a DSN, keywords and environment variables become `ConnectionParameters`, or an error.

It must not know sockets, event loops, asyncpg, or what a connection or a pool does with the values.
"""
