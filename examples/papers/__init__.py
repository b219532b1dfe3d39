"""Small proofs of what papers about neural representations claim, run by ``python -m pyrepr.papers``.

A file a paper, ``p<number>_<word>.py``, with ``PAPER`` and ``run()``. Deterministic, offline, at most ten seconds each.
"""
