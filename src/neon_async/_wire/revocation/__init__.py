"""Check whether a verified chain has been revoked, by the revocation lists (CRLs) that its certificates name.

`lists` reads one list and decides whether it may be used; `download` and `disk` are where lists come from; `shard` is
one list of this process, obtained once and renewed; `check` judges a chain and watches it while connections use it. It
must not know the database: no packet goes there. `lists` needs the extra `revocation`, so that everything but `report`
is imported only where the check was asked for.
"""
