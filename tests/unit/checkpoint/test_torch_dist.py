"""Files of a checkpoint: checksums of all of them, and metadata that cannot execute code."""

from __future__ import annotations

import io
import os
import pickle
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.metadata import (
    _MEM_FORMAT_ENCODING,
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    TensorProperties,
    TensorStorageMetadata,
)

from megatron_prefix.checkpoint.collective import on_main
from megatron_prefix.checkpoint.torch_dist import (
    CHECKSUMS,
    COMPLETE,
    _MetadataUnpickler,
    check_checksums,
    check_harmless,
    load_common,
    model_kind,
)
from megatron_prefix.checkpoint.writing import Writer, write_checksums
from megatron_prefix.errors import InputError
from megatron_prefix.model import REWARD_HEAD


class Payload:
    """Unpickling it makes the directory `marker`."""

    def __init__(self, marker: Path) -> None:
        self._marker = str(marker)

    def __reduce__(self) -> tuple:
        return os.mkdir, (self._marker,)


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    """Files as a checkpoint has them, with checksums."""
    path = tmp_path / "iter_0000001"
    (path / "hf").mkdir(parents=True)
    for name in ("a.distcp", "b.distcp", "hf/config.json", COMPLETE):
        (path / name).write_text(f"content of {name}")
    torch.save({"step": 1}, path / "common.pt")
    write_checksums(path)
    return path


def test_sound_files_pass(checkpoint):
    check_checksums(checkpoint)
    assert load_common(checkpoint) == {"step": 1}


def test_a_checkpoint_of_another_program_has_no_checksums(checkpoint):
    (checkpoint / CHECKSUMS).unlink()
    (checkpoint / "a.distcp").write_text("other")
    check_checksums(checkpoint)


@pytest.mark.parametrize("name", ["a.distcp", "hf/config.json", "common.pt"])
@pytest.mark.parametrize("damage", ["changed", "removed", "added"])
def test_a_file_that_differs_is_named(checkpoint, name, damage):
    path = checkpoint / (f"{name}.more" if damage == "added" else name)
    if damage == "removed":
        path.unlink()
    else:
        path.write_text("other")
    with pytest.raises(InputError, match=f"damaged, .*: {path.relative_to(checkpoint)}; load"):
        check_checksums(checkpoint)


@pytest.mark.parametrize("text", ["", "[]", "[" * 100_000, '{"a": ', "\x00"])
def test_checksums_that_cannot_be_read_are_damage(checkpoint, text):
    (checkpoint / CHECKSUMS).write_text(text)
    with pytest.raises(InputError, match="damaged, or changed since it was saved"):
        check_checksums(checkpoint)


def metadata_of(**entries) -> Metadata:
    return Metadata(state_dict_metadata=entries)


def tensor(*size: int) -> TensorStorageMetadata:
    chunk = ChunkStorageMetadata(torch.Size([0] * len(size)), torch.Size(size))
    return TensorStorageMetadata(TensorProperties(torch.float32), torch.Size(size), [chunk])


def test_tensors_and_objects_are_harmless(checkpoint):
    metadata = metadata_of(weight=tensor(2, 3), state=BytesStorageMetadata())
    (checkpoint / ".metadata").write_bytes(pickle.dumps(metadata))
    check_harmless(checkpoint)
    assert model_kind(checkpoint) == "lm"
    metadata = metadata_of(**{REWARD_HEAD: tensor(1, 3)})
    (checkpoint / ".metadata").write_bytes(pickle.dumps(metadata))
    assert model_kind(checkpoint) == "reward"


@pytest.mark.parametrize("place", ["alone", "entry", "planner", "after"])
def test_code_in_the_metadata_is_refused_and_never_runs(checkpoint, tmp_path, place):
    payload = Payload(tmp_path / "executed")
    metadata = metadata_of(weight=tensor(2))
    if place == "entry":
        metadata.state_dict_metadata["weight"] = payload
    elif place == "planner":
        metadata.planner_data = payload
    elif place == "after":
        metadata.storage_data = {"x": payload}
    content = payload if place == "alone" else metadata
    (checkpoint / ".metadata").write_bytes(pickle.dumps(content))
    with pytest.raises(InputError, match="refused, because it is damaged or could execute code"):
        check_harmless(checkpoint)
    assert not (tmp_path / "executed").exists()


def test_an_entry_that_is_neither_tensor_nor_object_is_refused(checkpoint):
    metadata = metadata_of(weight=torch.Size([2]))
    (checkpoint / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(InputError, match="weight is neither a tensor nor a stored object"):
        check_harmless(checkpoint)


@pytest.mark.parametrize("content", [b"", b"nonsense", pickle.dumps([1, 2])])
def test_damaged_metadata_is_refused(checkpoint, content):
    (checkpoint / ".metadata").write_bytes(content)
    with pytest.raises(InputError, match=r"\.metadata: refused"):
        check_harmless(checkpoint)
    (checkpoint / ".metadata").unlink()
    with pytest.raises(InputError, match=r"\.metadata: No such file .* damaged"):
        check_harmless(checkpoint)


@pytest.mark.parametrize("is_forced", [False, True])
def test_code_beside_the_tensors_never_runs(checkpoint, tmp_path, monkeypatch, is_forced):
    """Even if torch's environment variable asks for plain unpickling."""
    if is_forced:
        monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    torch.save({"step": Payload(tmp_path / "executed")}, checkpoint / "common.pt")
    write_checksums(checkpoint)
    with pytest.raises(InputError, match="common.pt: refused"):
        load_common(checkpoint)
    assert not (tmp_path / "executed").exists()


def test_what_is_beside_the_tensors_is_a_dictionary(checkpoint):
    torch.save([1], checkpoint / "common.pt")
    write_checksums(checkpoint)
    with pytest.raises(InputError, match="common.pt: not a dictionary"):
        load_common(checkpoint)


def test_metadata_is_read_by_every_python(tmp_path):
    """A path would be pickled by its module, which has another name from Python 3.13 on."""
    writer = Writer(tmp_path)
    writer.reset(tmp_path)
    meta = writer.storage_meta()
    assert meta is not None and meta.checkpoint_id == str(tmp_path)
    assert b"pathlib" not in pickle.dumps(meta)


class Attribute:
    """Pickled as Python 3.11.2 pickles a member of an enumeration."""

    def __init__(self, kind: object, name: str) -> None:
        self._of = kind, name

    def __reduce__(self) -> tuple:
        return getattr, self._of


def test_members_of_enumerations_are_the_only_attributes(tmp_path):
    """Python before 3.11.4 stores them as attributes of their class."""
    member = _MEM_FORMAT_ENCODING.TORCH_CONTIGUOUS_FORMAT
    stored = pickle.dumps(Attribute(_MEM_FORMAT_ENCODING, member.name))
    assert _MetadataUnpickler(io.BytesIO(stored)).load() is member
    for kind, name in (
        (_MEM_FORMAT_ENCODING, "mro"),
        (TensorProperties, "create_from_tensor"),
        (member, "name"),
    ):
        with pytest.raises(pickle.UnpicklingError, match="it refers to builtins.getattr"):
            _MetadataUnpickler(io.BytesIO(pickle.dumps(Attribute(kind, name)))).load()


def test_a_failure_of_the_main_process_is_raised(world):
    done = []
    on_main(lambda: done.append(1))
    assert done == [1]

    def fail() -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        on_main(fail)
