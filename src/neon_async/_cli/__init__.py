"""The command line `neon-async`: arguments in, facts or a demonstration out, and an exit status.

Nothing imports this package except `neon_async.__main__`. It must not know how a connection is verified or how a
pool works: it calls the packages below and shows what they return.
"""
