"""Data sets by name, and caps on what comes from outside.

>>> from oral4.data import fetch, describe, available, names
"""

from oral4.data.fetch import available, describe, fetch, names

__all__ = ["available", "describe", "fetch", "names"]
