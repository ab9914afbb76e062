"""Make a small preference set that a tiny model learns in minutes: train.jsonl and valid.jsonl.

Each record is a letter to a shop (the prompt: several hundred bytes, shared by both answers) with
a friendly and an unfriendly answer. Both answers name the same customer, article and day and have
the same number of bytes; only the words of the tone differ. No letter is in both files. The same
seed gives the same files.

    python tools/make_toy_preferences.py --output toy --num-train 2000 --num-valid 200 --seed 1
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

NAMES = "Ada Ben Cleo Dara Emil Fay Gus Hana Ivo June Kofi Lena Milo Nora Otto Pia".split()
TOWNS = "Bergen Cadiz Dover Essen Fargo Genoa Hilo Izmir Jena Kyoto Lagos Malmo".split()
ARTICLES = "lamp chair kettle clock mirror bicycle radio ladder carpet guitar".split()
COLOURS = "red blue green black white yellow brown silver".split()
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday".split()
VERBS = "repair replace collect deliver".split()
FAULTS = (
    "it makes a humming noise whenever the door is open",
    "one corner was already loose when I unpacked it",
    "it stopped after two days and has not moved since",
    "the paint comes off where the sun falls on it",
    "a screw was missing and the paper did not mention it",
)
DETAILS = (
    "I kept the box and the bill, so nothing should stand in the way.",
    "My neighbour has the same one and is quite content with it.",
    "I am at home before noon and again after six in the evening.",
    "Last year you helped my sister with a similar matter.",
    "The shop in our street has closed, so I am writing to you.",
    "It was a present, and I would like to keep it if I can.",
)
TONES = (  # (friendly, unfriendly): words of the same length
    ("happy proud eager merry".split(), "angry upset bored bleak".split()),
    ("gladly kindly surely warmly".split(), "hardly coldly barely rudely".split()),
)
ANSWERS = (
    " {name}, we are {feeling} and will {manner} {verb} the {article} on {day}.",
    " We will {manner} {verb} the {article} on {day}, {name}, and are {feeling}.",
)


def make_record(random_: random.Random) -> dict[str, str]:
    """One letter with its chosen and rejected answer."""
    facts = {
        "name": random_.choice(NAMES),
        "article": random_.choice(ARTICLES),
        "day": random_.choice(DAYS),
        "verb": random_.choice(VERBS),
    }
    first, second, third = random_.sample(DETAILS, 3)
    prompt = (
        f"Letter from {facts['name']} in {random_.choice(TOWNS)}.\n"
        f"Dear shop, on {random_.choice(DAYS)} I bought a {random_.choice(COLOURS)} "
        f"{facts['article']} with the number {random_.randrange(100000, 1000000)} from you, and "
        f"{random_.choice(FAULTS)}. {first} {second} {third} Could you {facts['verb']} it on "
        f"{facts['day']}? I look forward to your answer.\nAnswer:"
    )
    answer = random_.choice(ANSWERS)
    sides = [
        answer.format(feeling=random_.choice(feelings), manner=random_.choice(manners), **facts)
        for feelings, manners in zip(*TONES, strict=True)
    ]
    return {"prompt": prompt, "chosen": sides[0], "rejected": sides[1]}


def make_records(count: int, seed: int) -> list[dict[str, str]]:
    """`count` records with different prompts."""
    random_ = random.Random(seed)
    records: dict[str, dict[str, str]] = {}
    while len(records) < count:
        record = make_record(random_)
        records.setdefault(record["prompt"], record)
    return list(records.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, metavar="DIR")
    parser.add_argument("--num-train", type=int, default=2000, help="records (default: 2000)")
    parser.add_argument("--num-valid", type=int, default=200, help="records (default: 200)")
    parser.add_argument("--seed", type=int, default=1, help="(default: 1)")
    args = parser.parse_args()
    if args.num_train < 1 or args.num_valid < 1:
        parser.error("--num-train and --num-valid must be at least 1")
    args.output.mkdir(parents=True, exist_ok=True)
    records = make_records(args.num_train + args.num_valid, args.seed)
    parts = {"train": records[: args.num_train], "valid": records[args.num_train :]}
    for name, part in parts.items():
        path = args.output / f"{name}.jsonl"
        path.write_text("".join(json.dumps(r) + "\n" for r in part), encoding="utf-8")
        print(f"wrote {path}: {len(part)} records")


if __name__ == "__main__":
    main()
