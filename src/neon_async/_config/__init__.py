"""Text in, frozen values out: DSN, keywords and environment become one `ConnectionParameters`, or one clear refusal.

Knows no socket, no event loop and no asyncpg.
"""
