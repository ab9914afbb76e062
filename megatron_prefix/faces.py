"""Faces of packages whose import would be heavy: a name is imported when it is first used.

if TYPE_CHECKING:
    from megatron_prefix.model.gpt import unwrap
else:
    __getattr__ = lazy_face(__name__, gpt=["unwrap"])
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence


def lazy_face(package: str, **exports: Sequence[str]) -> Callable[[str], object]:
    """The `__getattr__` (PEP 562) of `package`, whose module NAME exports `exports[NAME]`.

    A module in a package of its own is written with two underscores: `hf__weights=[…]`.
    """
    homes = {
        name: f"{package}.{module.replace('__', '.')}"
        for module, names in exports.items()
        for name in names
    }

    def get(name: str) -> object:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(importlib.import_module(homes[name]), name)

    return get
