"""What benchmarks of whole steps run on: drawn sets, and steps of exactly so many pairs."""

import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

sys.path.append(str(Path(__file__).resolve().parents[3] / "tools"))

import bench_sets  # noqa: E402
from bench_shapes import SETS, medians  # noqa: E402

from megatron_prefix.data.store.dataset import PreferenceDataset  # noqa: E402
from megatron_prefix.data.store.verify.checks import verify_dataset
from megatron_prefix.errors import InputError  # noqa: E402


@pytest.mark.parametrize("name", SETS)
def test_drawn_sets_have_the_published_medians(name, tmp_path):
    dataset = PreferenceDataset(bench_sets.write_like(tmp_path / "set", name, 400, 64))
    verify_dataset(dataset)
    assert dataset.manifest["counts"]["pairs"] == len(dataset) == 400
    prompts = np.asarray(dataset.response_prompts)
    responses = np.asarray(dataset.response_lengths) - prompts
    prompt, response = medians(name)
    assert np.median(prompts) == pytest.approx(prompt, rel=0.1)
    assert np.median(responses) == pytest.approx(response, rel=0.1)
    total = np.asarray(dataset.groups_num_tokens()).sum()
    assert total == prompts[::2].sum() + responses.sum(), "responses part at the prompt's end"


@pytest.mark.skipif(find_spec("trl") is None, reason="TRL is not installed: pip install trl")
def test_steps_of_an_exact_number_of_pairs():
    from bench_trl import exact_steps

    counts = np.array([6, 1, 3, 5, 2, 6, 4, 3])
    steps = exact_steps(counts, 6, 4)
    assert [counts[step].sum() for step in steps] == [6] * 4
    taken = np.concatenate(steps)
    assert len(set(taken.tolist())) == len(taken)
    with pytest.raises(InputError, match="fewer --steps"):
        exact_steps(counts, 6, 6)
