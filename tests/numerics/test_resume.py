"""Saving and resuming continue a run bit for bit, or refuse.

An interrupted run is made of a finished one: the checkpoint after step 3 becomes the newest
again, and what was written after it stays in the metrics file, as after a kill.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from small_runs import configure, lines, saved_state, timeless, trained

from megatron_prefix.checkpoint.save_load import TRACKER, iteration_dir
from megatron_prefix.checkpoint.torch_dist import CHECKSUMS
from megatron_prefix.errors import InputError
from megatron_prefix.train.run import train

pytestmark = pytest.mark.sample

STEPS, CUT = 6, 3
SCHEDULE = {
    "lr": 1e-3,
    "min_lr": 1e-5,
    "lr_decay_style": "cosine",
    "lr_warmup_steps": 2,
    "weight_decay": 0.01,
}
VARIANTS = {
    "float32": {},
    "bfloat16": {"model": {"dtype": "bfloat16"}},
    "tied, no clipping": {
        "model": {"untie_embeddings_and_output_weights": False, "add_qkv_bias": True},
        "optimizer": {**SCHEDULE, "clip_grad": 0.0},
    },
    "rows_per_step": {"data": {"global_batch_size": None, "rows_per_step": 2, "row_capacity": 120}},
    "unpacked, group": {
        "data": {"sharing": "response", "packing": False, "micro_batch_size": 20},
        "loss": {"weighting": "group"},
    },
}
PLAIN = "float32"


class Finished:
    """Finished runs by variant, evaluated and saved at steps 3 and 6, and copies cut at 3."""

    def __init__(self, folder: Path, dataset: str, valid: str) -> None:
        self.folder, self.dataset, self.valid = folder, dataset, valid
        self.known: set[str] = set()

    def config(self, output: Path, variant: str, **sections):
        """The variant's configuration, writing to `output` and saving below it."""
        given = {**VARIANTS[variant], **{k: v for k, v in sections.items() if k != "train"}}
        given["data"] = {"valid": self.valid, **given.get("data", {})}
        given.setdefault("optimizer", SCHEDULE)
        settings = {"steps": STEPS, "save": str(output / "saved"), "save_interval": CUT}
        settings = {**settings, "eval_interval": CUT, **sections.get("train", {})}
        return configure(output, self.dataset, train=settings, **given)

    def run(self, variant: str = PLAIN) -> Path:
        output = self.folder / variant
        if variant not in self.known:
            train(self.config(output, variant))
            self.known.add(variant)
        return output

    def cut(self, variant: str, output: Path) -> Path:
        """A copy of the run as it is when it was killed after step 5."""
        shutil.copytree(self.run(variant), output)
        shutil.rmtree(iteration_dir(output / "saved", STEPS))
        (output / "saved" / TRACKER).write_text(str(CUT), encoding="utf-8")
        path = output / "metrics.jsonl"
        kept = path.read_text(encoding="utf-8").splitlines(keepends=True)[:-2]
        path.write_text("".join(kept) + '{"step": 6, "loss": 0.69', encoding="utf-8")
        return output

    def resume(self, output: Path, variant: str = PLAIN, **sections) -> list[dict]:
        settings = {"load": str(output / "saved"), **sections.pop("train", {})}
        return trained(self.config(output, variant, train=settings, **sections))


@pytest.fixture(scope="module")
def finished(random_set, other_random_set, tmp_path_factory) -> Finished:
    return Finished(tmp_path_factory.mktemp("finished"), random_set, other_random_set)


def steps(rows: list[dict]) -> list[tuple[int, bool]]:
    """(step, whether it is an evaluation) of every line."""
    return [(row["step"], "eval_loss" in row) for row in rows]


ALL_STEPS = [
    *((0, True), (1, False), (2, False), (3, False), (3, True)),
    *((4, False), (5, False), (6, False), (6, True)),
]


def assert_same_tree(tree, expected, where: str) -> None:
    """Nested dictionaries and lists, tensors bit for bit."""
    assert type(tree) is type(expected), where
    if isinstance(expected, dict):
        assert tree.keys() == expected.keys(), where
        for key, value in expected.items():
            assert_same_tree(tree[key], value, f"{where}.{key}")
    elif isinstance(expected, list | tuple):
        assert len(tree) == len(expected), where
        for i, value in enumerate(expected):
            assert_same_tree(tree[i], value, f"{where}[{i}]")
    elif isinstance(expected, torch.Tensor):
        assert tree.dtype == expected.dtype and torch.equal(tree, expected), where
    else:
        assert tree == expected, where


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_resumed_run_is_the_straight_one_bit_for_bit(finished, tmp_path, variant):
    straight = lines(finished.run(variant))
    assert steps(straight) == ALL_STEPS
    output = finished.cut(variant, tmp_path / "run")
    resumed = finished.resume(output, variant)
    assert timeless(resumed) == timeless(straight)
    states = [saved_state(x / "saved", STEPS) for x in (output, finished.run(variant))]
    assert_same_tree(states[0], states[1], "state")
    tensors, _ = saved_state(output / "saved", CUT)
    moments = [name for name in tensors if "exp_avg_sq" in name]
    assert moments and all(tensors[name].any() for name in moments), "no optimizer state saved"
    assert any(not torch.equal(tensors[name], states[0][0][name]) for name in tensors)


def test_saving_changes_nothing(finished, tmp_path):
    unsaved = trained(finished.config(tmp_path, PLAIN, train={"save": None, "save_interval": None}))
    assert timeless(unsaved) == timeless(lines(finished.run()))


def test_the_reference_stays_the_original_one(finished, tmp_path):
    """Rewards continue from their values; a reference loaded from `train.load` would be at 0."""
    resumed = finished.resume(finished.cut(PLAIN, tmp_path / "run"))
    after = next(row for row in resumed if row["step"] == CUT + 1)
    assert abs(after["rewards/chosen"]) > 1e-3
    assert abs(resumed[-1]["eval_rewards/chosen"]) > 1e-3


def test_the_schedule_continues_where_it_was(finished, tmp_path):
    """Warm-up over 2 steps, then a cosine over the other 4, written out."""
    resumed = finished.resume(finished.cut(PLAIN, tmp_path / "run"))
    expected = [0.0, 5e-4] + [
        1e-5 + 0.5 * (1e-3 - 1e-5) * (1 + math.cos(math.pi * done / 4)) for done in range(4)
    ]
    rates = [row["learning_rate"] for row in resumed if "loss" in row]
    assert rates == pytest.approx(expected, rel=1e-12)


def test_a_run_can_be_made_longer(finished, tmp_path):
    """The configuration's length and rate count, not those of the run that was saved."""
    constant = {"optimizer": {"lr": 1e-3}}
    short, long = tmp_path / "short", tmp_path / "long"
    train(finished.config(short, PLAIN, train={"steps": CUT}, **constant))
    straight = trained(finished.config(long, PLAIN, **constant))
    assert timeless(finished.resume(short, **constant)) == timeless(straight)
    shutil.rmtree(short)
    train(finished.config(short, PLAIN, train={"steps": CUT}))
    resumed = finished.resume(short)
    later = [row["learning_rate"] for row in resumed if row["step"] > CUT and "loss" in row]
    rates = [row["learning_rate"] for row in lines(finished.run()) if "loss" in row]
    assert later == rates[CUT:]
    slower = finished.resume(short, optimizer={"lr": 1e-4}, train={"steps": STEPS + 1})
    assert slower[-2]["learning_rate"] == 1e-4


@pytest.mark.parametrize("exists", [False, True])
def test_an_absent_checkpoint_is_a_fresh_start_and_says_so(finished, tmp_path, capsys, exists):
    nowhere = tmp_path / "nowhere"
    if exists:
        nowhere.mkdir()
    config = finished.config(tmp_path / "run", PLAIN, train={"load": str(nowhere)})
    assert timeless(trained(config)) == timeless(lines(finished.run()))
    assert f"no checkpoint in {nowhere}: starting from scratch" in capsys.readouterr().out


def test_resuming_says_so(finished, tmp_path, capsys):
    output = finished.cut(PLAIN, tmp_path / "run")
    finished.resume(output)
    assert f"resumed from {output / 'saved'} after step {CUT}" in capsys.readouterr().out


def test_a_finished_run_has_nothing_left_to_do(finished, tmp_path):
    shutil.copytree(finished.run(), tmp_path / "run")
    assert finished.resume(tmp_path / "run") == lines(finished.run())


def assert_refused(finished: Finished, output: Path, *words: str, **sections) -> None:
    """An InputError with these words, and the earlier run's lines untouched."""
    before = (output / "metrics.jsonl").read_bytes()
    with pytest.raises(InputError) as refused:
        finished.resume(output, **sections)
    assert all(word in str(refused.value) for word in words), str(refused.value)
    assert (output / "metrics.jsonl").read_bytes() == before


def test_another_data_set_is_refused(finished, tmp_path):
    output = finished.cut(PLAIN, tmp_path / "run")
    prints = [
        json.loads(Path(f"{prefix}.json").read_text())["fingerprint"]
        for prefix in (finished.dataset, finished.valid)
    ]
    data = {"train": finished.valid, "valid": finished.valid}
    words = ("data.train fingerprint", f"{prints[0]!r} in the checkpoint", f"{prints[1]!r} now")
    assert_refused(finished, output, *words, data=data)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({"seed": 7}, ("data.seed: 1234 in the checkpoint, 7 now",)),
        ({"global_batch_size": 3}, ("data.global_batch_size: 4 in the checkpoint, 3 now",)),
        (
            {"global_batch_size": None, "rows_per_step": 2},
            (
                "data.global_batch_size: 4 in the checkpoint, None now",
                "data.rows_per_step: None in the checkpoint, 2",
            ),
        ),
    ],
    ids=["seed", "batch size", "batch mode"],
)
def test_another_order_of_the_data_is_refused(finished, tmp_path, data, words):
    assert_refused(finished, finished.cut(PLAIN, tmp_path / "run"), *words, data=data)


def test_another_reference_is_refused(finished, tmp_path):
    """Weights drawn from another seed would be another reference, silently."""
    output = finished.cut(PLAIN, tmp_path / "run")
    assert_refused(finished, output, str(output / "saved"), "reference", train={"seed": 7})
    model = {"checkpoint": str(finished.run() / "saved")}
    assert_refused(finished, output, str(output / "saved"), "reference", model=model)


def strip(directory: Path) -> None:
    """Leave what another program would have written: tensors, and nothing on their model."""
    shutil.rmtree(directory / "hf")
    os.remove(directory / CHECKSUMS)
    common = torch.load(directory / "common.pt", weights_only=True)
    kept = {key: value for key, value in common.items() if "model" not in key}
    torch.save(kept, directory / "common.pt")


@pytest.mark.parametrize(
    ("variant", "model"),
    [
        (PLAIN, {"num_layers": 3}),
        (PLAIN, {"num_layers": 1}),
        (PLAIN, {"hidden_size": 32}),
        (PLAIN, {"ffn_hidden_size": 64}),
        (PLAIN, {"add_qkv_bias": True}),
        (PLAIN, {"untie_embeddings_and_output_weights": False}),
        ("tied, no clipping", {"untie_embeddings_and_output_weights": False}),
        ("tied, no clipping", {"add_qkv_bias": True}),
    ],
    ids=["longer", "shorter", "narrower", "ffn", "bias", "tied", "no bias", "untied"],
)
@pytest.mark.parametrize("use", ["train.load", "model.checkpoint", "tensors alone"])
def test_another_model_is_refused(finished, tmp_path, variant, model, use):
    """Also one that has fewer parameters, and would lack those that the checkpoint has more."""
    saved = finished.cut(variant, tmp_path / "run") / "saved"
    section = {"load": str(saved)} if use == "train.load" else {}
    if use != "train.load":
        model = {**model, "checkpoint": str(saved)}
    if use == "tensors alone":
        strip(iteration_dir(saved, CUT))
    with pytest.raises(InputError, match=str(iteration_dir(saved, CUT))):
        train(finished.config(tmp_path / "other", PLAIN, model=model, train=section))


@pytest.mark.parametrize(
    "model",
    [{"window_size": [8, 0]}, {"attn_logit_softcapping": 5.0}, {"softmax_type": "off-by-one"}],
    ids=["window", "soft cap", "sinks"],
)
def test_another_attention_is_refused(finished, tmp_path, model):
    """It has the same parameters."""
    saved = finished.cut(PLAIN, tmp_path / "run") / "saved"
    config = finished.config(tmp_path / "other", PLAIN, model=model, train={"load": str(saved)})
    with pytest.raises(InputError, match=f"another model .*{next(iter(model))}: None in the check"):
        train(config)


def removed(name: str) -> Callable[[Path], None]:
    return lambda directory: os.remove(next(directory.glob(name)))


def truncated(name: str) -> Callable[[Path], None]:
    def damage(directory: Path) -> None:
        path = max(directory.glob(name), key=lambda p: p.stat().st_size)
        os.truncate(path, path.stat().st_size // 2)

    return damage


def flipped(name: str) -> Callable[[Path], None]:
    def damage(directory: Path) -> None:
        path = max(directory.glob(name), key=lambda p: p.stat().st_size)
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)

    return damage


def tracked(text: str) -> Callable[[Path], None]:
    return lambda directory: (directory.parent / TRACKER).write_text(text) and None


@pytest.mark.parametrize(
    "damage",
    [
        removed("metadata.json"),
        removed(".metadata"),
        removed("common.pt"),
        removed("*.distcp"),
        truncated("*.distcp"),
        truncated("common.pt"),
        truncated(".metadata"),
        flipped("*.distcp"),
        tracked("5"),
        tracked("newest"),
        tracked(""),
    ],
    ids=[
        *("no metadata.json", "no .metadata", "no common.pt", "no tensors"),
        *("half the tensors", "half of common.pt", "half of .metadata", "one bit"),
        *("step not there", "not a step", "empty tracker"),
    ],
)
def test_a_damaged_checkpoint_is_refused(finished, tmp_path, damage):
    output = finished.cut(PLAIN, tmp_path / "run")
    damage(iteration_dir(output / "saved", CUT))
    assert_refused(finished, output, str(output / "saved"))


@pytest.mark.parametrize("name", ["*.distcp", "common.pt", ".metadata"])
@pytest.mark.parametrize("damage", [removed, truncated])
def test_damage_is_found_without_checksums_too(finished, tmp_path, damage, name):
    output = finished.cut(PLAIN, tmp_path / "run")
    directory = iteration_dir(output / "saved", CUT)
    os.remove(directory / CHECKSUMS)
    damage(name)(directory)
    assert_refused(finished, output, str(directory))


def test_policy_and_reference_can_start_from_a_checkpoint(finished, tmp_path):
    """Both have its weights: held-out log-probabilities are those it was saved with."""
    source = finished.run()
    known = {row["step"]: row for row in lines(source) if "eval_loss" in row}
    for start, step in ((source / "saved", STEPS), (iteration_dir(source / "saved", CUT), CUT)):
        output = tmp_path / f"from {step}"
        model = {"checkpoint": str(start)}
        rows = trained(finished.config(output, PLAIN, model=model, train={"steps": CUT}))
        first, second = rows[0], rows[1]
        for key in ("eval_logps/chosen", "eval_logps/rejected"):
            assert first[key] == known[step][key] != known[0][key]
        assert first["eval_rewards/chosen"] == 0 and first["eval_rewards/accuracies"] == 0.5
        assert abs(second["loss"] - math.log(2)) < 1e-5 and second["step"] == 1


def test_a_run_from_a_checkpoint_resumes_with_its_reference(finished, tmp_path):
    model = {"checkpoint": str(finished.run() / "saved")}
    config = finished.config(tmp_path / "straight", PLAIN, model=model)
    straight = trained(config)
    output = tmp_path / "cut"
    shutil.copytree(tmp_path / "straight", output)
    (output / "saved" / TRACKER).write_text(str(CUT))
    assert timeless(finished.resume(output, model=model)) == timeless(straight)


@pytest.mark.parametrize("exists", [False, True])
def test_weights_that_are_not_there_are_refused(finished, tmp_path, exists):
    nowhere = tmp_path / "nowhere"
    if exists:
        nowhere.mkdir()
    with pytest.raises(InputError, match=str(nowhere)):
        train(finished.config(tmp_path / "run", PLAIN, model={"checkpoint": str(nowhere)}))
