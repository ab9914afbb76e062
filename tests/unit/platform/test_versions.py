"""Parts of a layer spec as each version of Megatron-Core writes them."""

from functools import partial
from types import SimpleNamespace

import pytest

from megatron_prefix.platform import gradients_for_norm, submodules_of


def test_the_submodules_of_a_spec_and_of_a_partial():
    submodules = SimpleNamespace(linear_fc1="fc1")
    assert submodules_of(SimpleNamespace(submodules=submodules)) is submodules
    assert submodules_of(partial(dict, submodules=submodules)) is submodules
    with pytest.raises(KeyError):
        submodules_of(partial(dict))


def test_gradients_for_the_norm_under_both_names():
    older = SimpleNamespace(get_main_grads_for_grad_norm=lambda: ["older"])
    newer = SimpleNamespace(**vars(older), get_grads_for_grad_norm=lambda: ["newer"])
    assert gradients_for_norm(older) == ["older"] and gradients_for_norm(newer) == ["newer"]
