"""Products, one file each: micro-kernels as data, and how each machine spells them."""

from __future__ import annotations

import functools
import importlib
import pkgutil

from flashtile.llvm.products.base import Product
from flashtile.llvm.products.fma import PRODUCT as FMA
from flashtile.llvm.products.pairs import PRODUCT as PAIRS
from flashtile.llvm.products.squares import PRODUCT as SQUARES
from flashtile.llvm.products.tiles import IN_THREE as TILES3
from flashtile.llvm.products.tiles import IN_TWO as TILES2
from flashtile.llvm.products.tiles import PRODUCT as TILES

__all__ = ["FMA", "PAIRS", "SQUARES", "TILES", "TILES2", "TILES3", "Product", "known"]


@functools.cache
def known() -> dict[str, Product]:
    """Every product of this folder by name."""
    modules = (importlib.import_module(f"{__name__}.{m.name}") for m in pkgutil.iter_modules(__path__))
    return {product.name: product for module in modules for product in getattr(module, "PRODUCTS", ())}
