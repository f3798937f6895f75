"""Helpers that the tests share.

Helpers import `neon_async` and each other, and never a test.
"""
