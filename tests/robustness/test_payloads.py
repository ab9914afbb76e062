"""Nothing that is loaded can execute code: a payload in any file is refused, and never runs.

The payload makes a directory when it is unpickled. It is planted raw, and in every wrapping that
a loader might open; checksums are left alone, removed, or computed again with the planted file.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from broken_sets import seal_plan
from commands import command, refused, write_config
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, MetadataIndex

from megatron_prefix.data.files.checksums import file_entry, manifest_digest
from megatron_prefix.data.store.columns import COLUMNS
from megatron_prefix.data.store.manifest import FILES, fingerprint, suffix_path


class Payload:
    """Unpickling it makes the directory `marker`."""

    def __init__(self, marker: Path) -> None:
        self._marker = str(marker)

    def __reduce__(self) -> tuple:
        return os.mkdir, (self._marker,)


def raw(payload: Payload) -> bytes:
    return pickle.dumps(payload)


def as_npy(payload: Payload) -> bytes:
    file = io.BytesIO()
    np.save(file, np.array([payload], object), allow_pickle=True)
    return file.getvalue()


def as_torch(payload: Payload) -> bytes:
    file = io.BytesIO()
    torch.save({"state": payload}, file)
    return file.getvalue()


@pytest.fixture
def marker(tmp_path) -> Path:
    return tmp_path / "executed"


@pytest.mark.parametrize("wrap", [raw, as_npy, as_torch])
def test_the_payload_works(marker, wrap):
    """Opened carelessly, every wrapping makes the marker: else the tests below prove nothing."""
    file = io.BytesIO(wrap(Payload(marker)))
    if wrap is raw:
        pickle.load(file)
    elif wrap is as_npy:
        np.load(file, allow_pickle=True)
    else:
        torch.load(file, weights_only=False)
    assert marker.is_dir()


def seal(prefix: Path, name: str) -> None:
    """Compute the manifest's checksums again, with a planted file."""
    path = suffix_path(prefix, ".json")
    manifest = json.loads(path.read_text())
    manifest["files"][name] = file_entry(suffix_path(prefix, name))
    manifest["fingerprint"] = fingerprint(manifest["files"], manifest["tokenizer"])
    manifest["sha256"] = manifest_digest(manifest)
    path.write_text(json.dumps(manifest))


@pytest.mark.parametrize("name", [*FILES, ".json"])
def test_a_data_set_executes_nothing(dataset, tmp_path, marker, capsys, name):
    for wrap in (raw, as_npy):
        for sealed in (False, True):
            folder = tmp_path / f"{wrap.__name__} {sealed}"
            shutil.copytree(Path(dataset).parent, folder)
            prefix = folder / "set"
            suffix_path(prefix, name).write_bytes(wrap(Payload(marker)))
            if sealed and name != ".json":
                seal(prefix, name)
            refused(["inspect", str(prefix), "--verify"], capsys, prefix)
            config = write_config(tmp_path / "run.yaml", str(prefix), tmp_path / "run")
            refused(["train", "--config", config], capsys, prefix)
            assert not marker.exists()
    assert len(FILES) == len(COLUMNS) + 2


@pytest.mark.parametrize("wrap", [raw, as_npy, as_torch])
def test_a_sidecar_executes_nothing(dataset, tmp_path, marker, capsys, wrap):
    path = tmp_path / "ref"
    path.write_bytes(wrap(Payload(marker)))
    loss = {"reference": "precomputed", "ref_logps": str(path)}
    config = write_config(tmp_path / "run.yaml", dataset, tmp_path / "run", loss=loss)
    refused(["train", "--config", config], capsys, path)
    assert not marker.exists()


def in_metadata(directory: Path, payload: Payload) -> None:
    (directory / ".metadata").write_bytes(raw(payload))


def in_metadata_state(directory: Path, payload: Payload) -> None:
    """A sound `.metadata` that holds the payload where a planner may keep anything."""
    metadata = pickle.loads((directory / ".metadata").read_bytes())
    metadata.planner_data = payload
    (directory / ".metadata").write_bytes(pickle.dumps(metadata))


def as_object(directory: Path, payload: Payload) -> None:
    """A sound `.metadata` that says a tensor is a pickled object, and the object."""
    metadata = pickle.loads((directory / ".metadata").read_bytes())
    key = next(k for k in metadata.state_dict_metadata if not k.startswith("optimizer"))
    metadata.state_dict_metadata[key] = BytesStorageMetadata()
    place = metadata.storage_data
    index = next(i for i in place if i.fqn == key)
    (directory / place[index].relative_path).write_bytes(as_torch(payload))
    place[MetadataIndex(key)] = place[index]
    (directory / ".metadata").write_bytes(pickle.dumps(metadata))


def as_further_object(directory: Path, payload: Payload) -> None:
    """An object beside the tensors, as Megatron-Core's `_extra_state` is."""
    metadata = pickle.loads((directory / ".metadata").read_bytes())
    metadata.state_dict_metadata["decoder.final_layernorm._extra_state"] = BytesStorageMetadata()
    (directory / ".metadata").write_bytes(pickle.dumps(metadata))
    (directory / "object.distcp").write_bytes(as_torch(payload))


def in_common(directory: Path, payload: Payload) -> None:
    (directory / "common.pt").write_bytes(as_torch(payload))


def raw_in_common(directory: Path, payload: Payload) -> None:
    (directory / "common.pt").write_bytes(raw(payload))


def in_tensors(directory: Path, payload: Payload) -> None:
    """In the place of every tensor, as far as it fits."""
    metadata = pickle.loads((directory / ".metadata").read_bytes())
    for place in metadata.storage_data.values():
        with (directory / place.relative_path).open("r+b") as file:
            file.seek(place.offset)
            file.write(raw(payload)[: place.length].ljust(place.length, b"\0"))


def zipped_in_tensors(directory: Path, payload: Payload) -> None:
    """Behind everything else, and `.metadata` points there."""
    metadata = pickle.loads((directory / ".metadata").read_bytes())
    for place in metadata.storage_data.values():
        with (directory / place.relative_path).open("ab") as file:
            place.offset = file.tell()
            place.length = file.write(as_torch(payload))
    (directory / ".metadata").write_bytes(pickle.dumps(metadata))


@pytest.mark.parametrize("place", ["../iter_0000001/", "/", "./"])
def test_a_checkpoint_reads_only_its_own_files(finished, dataset, tmp_path, capsys, place):
    """`.metadata` names the file of every tensor; sums of all files are right."""
    saved = tmp_path / "saved"
    shutil.copytree(finished / "saved", saved)
    directory = saved / "iter_0000002"
    metadata = pickle.loads((directory / ".metadata").read_bytes())
    for info in metadata.storage_data.values():
        elsewhere = str(directory) + "/" if place == "/" else place
        info.relative_path = f"{elsewhere}{info.relative_path}"
    (directory / ".metadata").write_bytes(pickle.dumps(metadata))
    rehash(directory)
    for argv in commands(tmp_path, dataset, saved).values():
        refused(argv, capsys, directory / ".metadata", "is no name of a file")


def test_packed_steps_execute_nothing(dataset, tmp_path, marker, capsys):
    plan = tmp_path / "plan"
    flags = ["--row-capacity", "120", "--global-batch-size", "2"]
    assert command(["pack", dataset, "--output", str(plan), *flags], capsys)[0] == 0
    for name in ("groups.npy", "items.npy", "plan.json"):
        sound = (plan / name).read_bytes()
        for wrap in (raw, as_npy, as_torch):
            (plan / name).write_bytes(wrap(Payload(marker)))
            if name != "plan.json":
                seal_plan(plan)
            refused(["inspect", str(plan)], capsys, plan)
            assert not marker.exists()
        (plan / name).write_bytes(sound)


def test_a_chat_template_executes_nothing(tmp_path, marker, capsys):
    """Jinja's sandbox is the one of transformers; nothing outside the messages can be reached."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.WordLevel({"<unk>": 0, "</s>": 1, "a": 2}, unk_token="<unk>"))
    talk = [{"role": "user", "content": "a"}]
    answers = [[{"role": "assistant", "content": text}] for text in ("a", "b")]
    record = {"prompt": talk, "chosen": answers[0], "rejected": answers[1]}
    (tmp_path / "in.jsonl").write_text(json.dumps(record) + "\n")
    call = f"__import__('os').mkdir({str(marker)!r})"
    roots = ("cycler.__init__.__globals__", "''.__class__.__mro__[1].__subclasses__()")
    roots += ("messages.append.__self__.__class__.__base__", "raise_exception.__globals__")
    for root in roots:
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>")
        tokenizer.chat_template = f"{{{{ {root}['__builtins__']['eval'](\"{call}\") }}}}"
        shutil.rmtree(tmp_path / "tokenizer", ignore_errors=True)
        tokenizer.save_pretrained(tmp_path / "tokenizer")
        argv = ["build", "--input", str(tmp_path / "in.jsonl"), "--output", str(tmp_path / "set")]
        refused([*argv, "--tokenizer", str(tmp_path / "tokenizer")], capsys, "chat template")
        assert not marker.exists(), root


def in_complete(directory: Path, payload: Payload) -> None:
    (directory / "metadata.json").write_bytes(raw(payload))


def in_checksums(directory: Path, payload: Payload) -> None:
    (directory / "checksums.json").write_bytes(raw(payload))


PLANTS = [
    *(in_metadata, in_metadata_state, as_object, as_further_object, in_common, raw_in_common),
    *(in_tensors, zipped_in_tensors, in_complete),
]


def rehash(directory: Path) -> None:
    names = json.loads((directory / "checksums.json").read_text())
    files = [p for p in directory.rglob("*") if p.is_file()]
    names = {
        str(p.relative_to(directory)): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in files
        if p.name not in ("checksums.json", "metadata.json")
    }
    (directory / "checksums.json").write_text(json.dumps(names))


def commands(folder: Path, dataset: str, saved: Path) -> dict[str, list[str]]:
    """Every public way to load the checkpoint."""
    resumed = write_config(folder / "a.yaml", dataset, folder, train={"save": None, "load": None})
    none = ["train.save=null", "train.save_interval=null"]
    return {
        "train.load": ["train", "--config", resumed, *none, f"train.load={saved}"],
        "model.checkpoint": ["train", "--config", resumed, *none, f"model.checkpoint={saved}"],
        "evaluate": ["evaluate", "--config", resumed, *none, f"data.valid={dataset}"]
        + ["--load", str(saved)],
        "export": ["convert", "export", "--load", str(saved), "--hf", str(folder / "out")],
    }


def planted(finished: Path, folder: Path, plant: Callable, payload: Payload) -> Path:
    shutil.copytree(finished / "saved", folder / "saved")
    plant(folder / "saved" / "iter_0000002", payload)
    return folder / "saved"


@pytest.mark.parametrize("plant", PLANTS)
@pytest.mark.parametrize("checksums", ["computed again", "removed", "left"])
def test_a_checkpoint_executes_nothing(
    finished, dataset, tmp_path, marker, capsys, monkeypatch, plant, checksums
):
    """Even if torch's environment variable asks for plain unpickling."""
    saved = planted(finished, tmp_path, plant, Payload(marker))
    directory = saved / "iter_0000002"
    if checksums == "computed again":
        rehash(directory)
    elif checksums == "removed":
        (directory / "checksums.json").unlink()
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    ways = commands(tmp_path, dataset, saved)
    for way in ways if checksums == "computed again" else ["train.load"]:
        if plant is as_further_object and checksums != "left":
            assert command(ways[way], capsys)[0] == 0, "objects beside the tensors are never read"
        elif way == "export" and plant in (in_common, raw_in_common, in_complete):
            assert command(ways[way], capsys)[0] in (0, 2)  # it does not read the first two
        else:
            refused(ways[way], capsys, saved)
        assert not marker.exists(), way


def test_checksums_execute_nothing(finished, dataset, tmp_path, marker, capsys):
    saved = planted(finished, tmp_path, in_checksums, Payload(marker))
    for way in commands(tmp_path, dataset, saved).values():
        refused(way, capsys, saved)
        assert not marker.exists()


def test_what_came_from_hugging_face_executes_nothing(finished, dataset, tmp_path, marker, capsys):
    """Pickles and code beside config.json; `auto_map` names the code."""
    saved = planted(finished, tmp_path, lambda directory, payload: None, Payload(marker))
    folder = saved / "iter_0000002" / "hf"
    code = f"import os\nos.mkdir({str(marker)!r})\n"
    for name in ("modeling.py", "tokenization.py", "__init__.py"):
        (folder / name).write_text(code)
    for name in ("pytorch_model.bin", "training_args.bin", "tokenizer.model"):
        (folder / name).write_bytes(raw(Payload(marker)))
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "modeling.Model", "AutoConfig": "modeling.C"}
    (folder / "config.json").write_text(json.dumps(config))
    rehash(saved / "iter_0000002")
    for argv in commands(tmp_path, dataset, saved).values():
        code, message = command(argv, capsys)
        assert code in (0, 2) and "Traceback" not in message
        assert not marker.exists()
    left = [p.name for p in (tmp_path / "out").iterdir()] if (tmp_path / "out").exists() else []
    assert not [name for name in left if name.endswith((".py", ".bin"))]
    (folder / "config.json").write_bytes(raw(Payload(marker)))
    rehash(saved / "iter_0000002")
    for way in ("model.checkpoint", "export"):
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        refused(commands(tmp_path, dataset, saved)[way], capsys, folder)
        assert not marker.exists()
