"""Kinds of the fuzz about images: records, pictures, and the files of a data set with images."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import vision
from broken_sets import change_manifest, seal_set
from damage import damaged, odd_values
from fuzz_adapters import AllFuzz
from fuzz_kinds import refusal

from megatron_prefix.data.build.builder import BuildOptions, build_dataset
from megatron_prefix.data.images import ImageProcessor, ImageStore
from megatron_prefix.data.store.dataset import PreferenceDataset
from megatron_prefix.data.store.verify import verify_dataset

TEXTS = ("", " ", "a", "What is it?", "\n\n", "<eos>", "<pad>", "<image>", "ü\u202e", "\U0001fffe")
NUM_PICTURES = 6


class EveryFuzz(AllFuzz):
    """All kinds, those about images too."""

    def _models(self) -> dict[str, tuple[Path, vision.Reference]]:
        """A directory of each family, what transformers makes of it, and pictures beside them."""
        if not hasattr(self, "_made"):
            folder = self.folder / "vision"
            self._made = {
                family: (made := vision.make(folder / family, family), vision.Reference(made))
                for family in vision.FAMILIES
            }
            for i in range(NUM_PICTURES):
                size = [(84, 56), (1, 40), (31, 90), (200, 2), (28, 28), (300, 280)][i]
                vision.picture(*size, i).save(folder / f"{i}.png")
        return self._made

    def image_records(self, rng: random.Random, case: object) -> object | None:
        """A record with images at random places: refused, or with the tokens of transformers."""
        family = rng.choice(vision.FAMILIES)
        directory, reference = self._models()[family]
        names, prompt = [], []
        for i in range(rng.choice([1, 1, 3])):
            parts: list[dict] = []
            for _ in range(rng.choice([0, 1, 2, 4])):
                if rng.random() < 0.5:
                    names.append(f"{rng.randrange(NUM_PICTURES)}.png")
                    parts.append({"type": "image"})
                parts.append({"type": "text", "text": rng.choice(TEXTS)})
            prompt.append({"role": ("user", "assistant")[i % 2], "content": parts})
        if rng.random() < 0.2:
            prompt.insert(0, {"role": "system", "content": "Be brief."})
        if rng.random() < 0.15:
            names = names[1:] or ["0.png"]
        sides = [[{"role": "assistant", "content": rng.choice(TEXTS) + x}] for x in "xy"]
        record = {"images": names, "prompt": prompt, "chosen": sides[0], "rejected": sides[1]}
        path, output = self.folder / "vision" / "in.jsonl", self.folder / "image_out" / "set"
        path.write_text(json.dumps(record))
        shutil.rmtree(output.parent, ignore_errors=True)
        outcome = refusal(
            lambda: build_dataset([path], str(directory), output), path.name, (case, record)
        )
        if outcome is None:
            return None
        data = PreferenceDataset(output)
        verify_dataset(data)
        from PIL import Image

        pictures = [Image.open(path.parent / name).convert("RGB") for name in names]
        texts = [part for turn in (*prompt, *sides[0], *sides[1]) for part in _texts(turn)]
        if any(special in text for text in texts for special in ("<eos>", "<pad>")):
            return outcome  # these stay text; transformers makes tokens of them
        if not any({"type": "image"} in list(turn["content"]) for turn in prompt):
            first = next(turn for turn in prompt if turn["role"] == "user")
            first["content"] = [{"type": "image"}] * len(names) + first["content"]
        for response, side in enumerate(sides):
            whole = reference.render([*(_in_parts(turn) for turn in (*prompt, *side))])
            tokens, _ = data[0].response_tokens(response)
            assert tokens.tolist() == reference(whole, pictures)[0], (case, record)
        return outcome

    def picture(self, rng: random.Random, case: object) -> object | None:
        """A damaged picture: refused with its file, or decoded to its end."""
        family = rng.choice(vision.FAMILIES)
        directory, _ = self._models()[family]
        folder = directory.parent
        form = rng.choice(["png", "jpg", "webp", "gif", "bmp", "tiff", "ppm"])
        path = folder / f"damaged.{form}"
        vision.picture(rng.randrange(1, 80), rng.randrange(1, 80), rng.randrange(9)).save(path)
        damage = damaged(rng, path, [folder / "0.png"])
        answers = {"chosen": "a", "rejected": "b"}
        (folder / "p.jsonl").write_text(
            json.dumps({"image": path.name, "question": "?", **answers})
        )
        output = self.folder / "image_out" / "set"
        shutil.rmtree(output.parent, ignore_errors=True)
        outcome = refusal(
            lambda: build_dataset([folder / "p.jsonl"], str(directory), output),
            path,
            (case, damage),
        )
        if outcome is not None:
            store = PreferenceDataset(output).images
            assert store is not None and store.bytes(0) == path.read_bytes()
            store.batches(ImageProcessor.open(directory), [0])
        path.unlink(missing_ok=True)
        return outcome

    def image_set(self, rng: random.Random, case: object) -> object | None:
        """Image files of a data set: damaged, which checksums see, or forged with checksums."""
        sound = self.folder / "sound_images"
        if not sound.exists():
            directory, _ = self._models()["qwen2_5_vl"]
            lines = []
            for i in range(8):
                names = [f"{(i + k) % NUM_PICTURES}.png" for k in range(i % 3)]
                texts = {"question": f"What {i}?", "chosen": f"a {i}", "rejected": "b"}
                lines.append(json.dumps({"images": names, **texts}) + "\n")
            (path := directory.parent / "s.jsonl").write_text("".join(lines))
            build_dataset([path], str(directory), sound / "set", BuildOptions())
        folder = self.folder / "image_copy"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(sound, folder)
        prefix, kind = folder / "set", rng.randrange(3)
        name = rng.choice(ImageStore.FILES)
        file = Path(f"{prefix}{name}")
        if kind == 0:
            before = file.read_bytes()
            damaged(rng, file, [Path(f"{sound}/set{rng.choice(ImageStore.FILES)}")])
        elif kind == 1 and name != ".images":
            self._change_entries(rng, file)
            seal_set(prefix)
        else:
            kind = 2
            change_manifest(
                Path(f"{prefix}.json"), lambda m: odd_values(rng, m["images"]) if m else None
            )

        def used() -> PreferenceDataset:
            data = self._used(prefix)
            verify_dataset(data)
            assert data.images is not None
            for image in range(len(data.images)):
                data.images.picture(image)
            return data

        outcome = refusal(used, prefix, (case, kind, name))
        if outcome is not None and kind == 0:
            assert file.read_bytes() == before, f"case {case}: damage of {name} was not seen"
        return outcome


def _texts(turn: dict) -> list[str]:
    content = turn["content"]
    return [content] if isinstance(content, str) else [p["text"] for p in content if "text" in p]


def _in_parts(turn: dict) -> dict:
    """A turn as the build gives it to a template: texts beside each other are one."""
    content = turn["content"]
    if isinstance(content, str):
        return {**turn, "content": [{"type": "text", "text": content}]}
    return turn
