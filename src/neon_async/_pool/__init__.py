"""The pool: slots, waiters, and where connections come from.

Knows no wire formats.
"""
