"""What is specific to Neon: endpoint names, error texts, and which SQL needs a session.

Pure: text in, values out. Must not know parameters, connections, the event loop or asyncpg.
"""
