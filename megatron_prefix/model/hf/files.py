"""A Hugging Face model's directory: safetensors, read and written one tensor at a time.

Weights are read from `model.safetensors`, or from the shards that
`model.safetensors.index.json` names, and from nothing else: safetensors contain only numbers; the
older `.bin` files are pickles, which may run code when they are opened.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NoReturn

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron_prefix.errors import InputError
from megatron_prefix.model.hf.reading import ADAPTER_WEIGHTS, refuse_adapter

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
EMBEDDING, HEAD, SCORE = "model.embed_tokens.weight", "lm_head.weight", "score.weight"
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
_CODES = {dtype: code for code, dtype in DTYPES.items()}
_COMPANIONS = (".json", ".model", ".txt", ".jinja")
_TEMPLATES = "additional_chat_templates"
_BASE = "model."
_TABLES = (".rotary_emb.inv_freq", ".embeddings.position_ids", ".rotary_pos_emb.inv_freq")
"""Tables that older versions saved, and newer ones compute."""
_OTHER_FORMAT = "consolidated"
"""Start of the file names of Mistral's own format, which its directories have, too."""
_LAYER = re.compile(r"model\.layers\.\d+\.")
_ROWS_COMPARED = 4096
"""Rows of two embeddings in memory at a time."""


class HFTensors:
    """The tensors of a model's directory, each read when it is needed.

    `shapes` and `dtypes` come from the files' headers. A file is open, and its pages are
    mapped, only while one of its tensors is read. With `single`, only this file is read. Raises
    InputError naming file and tensor. `rename` gives the name of a tensor from that in the files.
    """

    def __init__(
        self,
        directory: Path,
        single: str | None = None,
        rename: Callable[[str], str] | None = None,
    ) -> None:
        self.directory = directory
        self._place: dict[str, tuple[Path, str]] = {}
        """The file of each tensor, and its name there."""
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, torch.dtype] = {}
        files = weight_files(directory) if single is None else {directory / single: None}
        for path, listed in files.items():
            with _opened(path) as file:
                held = set(file.keys())
                _check_index(path, held, listed)
                for stored in sorted(held):
                    name = stored if rename is None else rename(stored)
                    if name in self._place:
                        raise InputError(
                            f"{path}: tensors {self._place[name][1]} and {stored} are the same one "
                            "under names of two versions of transformers: remove one"
                        )
                    self._place[name] = (path, stored)
                    entry = file.get_slice(stored)
                    self.shapes[name] = tuple(entry.get_shape())
                    code = entry.get_dtype()
                    if code not in DTYPES:
                        raise InputError(
                            f"{path}: tensor {name} is {code}; only {', '.join(DTYPES)} are read"
                        )
                    self.dtypes[name] = DTYPES[code]

    def match(self, expected: Mapping[str, tuple[int, ...]], is_tied: bool = False) -> None:
        """Find the tensors of the model. Refuse those that are missing, not `expected`, or of
        another shape.

        As in transformers, names may lack the prefix `model.`, and of tied embeddings (`is_tied`)
        it does not matter which one is stored. If both are, they must be equal. Tables of rotary
        frequencies, which old Llama checkpoints contain, and a head that the model does not use
        are ignored.
        """
        for name in expected:
            bare = name.removeprefix(_BASE)
            if name not in self.shapes and bare in self.shapes:
                self._rename(bare, name)
        if is_tied and EMBEDDING not in self.shapes and HEAD in self.shapes:
            self._rename(HEAD, EMBEDDING)
        for name, shape in expected.items():
            if name not in self.shapes:
                raise InputError(
                    f"{self.directory}: tensor {name} is missing, config.json asks for it"
                )
            if self.shapes[name] != tuple(shape):
                raise InputError(
                    f"{self._place[name][0]}: tensor {name} has shape "
                    f"{list(self.shapes[name])}, config.json asks for {list(shape)}"
                )
        for name in self.shapes:
            if name not in expected and name != HEAD and not name.endswith(_TABLES):
                raise self._surplus(name, expected)
        if is_tied and HEAD in self.shapes:
            self._refuse_another_head()

    def read(self, name: str, rows: slice = slice(None), columns: slice = slice(None)) -> Tensor:
        """Rows and columns of a tensor, as a copy."""
        path, stored = self._place[name]
        with _opened(path) as file:
            entry = file.get_slice(stored)
            tensor = entry[rows] if len(self.shapes[name]) == 1 else entry[rows, columns]
            return tensor.clone(memory_format=torch.contiguous_format)

    def _rename(self, stored: str, name: str) -> None:
        self._place[name] = self._place.pop(stored)
        self.shapes[name] = self.shapes.pop(stored)
        self.dtypes[name] = self.dtypes.pop(stored)

    def _surplus(self, name: str, expected: Mapping[str, object]) -> InputError:
        place = f"{self._place[name][0]}: tensor {name} has no place in the model that config.json"
        layer = _LAYER.match(name)
        if layer and not any(key.startswith(layer[0]) for key in expected):
            return InputError(
                f"{place} describes: it is of a layer after the last one, as DeepSeek-V3 has them "
                "to predict further tokens (num_nextn_predict_layers). transformers ignores them: "
                "load the model with it and save_pretrained it"
            )
        if name != SCORE:
            return InputError(f"{place} describes")
        return InputError(
            f'{place} describes: for a reward model, set "architectures" in config.json to the '
            'sequence classifier that it is, as ["LlamaForSequenceClassification"]'
        )

    def _refuse_another_head(self) -> None:
        """Two copies of tied embeddings must be equal: else it is not known which one to train."""
        rows, columns = self.shapes[EMBEDDING]
        same = self.shapes[HEAD] == (rows, columns)
        for start in range(0, rows if same else 0, _ROWS_COMPARED):
            part = slice(start, start + _ROWS_COMPARED)
            if not torch.equal(self.read(EMBEDDING, part).float(), self.read(HEAD, part).float()):
                same = False
                break
        if not same:
            raise InputError(
                f"{self._place[HEAD][0]}: config.json has tie_word_embeddings true, and tensor "
                f"{HEAD} differs from {EMBEDDING}: set tie_word_embeddings to false to keep both, "
                f"or remove {HEAD}"
            )


def weight_files(directory: Path) -> dict[Path, list[str] | None]:
    """The files with weights, each with the tensors that the index lists for it; None: no index.

    Raises InputError if there is none, or more than one set of weights: transformers would take
    one of them, which need not be the newest.
    """
    refuse_adapter(directory)
    index, single = directory / INDEX, directory / SINGLE
    files: dict[Path, list[str] | None] = {}
    if index.is_file():
        files |= _indexed(index)
    elif single.is_file():
        files[single] = None
    else:
        _refuse_pickles(directory)
    first = index if index.is_file() else single
    for path in sorted(directory.glob("*.safetensors")):
        if path not in files and not path.name.startswith(_OTHER_FORMAT):
            raise InputError(
                f"{directory}: two sets of weights, {first.name} and {path.name}: move the one "
                "that is not meant to another directory"
            )
    return files


def _refuse_pickles(directory: Path) -> NoReturn:
    pickled = sorted(directory.glob("*.bin")) + sorted(directory.glob("*.pth"))
    remedy = (
        f"there is {pickled[0].name}, a pickle, which could run code and is not read: load "
        "the model with transformers and save_pretrained it"
        if pickled
        else "give the directory of a Hugging Face model"
    )
    raise InputError(f"{directory}: neither {SINGLE} nor {INDEX} is there; {remedy}")


def _indexed(index: Path) -> dict[Path, list[str]]:
    """The files that an index names, each with its tensors."""
    try:
        entries = json.loads(index.read_text(encoding="utf-8"))["weight_map"].items()
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(f"{index}: damaged ({type(error).__name__}): fetch it again") from None
    files: dict[Path, list[str]] = {}
    for name, file in entries:
        if not isinstance(file, str) or Path(file).name != file or not file.endswith("tensors"):
            raise InputError(f"{index}: tensor {name} is in {file!r}, which is no file's name")
        files.setdefault(index.parent / file, []).append(name)
    return files


def _check_index(path: Path, held: set[str], listed: list[str] | None) -> None:
    """Refuse an index of other files: transformers reads the files and ignores what it lists."""
    if listed is None:
        return
    if missing := sorted(set(listed) - held):
        raise InputError(
            f"{path}: tensor {missing[0]} is missing, and {INDEX} says it is there: "
            "fetch the model again"
        )
    surplus = sorted(name for name in held - set(listed) if not name.endswith(_TABLES))
    if surplus:
        raise InputError(
            f"{path}: tensor {surplus[0]} is there, and {INDEX} does not list it for this file, "
            f"so one of the two is older: fetch the model again, or save it again"
        )


@contextlib.contextmanager
def _opened(path: Path) -> Iterator:
    try:
        with safe_open(str(path), framework="pt", device="cpu") as file:
            yield file
    except FileNotFoundError:
        reason = f", {INDEX} names it" if path.name != ADAPTER_WEIGHTS else ""
        raise InputError(f"{path}: no such file{reason}: fetch the model again") from None
    except (SafetensorError, OSError) as error:
        raise InputError(
            f"{path}: not a whole safetensors file ({error}): fetch the model again"
        ) from None


def write_safetensors(
    directory: Path,
    entries: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
    tensors: Iterable[tuple[str, Tensor]],
    max_shard_bytes: int,
    single: str = SINGLE,
) -> list[str]:
    """Write `tensors`, in the order of `entries`, as the file `single`, or as shards with an index.

    A shard has at most `max_shard_bytes`, or one tensor. Only one tensor is in memory at a time.
    Returns the names of the files.
    """
    # sizes [4, 4, 4] with at most 8 bytes per shard -> [[4, 4], [4]]
    shards: list[dict[str, int]] = [{}]
    for name, (dtype, shape) in entries.items():
        size = torch.Size(shape).numel() * dtype.itemsize
        if shards[-1] and sum(shards[-1].values()) + size > max_shard_bytes:
            shards.append({})
        shards[-1][name] = size
    count = len(shards)
    names = [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
    names = [single] if count == 1 else names
    stream = iter(tensors)
    for file_name, shard in zip(names, shards, strict=True):
        with (directory / file_name).open("wb") as file:
            file.write(_header({name: (*entries[name], size) for name, size in shard.items()}))
            for expected in shard:  # `tensors` is a generator: each is freed before the next one
                name, tensor = next(stream)
                assert (name, tensor.dtype, tuple(tensor.shape)) == (expected, *entries[expected])
                file.write(tensor.contiguous().view(torch.uint8).numpy().data)
                del tensor
            file.flush()
            os.fsync(file.fileno())
    assert next(stream, None) is None, "more tensors than entries"
    if count > 1:
        weight_map = {name: f for f, shard in zip(names, shards, strict=True) for name in shard}
        total = sum(sum(shard.values()) for shard in shards)
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (directory / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return names


def _header(entries: Mapping[str, tuple[torch.dtype, tuple[int, ...], int]]) -> bytes:
    """A safetensors header: its length as 8 bytes, then JSON, padded with spaces to a multiple of 8
    bytes. Offsets count from the header's end: two tensors of 8 and 4 bytes are at [0, 8] and
    [8, 12]."""
    table: dict = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, (dtype, shape, size) in entries.items():
        span = [offset, offset + size]
        table[name] = {"dtype": _CODES[dtype], "shape": list(shape), "data_offsets": span}
        offset += size
    text = json.dumps(table).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def copy_companions(source: Path, target: Path, without: Sequence[str] = ()) -> list[str]:
    """Copy configuration and tokenizer files, but neither code nor weights, nor the files that
    `without` names. Returns their names."""
    target.mkdir(parents=True, exist_ok=True)
    copied = []
    for path in sorted(source.iterdir()):
        is_index = path.name.endswith(".index.json")
        if path.name in without or is_index:
            continue
        if path.is_file() and path.suffix in _COMPANIONS:
            shutil.copyfile(path, target / path.name)
            copied.append(path.name)
    if (source / _TEMPLATES).is_dir():
        (target / _TEMPLATES).mkdir(exist_ok=True)
        for path in sorted((source / _TEMPLATES).glob("*.jinja")):
            shutil.copyfile(path, target / _TEMPLATES / path.name)
            copied.append(f"{_TEMPLATES}/{path.name}")
    return copied
