"""Products, one file each: micro-kernels as data, and how each machine spells them."""

from __future__ import annotations

import functools
import importlib
import pkgutil

from flashtile.llvm.products.base import Product
from flashtile.llvm.products.fma import PRODUCT as FMA
from flashtile.llvm.products.pairs import PRODUCT as PAIRS
from flashtile.llvm.products.tiles import PRODUCT as TILES

__all__ = ["FMA", "PAIRS", "TILES", "Product", "known"]


@functools.cache
def known() -> dict[str, Product]:
    """Every product of this folder by name."""
    modules = (importlib.import_module(f"{__name__}.{m.name}") for m in pkgutil.iter_modules(__path__))
    return {module.PRODUCT.name: module.PRODUCT for module in modules if hasattr(module, "PRODUCT")}
