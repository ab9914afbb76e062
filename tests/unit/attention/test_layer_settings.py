"""The settings of layers, against Megatron-Core's own reading of them."""

from types import SimpleNamespace

import pytest
from megatron.core.transformer.utils import is_layer_window_attention

from megatron_prefix.attention.layer_settings import features_of, layer_windows, softcap_of


@pytest.mark.parametrize("kinds", [None, 1, 2, 3, 9, [1, 0, 1, 1, 0], [True, False] * 2 + [True]])
@pytest.mark.parametrize("window", [None, (0, 0), (7, 0)])
def test_the_layers_with_a_window_are_those_of_megatron_core(window, kinds):
    config = SimpleNamespace(num_layers=5, window_size=window, window_attn_skip_freq=kinds)
    theirs = [is_layer_window_attention(window, kinds, layer) for layer in range(1, 6)]
    assert layer_windows(config) == [window[0] + 1 if x else None for x in theirs]


def test_features_are_what_the_layers_need():
    plain = SimpleNamespace(window_size=None, softmax_type="vanilla")
    assert features_of(plain) == [] and softcap_of(plain) is None
    full = SimpleNamespace(window_size=(3, 0), softmax_type="off-by-one")
    full.attn_logit_softcapping = 5.0
    assert features_of(full) == ["window", "softcap", "sinks"] and softcap_of(full) == 5.0
