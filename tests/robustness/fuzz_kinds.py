"""What the fuzz reads: sound inputs of every kind, copied and damaged for one case.

A kind is a method of `Fuzz`: it takes the random source of a case and the case, and returns what
was read, or None if it was refused. It raises AssertionError, with the case, for anything else:
another exception than InputError, a hang, or damage that changes what is read and was not seen.
"""

from __future__ import annotations

import gzip
import json
import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
from broken_sets import seal_set
from commands import write_config
from damage import BYTES, damaged
from hang_guard import limited

from megatron_prefix.checkpoint import save_load as checkpoint
from megatron_prefix.checkpoint.starting_model import resolve_starting_model
from megatron_prefix.config import load_config
from megatron_prefix.data.build.builder import BuildOptions, build_dataset
from megatron_prefix.data.store.columns import COLUMNS
from megatron_prefix.data.store.dataset import PreferenceDataset
from megatron_prefix.data.store.manifest import FILES, suffix_path
from megatron_prefix.data.store.verify import verify_checksums, verify_dataset
from megatron_prefix.distributed.world import World
from megatron_prefix.engine.optimizer import build_model
from megatron_prefix.errors import InputError
from megatron_prefix.model.parameters import model_fingerprint
from megatron_prefix.reference.sidecars import read_sidecar


def refusal(action: Callable[[], object], name: object, case: object) -> object | None:
    """What `action` returns, or None if it refuses with a message that has `name`."""
    with limited(case):
        try:
            return action()
        except InputError as error:
            assert str(name) in str(error), (case, str(error))
            assert "Traceback" not in str(error), (case, str(error))
            return None
        except AssertionError:
            raise
        except Exception as error:
            raise AssertionError(f"case {case}: {type(error).__name__}: {error}") from error


class Fuzz:
    """Sound inputs of every kind, copied and damaged for a case."""

    def __init__(
        self, folder: Path, finished: Path, sidecar: Path, sets: tuple[str, str], world: World
    ) -> None:
        self.folder, self.finished, self.sidecar, self.sets = folder, finished, sidecar, sets
        self.world = world
        rows = [
            {"prompt": f"Question {i}?\n", "chosen": "yes " * i, "rejected": "no", "margin": i / 2}
            for i in range(1, 6)
        ]
        talk = [{"role": "user", "content": "Why?"}]
        answers = [[{"role": "assistant", "content": text}] for text in ("Because.", "Hm.")]
        chat = {"prompt": talk, "chosen": answers[0], "rejected": answers[1]}
        human = {"conversations": [{"from": "human", "value": "a"}]}
        human |= {f"{k}ed": {"from": "gpt", "value": k} for k in ("reject",)}
        human |= {"chosen": {"from": "gpt", "value": "b"}}
        dialogue = {
            "chosen": "\n\nHuman: a\n\nAssistant: b",
            "rejected": "\n\nHuman: a\n\nAssistant: c",
        }
        reply = [
            {"role": "assistant", "text": t, "rank": i, "replies": []} for i, t in enumerate("bc")
        ]
        tree = {"prompt": {"role": "prompter", "text": "a", "replies": reply}}
        texts = [rows, [chat] * 3, [human] * 3, [dialogue] * 3, [tree] * 3]
        self.texts = [
            *("".join(json.dumps(row) + "\n" for row in records) for records in texts),
            json.dumps(rows, indent=1),
        ]
        self.settings = Path(
            write_config(folder / "sound.yaml", sets[0], folder / "run")
        ).read_text()
        config = load_config(folder / "sound.yaml")
        self.data = PreferenceDataset(sets[0])
        self.chunks = build_model(
            resolve_starting_model(config.model, [self.data]).transformer_config(config.train.seed),
            world,
        )
        self.model = model_fingerprint(self.chunks)
        self.logps = read_sidecar(str(sidecar), self.model, self.data)
        checkpoint.load_weights(finished / "saved", self.chunks)
        self.trained = model_fingerprint(self.chunks)

    def inputs(self, rng: random.Random, case: object) -> object | None:
        text = rng.choice(self.texts).encode()
        path, other = self.folder / "in.jsonl", self.folder / "other.jsonl"
        other.write_text(rng.choice(self.texts))
        path.write_bytes(text)
        zipped = rng.random() < 0.3
        if zipped and rng.random() < 0.5:
            path.write_bytes(gzip.compress(text))
            path = path.rename(path.with_suffix(".gz"))
        damage = damaged(rng, path, [other])
        if zipped and path.suffix == ".jsonl" and path.exists():
            path.write_bytes(gzip.compress(path.read_bytes()))
        output = self.folder / "built" / "set"
        options = BuildOptions(on_error=rng.choice(["stop", "stop", "skip"]))
        outcome = refusal(
            lambda: build_dataset([path], "bytes", output, options), path.name, (case, damage)
        )
        if outcome is None:
            assert not output.parent.exists(), (case, damage)
        else:
            verify_dataset(PreferenceDataset(output))
            shutil.rmtree(output.parent)
        path.unlink(missing_ok=True)
        return outcome

    def _copied_set(self) -> Path:
        folder = self.folder / "copied"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(Path(self.sets[0]).parent, folder)
        return folder / "set"

    def data_set(self, rng: random.Random, case: object) -> object | None:
        prefix = self._copied_set()
        name = rng.choice([".bin", ".idx", ".json", ".json", rng.choice(FILES)])
        others = [suffix_path(prefix, n) for n in FILES if n != name]
        if rng.random() < 0.3:
            others = [suffix_path(Path(self.sets[1]), name)]
        before = suffix_path(prefix, name).read_bytes()
        damage = damaged(rng, suffix_path(prefix, name), others)
        outcome = refusal(lambda: self._opened(prefix), prefix, (case, damage))
        if outcome is not None:
            after = suffix_path(prefix, name).read_bytes()
            same = after == before or name == ".json" and json.loads(after) == json.loads(before)
            assert same, f"case {case}: {damage} was not seen"
        return outcome

    def _opened(self, prefix: Path) -> PreferenceDataset:
        dataset = PreferenceDataset(prefix)
        verify_dataset(dataset)
        verify_checksums(PreferenceDataset(prefix))
        return dataset

    def column(self, rng: random.Random, case: object) -> object | None:
        """Another type, shape or other values, with checksums to match: only sense can refuse."""
        prefix = self._copied_set()
        name = rng.choice([*COLUMNS])
        path = suffix_path(prefix, f".tree/{name}.npy")
        values = np.load(path)
        kind = rng.randrange(5)
        if kind == 0:
            with np.errstate(invalid="ignore"):
                values = values.astype(rng.choice(["<f4", "<u8", ">i4", "<c8", "S8", "<i2", "?"]))
        elif kind == 1:
            values = rng.choice([values[:-1], values[None], np.concatenate([values, values])])
        elif kind == 2:
            values = np.asfortranarray(np.stack([values, values], -1))
        else:
            at = rng.randrange(values.size)
            odd = [0, 1, -1, -7, 1 << 30] + [np.nan, np.inf, -np.inf] * (values.dtype.kind == "f")
            values.reshape(-1)[at] = rng.choice(odd)
        np.save(path, values)
        seal_set(prefix)
        outcome = refusal(lambda: self._opened(prefix), prefix, (case, name, kind))
        if kind < 3:
            same = values.dtype == COLUMNS[name][0] and kind == 0
            assert outcome is None or same, f"case {case}: {name} {kind} was not seen"
        return outcome

    def scores(self, rng: random.Random, case: object) -> object | None:
        path = self.folder / "ref"
        path.write_bytes(self.sidecar.read_bytes())
        damage = damaged(
            rng, path, [self.sidecar.parent / "c.yaml", suffix_path(Path(self.sets[0]), ".bin")]
        )
        logps = refusal(
            lambda: read_sidecar(str(path), self.model, self.data), path, (case, damage)
        )
        if logps is not None:
            assert np.array_equal(logps, self.logps), f"case {case}: {damage} was not seen"
        return logps

    def saved(self, rng: random.Random, case: object) -> object | None:
        root = self.folder / "saved"
        shutil.rmtree(root, ignore_errors=True)
        shutil.copytree(self.finished / "saved", root)
        shutil.rmtree(root / "iter_0000001")
        files = sorted(p for p in root.rglob("*") if p.is_file())
        path = rng.choice(files)
        damage = damaged(rng, path, [p for p in files if p != path])

        def load() -> str:
            checkpoint.RunCheckpoints(root).latest_step()
            checkpoint.load_weights(root, self.chunks)
            return model_fingerprint(self.chunks)

        fingerprint = refusal(load, root, (case, damage))
        if fingerprint is not None:
            assert fingerprint == self.trained, f"case {case}: {damage} was not seen"
            has_no_checksum = path.name in ("checksums.json", "metadata.json", checkpoint.TRACKER)
            must_be_seen = not has_no_checksum and path.exists()
            assert not must_be_seen or _same(path, self.finished, root), (case, damage)
        return fingerprint

    def config(self, rng: random.Random, case: object) -> object | None:
        path, other = self.folder / "run.yaml", self.folder / "other.yaml"
        lines = json.dumps(json.loads(self.settings), indent=1)
        plain = "\n".join(re.sub(r'^(\s*)"(\w+)": ', r"\1\2: ", s) for s in lines.splitlines())
        path.write_text(rng.choice([self.settings, plain]))
        other.write_text("- a\n- {b: [c\n")
        if path.read_text() != self.settings:
            path.write_bytes(rng.choice(BYTES)(rng, bytearray(path.read_bytes())))
            damage = "yaml"
        else:
            damage = damaged(rng, path, [other])
        return refusal(lambda: load_config(path), path, (case, damage))


def _same(path: Path, finished: Path, root: Path) -> bool:
    return path.read_bytes() == (finished / "saved" / path.relative_to(root)).read_bytes()
