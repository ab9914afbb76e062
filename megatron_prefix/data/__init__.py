"""Preference records on their way to the model: examples, tokens, trees, data sets, steps, rows.

    read      files and data sets -> Example
    tokenize  Example -> token paths, with the token at which the loss begins
    tree.py   token paths -> PrefixTree
    build     all of the above, in worker processes -> a data set
    store     trees <-> files; store/verify checks them
    steps     which groups make a step, in which rows, on which rank
    inspect   text and pictures of a data set
    files     growing columns, checksums and work folders, for store and steps

Nothing here needs torch or Megatron-Core.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from megatron_prefix.faces import lazy_face

if TYPE_CHECKING:
    from megatron_prefix.data.build import BuildOptions, build_dataset
    from megatron_prefix.data.steps import Sampler
    from megatron_prefix.data.store import PreferenceDataset
    from megatron_prefix.data.tree import Pair, PrefixTree, ResponsePath, build_tree
else:
    __getattr__ = lazy_face(
        __name__,
        build=["BuildOptions", "build_dataset"],
        steps=["Sampler"],
        store=["PreferenceDataset"],
        tree=["Pair", "PrefixTree", "ResponsePath", "build_tree"],
    )

__all__ = [
    "BuildOptions",
    "Pair",
    "PreferenceDataset",
    "PrefixTree",
    "ResponsePath",
    "Sampler",
    "build_dataset",
    "build_tree",
]
