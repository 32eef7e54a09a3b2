"""Slow reference implementations, written from the papers, that production code is tested against.

Nothing here imports ``qtool``: an oracle that shared code with what it checks could not disagree with it.
Clarity goes before speed, everything runs in float64, and sizes above a few hundred columns take seconds.
"""
