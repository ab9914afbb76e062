"""More kinds of the fuzz: forged files, whose checksums are right, and files of other programs.

What is accepted must be usable to its end: every group is read, every step is packed and laid out.
"""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import numpy as np
from broken_sets import MANIFESTS, SETS, change_manifest, seal_plan, seal_set
from damage import damaged, odd_values
from fuzz_kinds import Fuzz, refusal
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from megatron_prefix.__main__ import main
from megatron_prefix.data.build.builder import build_dataset
from megatron_prefix.data.inspect import survey
from megatron_prefix.data.steps import Sampler
from megatron_prefix.data.steps.compositions import StepSettings
from megatron_prefix.data.steps.packed import PackedSteps, check_rows, verify_packed_steps
from megatron_prefix.data.steps.packed.reading import settings_of
from megatron_prefix.data.store.columns import COLUMNS
from megatron_prefix.data.store.dataset import PreferenceDataset
from megatron_prefix.data.store.manifest import suffix_path
from megatron_prefix.errors import InputError
from megatron_prefix.model.hf import HFModel
from megatron_prefix.reference.sidecars import _digest, read_sidecar

SETTINGS = StepSettings(seed=1, row_capacity=120, global_batch_size=3, epochs=2)
TEMPLATES = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}</s>{% endfor %}",
    "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}"
    "{{ ns.n }}{{ m.content | trim }}{% endfor %}{% if add_generation_prompt %}<a>{% endif %}",
    "{% macro f(m) %}{{ m.role | upper }}: {{ m.content }}\n{% endmacro %}"
    "{% for m in messages %}{{ f(m) }}{% endfor %}{{ eos_token }}",
)
PARTS = (
    "{{ f() }}",
    "{% macro f() %}{{ f() }}{% endmacro %}",
    "{{ 10 ** 1000000 }}",
    "{{ [1] * 9 ** 9 }}",
    "{{ 'a' * 10 ** 12 }}",
    "{% for i in range(10 ** 9) %}{% endfor %}",
    "{{ ''.__class__.__mro__ }}",
    "{{ cycler.__init__.__globals__ }}",
    "{% include '/etc/passwd' %}",
    "{{ raise_exception('no') }}",
    "{{ messages.foo() }}",
    "{{ messages[99] }}",
    "{{ undefined.a.b }}",
    "{{ 1 / 0 }}",
    "{{ '%s' | format(messages) }}",
    "{% set messages = [] %}",
    "{% for m in messages %}",
    "{% endfor %}",
    "\x00",
)


class ForgedFuzz(Fuzz):
    """Kinds of fuzz_kinds.py, and those of this file."""

    def _used(self, prefix: Path) -> PreferenceDataset:
        """A data set, read to its end."""
        data = PreferenceDataset(prefix)
        survey(data, row_capacity=1 << 20)
        for group in range(len(data)):
            data[group]
        sampler = Sampler(
            dataset=data, composition=SETTINGS.composition(data), row_capacity=1 << 20
        )
        for step in range(min(sampler.composition.num_steps(2), 20)):
            sampler.micro_batches(sampler.step(step))
        return data

    def forged_set(self, rng: random.Random, case: object) -> object | None:
        prefix = self._copied_set()
        kind = rng.randrange(4)
        if kind == 0:
            name = rng.choice([*SETS])
            SETS[name](prefix)
        elif kind == 1:
            name = rng.choice([*MANIFESTS])
            change_manifest(suffix_path(prefix, ".json"), MANIFESTS[name])
        elif kind == 2:
            name = "json"
            path = suffix_path(prefix, ".json")
            change_manifest(path, lambda m: odd_values(rng, m))
        else:
            name = rng.choice([*COLUMNS])
            self._change_entries(rng, suffix_path(prefix, f".tree/{name}.npy"))
        if kind in (0, 3):
            seal_set(prefix)
        return refusal(lambda: self._used(prefix), prefix, (case, kind, name))

    @staticmethod
    def _change_entries(rng: random.Random, path: Path) -> None:
        """Some entries copied from others, moved by one, or set to a limit of their type."""
        values = np.load(path)
        flat = values.reshape(-1)
        for _ in range(rng.choice([1, 2, 3, len(flat)])):
            at, other = rng.randrange(len(flat)), rng.randrange(len(flat))
            limit = np.finfo if values.dtype.kind == "f" else np.iinfo
            choices = [flat[other], flat[at] + 1, flat[at] - 1, flat[at] * 2, -flat[at]]
            with np.errstate(over="ignore"):
                flat[at] = rng.choice([*choices, limit(values.dtype).max, limit(values.dtype).min])
        np.save(path, values)

    def _copied_plan(self) -> Path:
        sound = self.folder / "sound_plan"
        if not sound.exists():
            flags = ["--row-capacity", "120", "--global-batch-size", "3", "--epochs", "2"]
            assert main(["pack", self.sets[0], "--output", str(sound), *flags]) == 0
        folder = self.folder / "plan"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(sound, folder)
        return folder

    def _followed(self, folder: Path) -> list:
        """The rows of every step of a plan."""
        plan = PackedSteps(folder)
        if plan.manifest["data"]["fingerprint"] == self.data.fingerprint:
            check_rows(plan, self.data)
        plan.check(self.data, settings_of(plan.manifest), None)
        capacity = plan.manifest["settings"]["row_capacity"]
        sharing = plan.manifest["settings"]["sharing"]
        sampler = Sampler(
            dataset=self.data, composition=plan, row_capacity=capacity, sharing=sharing
        )
        steps = plan.manifest["counts"]["steps"]
        return [sampler.micro_batches(sampler.step(step)) for step in range(steps)]

    def plan(self, rng: random.Random, case: object) -> object | None:
        folder = self._copied_plan()
        files = sorted(folder.iterdir())
        path = rng.choice(files)
        before = path.read_bytes()
        damage = damaged(rng, path, [p for p in files if p != path])

        def verified() -> list:
            PackedSteps(folder, check=False).verify()
            verify_packed_steps(PackedSteps(folder), self.data)
            return self._followed(folder)

        outcome = refusal(verified, folder, (case, damage))
        if outcome is not None:
            after = path.read_bytes()
            is_same = path.suffix == ".json" and json.loads(after) == json.loads(before)
            assert after == before or is_same, f"case {case}: {damage} was not seen"
        return outcome

    def forged_plan(self, rng: random.Random, case: object) -> object | None:
        folder = self._copied_plan()
        name = rng.choice(["groups", "step_groups", "items", "row_items", "step_rows", "plan"])
        if name == "plan":
            change_manifest(folder / "plan.json", lambda m: odd_values(rng, m))
        else:
            self._change_entries(rng, folder / f"{name}.npy")
            seal_plan(folder)
        return refusal(lambda: self._followed(folder), "", (case, name))

    def forged_scores(self, rng: random.Random, case: object) -> object | None:
        path = self.folder / "forged_ref"
        with safe_open(self.sidecar, "numpy") as file:
            header = json.loads(file.metadata()["megatron_prefix"])
        arrays = load_file(self.sidecar)
        if rng.random() < 0.7:
            odd_values(rng, header)
        else:
            name = rng.choice(sorted(arrays))
            odd = [np.nan, np.inf, -np.inf, 1.0, -0.0, -1e308]
            arrays[name][rng.randrange(len(arrays[name]))] = rng.choice(odd)
        if "sha256" in header:
            header["sha256"] = _digest(header, arrays)
        save_file(arrays, path, {"megatron_prefix": json.dumps(header)})
        return refusal(lambda: read_sidecar(str(path), self.model, self.data), path, case)

    def _exported(self) -> Path:
        """The finished run's model as a Hugging Face directory, with a tokenizer."""
        from tokenizers import Tokenizer, models, pre_tokenizers
        from transformers import PreTrainedTokenizerFast

        folder = self.folder / "sound_hf"
        if not folder.exists():
            flags = ["--load", str(self.finished / "saved"), "--hf", str(folder)]
            assert main(["convert", "export", *flags]) == 0
            words = {"<unk>": 0, "</s>": 1, "Why": 2, "?": 3, "Because": 4, ".": 5}
            core = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
            core.pre_tokenizer = pre_tokenizers.Whitespace()
            tokenizer = PreTrainedTokenizerFast(
                tokenizer_object=core, eos_token="</s>", unk_token="<unk>"
            )
            tokenizer.chat_template = TEMPLATES[0]
            tokenizer.save_pretrained(folder)
        copy = self.folder / "hf"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(folder, copy)
        return copy

    def hugging_face(self, rng: random.Random, case: object) -> object | None:
        """A damaged model or tokenizer directory, read as `model.hf` and as `--tokenizer`."""
        folder = self._exported()
        files = sorted(p for p in folder.iterdir() if p.is_file())
        path = rng.choice([p for p in files if p.suffix in (".json", ".safetensors", ".jinja")])
        damage = damaged(rng, path, [p for p in files if p != path])

        def read() -> object:
            model = HFModel.open(str(folder))
            return model.kind, model.sizes, model.vocab_size, self._built(folder)

        return refusal(read, "", (case, damage))

    def template(self, rng: random.Random, case: object) -> object | None:
        """A chat template with parts that fail, never end, or ask for what is not theirs."""
        folder = self._exported()
        text = rng.choice(TEMPLATES)
        for _ in range(rng.choice([1, 1, 2, 3])):
            at = rng.randrange(len(text) + 1)
            end = at if rng.random() < 0.7 else rng.randrange(at, len(text) + 1)
            text = text[:at] + rng.choice(PARTS) + text[end:]
        (folder / "chat_template.jinja").write_text(text)
        return refusal(lambda: self._built(folder), "", (case, text))

    def _built(self, tokenizer: Path) -> dict:
        talk = [{"role": "user", "content": "Why?"}]
        answers = [[{"role": "assistant", "content": t}] for t in ("Because.", "Why")]
        record = {"prompt": talk, "chosen": answers[0], "rejected": answers[1]}
        path, output = self.folder / "chat.jsonl", self.folder / "chat" / "set"
        path.write_text(json.dumps(record) + "\n")
        shutil.rmtree(output.parent, ignore_errors=True)
        try:
            build_dataset([path], str(tokenizer), output)
        except InputError:
            assert not output.parent.exists(), "something is left"
            raise
        return self._used(output).manifest
