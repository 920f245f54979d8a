"""``python -m fusedops bench``: every speed that this project claims, measured and verified.

record: what a run is made of; timing: the clock; measure: one case; cli: the commands.
"""
