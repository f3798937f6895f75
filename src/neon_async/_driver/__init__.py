"""The seam with asyncpg: one connection, and how it behaves.

Besides `_errors` and the pool's base class, this is the only package that imports asyncpg, and `holder` is the only
module that uses its private names. Must not know pools: no slots, no waiters.
"""
