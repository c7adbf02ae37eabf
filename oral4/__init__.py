"""Six papers on sequence modelling, derived, implemented, tested and measured.

``import oral4`` is light: a submodule is imported when it is first asked for.
"""

__version__ = "0.1.0"


def __getattr__(name):
    """Import the submodule ``name``, so that ``import oral4; oral4.settings`` works."""
    import importlib

    if not name.startswith("_"):
        try:
            return importlib.import_module(f"{__name__}.{name}")
        except ModuleNotFoundError as error:
            if error.name != f"{__name__}.{name}":  # it is there, but something it needs is not
                raise
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__():
    import pkgutil

    return sorted({*globals(), *(module.name for module in pkgutil.iter_modules(__path__))})
