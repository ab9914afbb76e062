"""Groups and data sets for tests of the data packages."""

import json

import numpy as np

from megatron_prefix.__main__ import main
from megatron_prefix.data.files.checksums import file_entry, manifest_digest
from megatron_prefix.data.store.dataset import PreferenceDataset
from megatron_prefix.data.store.manifest import fingerprint, suffix_path
from megatron_prefix.data.store.writer import DatasetWriter
from megatron_prefix.data.tree import Pair, ResponsePath, build_tree

TOKENIZER = {"kind": "bytes", "name": "test", "vocab_size": 100, "fingerprint": "f" * 64}
VOCAB = 7


def random_tree(rng, vocab_size=100):
    """Two comparison sets, the second below a response of the first."""
    prompt = rng.integers(0, vocab_size, rng.integers(1, 6)).tolist()
    answers = [rng.integers(0, vocab_size, rng.integers(1, 5)).tolist() for _ in range(3)]
    deeper = prompt + answers[0] + rng.integers(0, vocab_size, 2).tolist()
    tails = [rng.integers(0, vocab_size, rng.integers(1, 5)).tolist() for _ in range(2)]
    rows = [(prompt, a, 0) for a in answers] + [(deeper, t, 1) for t in tails]
    paths = [
        ResponsePath(
            tokens=np.array(p + a, np.int64),
            loss_start=len(p),
            set_id=s,
            rank=i,
            score=float(rng.normal()) if i % 2 else float("nan"),
        )
        for i, (p, a, s) in enumerate(rows)
    ]
    pairs = [
        Pair(chosen=0, rejected=1, weight=0.5, margin=1.25),
        Pair(chosen=2, rejected=0),
        Pair(chosen=3, rejected=4),
    ]
    return build_tree(paths, pairs)


def write(prefix, trees, tokenizer=TOKENIZER, records=None):
    with DatasetWriter(prefix, tokenizer) as writer:
        for i, tree in enumerate(trees):
            writer.add(tree, records[i] if records else i)
        return writer.finish({"format": "test"})


def assert_same(a, b):
    for name in vars(a):
        left, right = getattr(a, name), getattr(b, name)
        if left is None or right is None:
            assert left is right, name
            continue
        assert left.dtype == right.dtype and np.array_equal(
            left, right, equal_nan="f" in left.dtype.str
        )


def edit_manifest(prefix, change):
    """Change a manifest and compute its own checksum again."""
    path = suffix_path(prefix, ".json")
    manifest = json.loads(path.read_text())
    change(manifest)
    manifest["sha256"] = manifest_digest(manifest)
    path.write_text(json.dumps(manifest))


def damage(prefix, name, at, value):
    """Change one entry and make all checksums fit again, so that only the layout is wrong."""
    path = suffix_path(prefix, f".tree/{name}.npy")
    column = np.load(path, mmap_mode="r+")
    column[at] = value
    column.flush()

    def seal(manifest):
        manifest["files"][f".tree/{name}.npy"] = file_entry(path)
        manifest["fingerprint"] = fingerprint(manifest["files"], manifest["tokenizer"])

    edit_manifest(prefix, seal)


def random_group(rng):
    """Response paths and pairs of a conversation of up to 4 turns.

    A response may merge with the last token of its prompt, so that its loss starts one token
    earlier than its siblings'; with 7 tokens responses often share a beginning, and now and
    then one is the beginning of another.
    """
    paths, pairs = [], []
    prompt = rng.integers(0, VOCAB, rng.integers(2, 6))
    for set_id in range(int(rng.integers(1, 5))):
        first = len(paths)
        for rank in range(int(rng.integers(2, 5))):
            start = len(prompt) - int(rng.random() < 0.25)
            tokens = np.concatenate([prompt[:start], rng.integers(0, VOCAB, rng.integers(1, 6))])
            paths.append(
                ResponsePath(
                    tokens=tokens, loss_start=start, set_id=set_id, rank=rank, score=rng.normal()
                )
            )
        sides = [(a, b) for a in range(first, len(paths)) for b in range(a + 1, len(paths))]
        for index in rng.permutation(len(sides))[: rng.integers(1, len(sides) + 1)]:
            chosen, rejected = rng.permutation(sides[index]).tolist()
            weight, margin = float(rng.uniform(0.5, 2)), float(rng.normal())
            numbers = {"weight": weight, "margin": margin, "beta": 2 * weight}
            pairs.append(Pair(chosen=chosen, rejected=rejected, **numbers))
        prompt = np.concatenate([paths[first].tokens, rng.integers(0, VOCAB, rng.integers(1, 4))])
    return paths, pairs


def path(tokens, loss_start, **kwargs):
    return ResponsePath(tokens=np.array(tokens), loss_start=loss_start, **kwargs)


def three_responses():
    paths = [path([5, 6, 7, 8], 2), path([5, 6, 7, 9, 2], 2), path([5, 6, 7], 2)]
    pairs = [Pair(chosen=0, rejected=1), Pair(chosen=2, rejected=0, weight=0.5, margin=3.0)]
    return build_tree(paths, pairs)


def write_groups(prefix, groups):
    tokenizer = {"name": "seven", "vocab_size": 7, "fingerprint": "7"}
    with DatasetWriter(prefix, tokenizer) as writer:
        for record, (paths, pairs) in enumerate(groups):
            writer.add(build_tree(paths, pairs), record)
        writer.finish()
    return PreferenceDataset(prefix)


def inspect(capsys, *args):
    code = main(["inspect", *map(str, args)])
    captured = capsys.readouterr()
    return code, captured.out, captured.err
