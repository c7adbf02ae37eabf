"""The few exceptions of the library, and the import that names the missing extra.

Wrong arguments raise ``ValueError`` or ``TypeError``, as everywhere in Python. Everything else that
a user can put right has one of the classes below, so that ``except OralError`` catches them all.

>>> issubclass(DataError, OralError) and issubclass(MissingExtra, ImportError)
True
"""

from __future__ import annotations

import importlib
from types import ModuleType

__all__ = ["CheckpointError", "DataError", "MissingExtra", "OralError", "require"]


class OralError(Exception):
    """Root of the errors that the library raises on purpose."""


class DataError(OralError):
    """A file or an input is missing, damaged, over a limit or not of the documented form."""


class CheckpointError(OralError):
    """A checkpoint is missing, damaged or does not fit the model."""


class MissingExtra(OralError, ImportError):
    """An optional package is not installed; an ``ImportError`` too, so that ``except ImportError`` catches it.

    Parameters
    ----------
    package : str
        The module that could not be imported.
    extra : str
        The extra of ``oral4`` which installs it.

    Examples
    --------
    >>> print(MissingExtra("pandas", "forecast"))
    This needs pandas: pip install "oral4[forecast]"
    """

    def __init__(self, package: str, extra: str):
        super().__init__(f'This needs {package}: pip install "oral4[{extra}]"')
        self.package = package
        self.extra = extra

    def __reduce__(self) -> tuple[type[MissingExtra], tuple[str, str]]:
        # The default would rebuild from the message alone; errors of worker processes travel by pickle.
        return type(self), (self.package, self.extra)


def require(module_name: str, extra: str) -> ModuleType:
    """Return the imported module, or raise :class:`MissingExtra` naming the pip line.

    An installed package that fails while it is imported keeps its own error: installing the extra
    again would not help.

    Parameters
    ----------
    module_name : str
        Absolute name, for example ``"pandas"`` or ``"PIL.Image"``.
    extra : str
        The extra of ``oral4`` which installs it.

    Raises
    ------
    MissingExtra
        If the module, or a package that holds it, is not installed.

    Examples
    --------
    >>> require("json", "forecast").dumps([1])
    '[1]'
    """
    try:
        return importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        missing = error.name or ""
        if module_name == missing or module_name.startswith(missing + "."):
            raise MissingExtra(missing, extra) from error
        raise
