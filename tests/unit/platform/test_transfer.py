"""Arrays on a device have the array's values, type and shape."""

import numpy as np
import pytest

from megatron_prefix.platform import on_device

ARRAY = np.arange(12).reshape(3, 4)


@pytest.mark.parametrize(
    "array",
    [ARRAY, ARRAY.astype(np.float64), ARRAY[:, ::2], ARRAY.T, ARRAY[:0]],
    ids=["int64", "float64", "every second column", "transposed", "empty"],
)
def test_values_type_and_shape(array):
    tensor = on_device(array, "cpu")
    assert tensor.device.type == "cpu" and tensor.is_contiguous()
    assert tensor.numpy().dtype == array.dtype and np.array_equal(tensor.numpy(), array)
