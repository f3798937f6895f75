"""The seam with asyncpg: one connection, and how it behaves.

Knows no pool: no slots, no waiters.
"""
