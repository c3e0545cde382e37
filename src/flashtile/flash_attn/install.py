"""`import flash_attn` answered by flashtile, where the real package is not there."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from types import ModuleType

from flashtile.errors import UnavailableError

VERSION = "2.8.3"  # whose functions these are
_NAMES = "flash_attn", "flash_attn.flash_attn_interface"
_SUFFIX = "+flashtile"


def install() -> None:
    """Make `import flash_attn` and `flash_attn.flash_attn_interface`, anywhere in this process, mean these functions.

    For code that imports flash-attn by its own name. Its version says "2.8.3+flashtile". Other modules of flash-attn
    (layers, losses, rotary embeddings) are not there: importing one raises ModuleNotFoundError. A second call changes
    nothing.
    Raises: UnavailableError where the real package is installed or imported, which code means then.

    >>> import flashtile.flash_attn
    >>> flashtile.flash_attn.install()
    >>> from flash_attn import flash_attn_func
    >>> flash_attn_func is flashtile.flash_attn.flash_attn_func
    True
    >>> flashtile.flash_attn.uninstall()
    """
    if _installed():
        return
    if _NAMES[0] in sys.modules or importlib.util.find_spec(_NAMES[0]) is not None:
        raise UnavailableError(
            "install: got a machine that has flash_attn, expected one without: import it, or this door"
        )
    door = importlib.import_module(__package__)
    package, interface = (ModuleType(name, door.__doc__) for name in _NAMES)
    for module in (package, interface):
        for name in door.__all__:
            if name not in ("install", "uninstall"):
                setattr(module, name, getattr(door, name))
        # find_spec, by which libraries ask whether a package is there, wants one of modules that are imported.
        module.__spec__ = importlib.util.spec_from_loader(module.__name__, None, is_package=module is package)
        sys.modules[module.__name__] = module
    package.__path__ = []
    package.__version__ = VERSION + _SUFFIX  # type: ignore[attr-defined]  # modules take any name
    package.flash_attn_interface = interface  # type: ignore[attr-defined]  # likewise


def uninstall() -> None:
    """Forget what `install` did; functions that were imported keep working."""
    if _installed():
        for name in _NAMES:
            sys.modules.pop(name, None)


def _installed() -> bool:
    return str(getattr(sys.modules.get(_NAMES[0]), "__version__", "")).endswith(_SUFFIX)
