"""Lazy package faces: an exported name is imported when it is first used.

For packages that are slow to import. The branch for type checkers keeps the names visible:

    if TYPE_CHECKING:
        from megatron_prefix.model.gpt import unwrap
    else:
        __getattr__ = lazy_face(__name__, gpt=["unwrap"])
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence


def lazy_face(package: str, **exports: Sequence[str]) -> Callable[[str], object]:
    """The `__getattr__` (PEP 562) of `package`: its module NAME exports the names `exports[NAME]`.

    For a module of a sub-package, write two underscores for the dot: `hf__weights=[…]`. A module
    with an empty list is exported itself.
    """
    homes = {
        name: f"{package}.{module.replace('__', '.')}"
        for module, names in exports.items()
        for name in names
    }

    def get(name: str) -> object:
        if name in exports and not exports[name]:
            return importlib.import_module(f"{package}.{name}")
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(importlib.import_module(homes[name]), name)

    return get
