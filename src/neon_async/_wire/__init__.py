"""Bytes: a verified TLS channel, and the login inside it.

Knows neither asyncpg nor pools.
"""
