"""`adapted`: CUDA calls run on CPU inside the context, and are restored after it.

Where Megatron-Core makes these calls: test_megatron_cpu.py.
"""

from types import SimpleNamespace

import pytest
import torch

from megatron_prefix.platform.megatron_cpu import _gather_unequal, _splits_as_lists, adapted, device

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="nothing is changed with CUDA")


def test_tensors_for_cuda_are_made_on_cpu():
    with adapted():
        assert torch.empty(2, device="cuda").device.type == "cpu"
        assert torch.ones(2, device=torch.device("cuda", 0)).tolist() == [1, 1]
        tensor = torch.ones(3)
        assert tensor.cuda() is tensor
        assert tensor.type() == "torch.cuda.FloatTensor" and tensor.type(torch.int64).sum() == 3
        assert torch.cuda.current_device() == torch.device("cpu")
        torch.cuda.synchronize()
        assert torch.cuda.current_stream() is None and not len(torch.cuda.get_rng_state())


def test_everything_is_restored_also_after_nesting_and_an_error():
    before = torch.cuda.current_device, torch.cuda.synchronize, torch.cuda.get_rng_state
    with pytest.raises(KeyError), adapted():
        with adapted():
            assert torch.empty(1, device="cuda").device.type == "cpu"
        assert torch.empty(1, device="cuda").device.type == "cpu"
        raise KeyError("inside")
    after = torch.cuda.current_device, torch.cuda.synchronize, torch.cuda.get_rng_state
    assert before == after and torch.ones(1).type() == "torch.FloatTensor"
    with pytest.raises((RuntimeError, AssertionError)):
        torch.empty(1, device="cuda")


def test_split_sizes_become_lists_at_their_point_only():
    dispatcher = SimpleNamespace(
        cuda_dtoh_point="before_ep", input_splits=torch.tensor([1, 2]), output_splits=None
    )
    assert _splits_as_lists(dispatcher, "before_permutation", "counts") == "counts"
    assert isinstance(dispatcher.input_splits, torch.Tensor)
    _splits_as_lists(dispatcher, "before_ep")
    assert dispatcher.input_splits == [1, 2] and dispatcher.output_splits is None


def test_parts_of_equal_length_are_gathered_by_megatron_core():
    calls = []
    alone = SimpleNamespace(size=lambda: 1)
    for group, sizes in ((alone, [3]), (SimpleNamespace(size=lambda: 2), None)):
        _gather_unequal(lambda *given: calls.append(given), "part", group, sizes)
    assert calls == [("part", alone, [3], False), ("part", calls[1][1], None, False)]


def test_this_process_computes_on_cpu():
    assert device() == torch.device("cpu")
