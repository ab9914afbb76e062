"""Cost of `build`, compared with tokenising alone, with two workers, and with TRL.

    python tools/bench_build.py --input hh_pairs.jsonl.gz --tokenizer tokenizer.model

Everything runs in this process, in turn. Imports and the loading of tokenizers are not counted.
Ratios are of CPU time (for workers: of wall time). Each round loads a new tokenizer, so that its
cache does not help. TRL means DPOTrainer's own preparation of the same texts (`_prepare_dataset`).
Both then use a byte-level BPE tokenizer of 4,000 entries, trained on these texts.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from bench_common import publish

from megatron_prefix.data.build import BuildOptions, build_dataset
from megatron_prefix.data.read import ExampleReader, Text
from megatron_prefix.data.tokenize import load_tokenizer

TURN = "\n\nAssistant:"


def cpu(action: Callable[[], object]) -> float:
    start = time.process_time()
    action()
    return time.process_time() - start


def records_of(path: Path) -> list[dict]:
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def repeated(path: Path, times: int, folder: Path) -> Path:
    """A file with the records of `path`, repeated `times` times."""
    output = folder / "repeated.jsonl"
    with gzip.open(path, "rt", encoding="utf-8") as file:
        text = file.read()
    output.write_text(text * times, encoding="utf-8")
    return output


def against_tokenising(path: Path, spec: str, rounds: int, folder: Path) -> list[float]:
    """CPU time of a build divided by the CPU time of encoding every dialogue of the file."""
    texts = [row[side] for row in records_of(path) for side in ("chosen", "rejected")]
    ratios = []
    for _ in range(rounds):
        tokenizer = load_tokenizer(spec)
        encode = tokenizer._model.encode
        alone = cpu(lambda encode=encode: [encode(text) for text in texts])
        build = cpu(lambda t=tokenizer: build_dataset([path], t, folder / "out"))
        ratios.append(build / alone)
    return ratios


def of_workers(path: Path, spec: str, rounds: int, folder: Path) -> tuple[list[float], list[float]]:
    """Wall time of one worker divided by that of two; and the gain on two idle cores: twice the CPU
    time of one worker, divided by the CPU time of all processes."""
    walls, gains = [], []
    for _ in range(rounds):
        measured = []
        for workers in (1, 2):
            tokenizer, options = load_tokenizer(spec), BuildOptions(workers=workers)
            before, start = sum(os.times()[:4]), time.perf_counter()
            build_dataset([path], tokenizer, folder / "out", options)
            measured.append((time.perf_counter() - start, sum(os.times()[:4]) - before))
        (wall_1, cpu_1), (wall_2, cpu_2) = measured
        walls.append(wall_1 / wall_2)
        gains.append(2 * cpu_1 / cpu_2)
    return walls, gains


CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def byte_level_bpe(texts: list[str], folder: Path, template: str | None = None) -> str:
    """A Hugging Face tokenizer trained on `texts`; returns its directory."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=4000,
        special_tokens=["<pad>", "<eos>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=alphabet,
    )
    core.train_from_iterator(texts, trainer)
    eos = "<|im_end|>" if template else "<eos>"
    made = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token=eos)
    if template:
        made.chat_template = template
    made.save_pretrained(folder / "tokenizer")
    return str(folder / "tokenizer")


def as_column(text: Text) -> str | list[dict]:
    return text if isinstance(text, str) else [message.as_dict() for message in text]


def against_trl(
    path: Path, rounds: int, folder: Path, template: str | None = None
) -> tuple[list[float], list[float]]:
    """CPU time of TRL's preparation divided by that of a build from the same columns; and that of
    the build divided by that of encoding both dialogues of every record."""
    import datasets
    from transformers import AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    datasets.disable_caching()
    datasets.disable_progress_bars()
    reader, rows = ExampleReader(), []
    for record in records_of(path):
        example = reader.read(record)
        chosen, rejected = example.responses
        rows.append(
            {
                "prompt": as_column(chosen.prompt),
                "chosen": as_column(chosen.response),
                "rejected": as_column(rejected.response),
            }
        )
    contents = [
        text if isinstance(text, str) else "\n".join(turn["content"] for turn in text)
        for row in rows
        for text in (row["prompt"] + row["chosen"],)
    ]
    spec = byte_level_bpe(contents, folder, template)
    source = folder / "columns.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    trainer, args = (
        DPOTrainer.__new__(DPOTrainer),
        DPOConfig(output_dir=str(folder / "trl"), use_cpu=True, bf16=False, report_to="none"),
    )
    dialogues = [row["prompt"] + row[side] for row in rows for side in ("chosen", "rejected")]
    ratios, alone = [], []
    for _ in range(rounds):
        theirs = AutoTokenizer.from_pretrained(spec, trust_remote_code=False)
        ours = load_tokenizer(spec)
        table = datasets.Dataset.from_list(rows)
        trainer._tokenizer, trainer._is_vlm = theirs, False  # as its constructor sets them
        trl = cpu(lambda t=theirs, d=table: trainer._prepare_dataset(d, t, args, "train"))
        build = cpu(lambda t=ours: build_dataset([source], t, folder / "out"))
        texts = dialogues
        if template:
            texts = [theirs.apply_chat_template(turns, tokenize=False) for turns in dialogues]
        tokenizer = AutoTokenizer.from_pretrained(spec, trust_remote_code=False)
        encode = tokenizer.backend_tokenizer.encode_batch_fast
        encoding = cpu(lambda e=encode, t=texts: [e([x], add_special_tokens=False) for x in t])
        ratios.append(trl / build)
        alone.append(build / encoding)
    return ratios, alone


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--input", type=Path, required=True, help="HH-RLHF pairs, gzipped")
    parser.add_argument("--tokenizer", required=True, help="a SentencePiece model")
    parser.add_argument("--chat", type=Path, help="conversations, gzipped")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--times", type=int, default=90, help="how often the file is repeated, for workers"
    )
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        long = repeated(args.input, args.times, folder)
        walls, gains = of_workers(long, args.tokenizer, args.rounds, folder)
        measured = {
            "build / tokenising, one worker (CPU)": (
                against_tokenising(args.input, args.tokenizer, args.rounds, folder),
                "at most 1.15",
            ),
            "one worker / two workers (wall)": (
                walls,
                "at least 1.8",
            ),
            "the same on two idle cores, from CPU time of all processes": (
                gains,
                "at least 1.8",
            ),
            "TRL's preparation / build (CPU)": (
                against_trl(args.input, args.rounds, folder)[0],
                "at least 2",
            ),
        }
        if args.chat:
            (folder / "chat").mkdir()
            ratios, alone = against_trl(args.chat, args.rounds, folder / "chat", CHATML)
            measured["conversations: TRL's preparation / build (CPU)"] = ratios, "at least 1.25"
            measured["conversations: build / tokenising (CPU)"] = alone, "at most 1.15"
    rows = [
        {
            "ratio": ratio,
            "median": f"{statistics.median(values):.2f}",
            "least": f"{min(values):.2f}",
            "most": f"{max(values):.2f}",
            "wanted": wanted,
        }
        for ratio, (values, wanted) in measured.items()
    ]
    load = os.getloadavg()[0] / (os.cpu_count() or 1)
    publish(
        "build",
        rows,
        f"{args.rounds} rounds in turn. Other programs ran on the machine: {load:.1f} processes "
        "per core at the end. This affects the wall times of two workers most.",
    )


if __name__ == "__main__":
    main()
