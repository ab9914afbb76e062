"""When `plan --search` says that fewer GPUs do the same."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from megatron_prefix.estimate.fewer_gpus import fewer_gpus, fewer_line


@pytest.mark.parametrize(
    ("times", "named"),
    [
        ({4: 2.0, 2: 4.0, 1: 8.0}, None),  # steps scale: all eight are used
        ({4: 1.0, 2: 1.8, 1: 3.6}, (4, 0.5)),
        ({4: 1.04, 2: 1.05, 1: 2.0}, (2, 0.2625)),  # the fewest of equally fast ones
        ({4: 0.9, 2: 1.5, 1: 3.0}, (4, 0.45)),
        ({4: 1.4, 2: 2.9, 1: 6.0}, (4, 0.7)),
        ({4: 1.41, 2: 2.81, 1: 5.7}, None),
        ({4: 1.3, 2: 2.0, 1: 4.1}, (2, 0.5)),  # the lowest GPU-hours
        ({4: 1.0, 2: None, 1: 1.0}, (4, 0.5)),  # two do not hold the model, so one does not
        ({4: None, 2: 1.0, 1: 1.0}, None),
    ],
)
def test_equally_fast_or_much_cheaper(times, named):
    fewer = fewer_gpus(8, 1.0, times.get)
    if named is None:
        assert fewer is None
    else:
        assert (fewer["world_size"], fewer["of_the_gpu_hours"]) == pytest.approx(named)
        assert fewer["of_the_time"] == fewer["seconds_per_step"] == times[fewer["world_size"]]


def test_the_next_divisors_are_tried():
    tried: list[int] = []
    assert fewer_gpus(12, 1.0, lambda count: tried.append(count) or 12.0) is None
    assert tried == [6, 4, 3]
    assert fewer_gpus(1, 1.0, tried.index) is None


@pytest.mark.parametrize("batch", [64, None])
def test_the_line_names_the_batch(batch):
    config = SimpleNamespace(data=SimpleNamespace(global_batch_size=batch))
    fewer = {"world_size": 32, "of_the_time": 1.02, "of_the_gpu_hours": 0.51}
    line = fewer_line(64, fewer, config)
    assert line.startswith("the batch is small for 64 GPUs: on 32 a step takes 1.02 x as long, for")
    assert "51 % of the GPU-hours" in line
    assert line.endswith("data.rows_per_step" if batch is None else "data.global_batch_size")
