"""Six steps of DPO in every family, packed and shared, follow a loop in plain torch."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from family_models import MODELS, make_family
from test_plain_torch import assert_followed, made_dialogue, our_run, plain_run, sets_of_dialogues

sys.path.append(str(Path(__file__).resolve().parents[2] / "tools"))

from trl_common import make_tokenizer  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")
BYTES = {"vocab_size": 258, "bos_token_id": None, "pad_token_id": 256, "eos_token_id": 257}
OFTEN = ("olmo2", "glm4")
"""Families of `make test`; the others take part in `make test-all`."""


@pytest.mark.parametrize(
    "name", [pytest.param(x, marks=[] if x in OFTEN else [pytest.mark.slow]) for x in MODELS]
)
def test_pairs_follow_the_plain_loop(name, tmp_path):
    rng = np.random.default_rng(3)
    dialogues = [made_dialogue(rng) for _ in range(8)]
    make_tokenizer(tmp_path / "hf")
    make_family(name, tmp_path / "hf", spread=0.15, **BYTES)
    plain = plain_run(tmp_path / "hf", [s for x in dialogues for s in sets_of_dialogues(x)])
    assert_followed(our_run(tmp_path / "hf", dialogues, tmp_path), plain)
