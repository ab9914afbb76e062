"""What a pass over mismatches has that needs no model."""

import pytest
import torch

from megatron_prefix.train.mismatches import mean_kl


@pytest.mark.parametrize(
    ("logratios", "kl"), [([0.5, -0.1], 0.2), ([-0.5, 0.1], 0.0), ([], 0.0), ([0.3], 0.3)]
)
def test_the_kl_of_mismatches_is_at_least_zero(logratios, kl):
    """A step may have none."""
    value = mean_kl(torch.tensor(logratios, dtype=torch.float64))
    assert value.shape == () and value.dtype == torch.float64
    assert float(value) == pytest.approx(kl, abs=1e-15)
