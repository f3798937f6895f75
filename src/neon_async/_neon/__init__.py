"""What is Neon's: names of endpoints, texts of errors, and the SQL that needs a session.

Pure. Knows no parameters, no connections and no asyncpg.
"""
