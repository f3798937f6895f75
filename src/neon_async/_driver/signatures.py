"""The types of the calls on connections and pools, for type checkers alone: they stand in `signatures.pyi`.

A stub, because overloads need no bodies there. Knows no behaviour.
"""
