"""The checks that CUDA is put to, on CPU, so that they themselves are known to work."""

import pytest
import torch
from device_checks import (
    LORA,
    MODELS,
    assert_follows,
    assert_learns,
    check_alone,
    check_hf,
    trained,
    write_decided_set,
)

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="test_numerics_cuda.py has it")


@pytest.fixture(scope="module")
def decided(tmp_path_factory) -> str:
    return write_decided_set(tmp_path_factory.mktemp("decided") / "set")


@pytest.mark.parametrize(
    "model",
    [{}, {"dtype": "bfloat16"}, {"kind": "reward"}, MODELS["chunked head"]],
    ids=["float32", "bfloat16", "reward", "chunked head"],
)
def test_layouts(decided, tmp_path, model):
    changed = {key: x for key, x in model.items() if key in ("kind", "dtype")}
    expected = trained(tmp_path / "none", decided, "none", **changed)
    assert_learns(expected)
    metrics = trained(tmp_path / "tree", decided, "tree", **model)
    assert_follows(metrics, expected, model.get("dtype", "float32"))
    assert metrics[0]["tokens/executed"] < expected[0]["tokens/executed"]
    with pytest.raises(AssertionError):
        assert_follows(metrics[::-1], expected, model.get("dtype", "float32"))


def test_adapters(decided, tmp_path):
    expected = trained(tmp_path / "none", decided, "none", LORA)
    assert_learns(expected)
    assert_follows(trained(tmp_path / "tree", decided, "tree", LORA), expected, "float32")


def test_alone(world):
    check_alone(world, "path", **MODELS["chunked head"])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_hf(decided, tmp_path, dtype):
    check_hf(tmp_path, decided, dtype=dtype)
