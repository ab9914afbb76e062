"""A run is checked before it is built."""

from __future__ import annotations

import pytest
from tiny_models import tiny_config

from megatron_prefix.data.store.dataset import PreferenceDataset
from megatron_prefix.data.store.writer import DatasetWriter
from megatron_prefix.data.tokenize.tokenizers import load_tokenizer
from megatron_prefix.errors import InputError
from megatron_prefix.testing import write_random_set
from megatron_prefix.train.setup import prepare_trainer


@pytest.fixture(scope="module")
def prefix(tmp_path_factory) -> str:
    return write_random_set(tmp_path_factory.mktemp("setup") / "set", 0, 6)


def refused(config, world, valid=None) -> str:
    with pytest.raises(InputError) as error:
        prepare_trainer(config, PreferenceDataset(config.data.train), valid, world)
    return str(error.value)


def test_data_sets_of_two_tokenizers_are_refused(world, prefix, tmp_path):
    other_ids = {"name": "other", "fingerprint": "ab" * 32, "vocabulary": "cd" * 32}
    described = load_tokenizer("bytes").describe() | other_ids
    dataset = PreferenceDataset(prefix)
    with DatasetWriter(tmp_path / "other", described) as writer:
        writer.add(dataset[0], 0)
        writer.finish()
    other = PreferenceDataset(tmp_path / "other")
    message = refused(tiny_config(prefix, tmp_path / "run"), world, {"": other})
    assert "has tokenizer other" in message and "build all data sets with one" in message


def test_a_warm_up_longer_than_the_run_is_refused(world, prefix, tmp_path):
    optimizer = {"lr": 1e-3, "lr_decay_style": "cosine", "lr_warmup_steps": 2}
    train = {"steps": None, "epochs": 1}
    data = {"global_batch_size": 3}
    config = tiny_config(prefix, tmp_path, optimizer=optimizer, train=train, data=data)
    assert "lr_warmup_steps = 2 does not end within the run's 2 steps" in refused(config, world)


@pytest.mark.parametrize("setting", ["logging.output", "train.save"])
def test_a_directory_that_cannot_be_written_is_refused(world, prefix, tmp_path, setting):
    (tmp_path / "file").write_text("not a directory")
    path = str(tmp_path / "file" / "run")
    section, key = setting.split(".")
    sections = {section: {key: path, **({"steps": 2} if section == "train" else {})}}
    message = refused(tiny_config(prefix, tmp_path / "run", **sections), world)
    assert message.startswith(f"{setting} = {path}: ") and "can be written" in message


def test_a_trainer_is_ready_for_its_first_step(world, prefix, tmp_path, capsys):
    train = {"steps": 2, "load": str(tmp_path / "absent")}
    config = tiny_config(prefix, tmp_path / "run", train=train)
    trainer = prepare_trainer(config, PreferenceDataset(prefix), None, world)
    trainer.close()
    assert (trainer.step, trainer.num_steps, trainer.valid) == (0, 2, {})
    printed = capsys.readouterr().out
    assert "steps: 2, " in printed and "starting from scratch" in printed
    assert (tmp_path / "run" / "config.yaml").exists()
