"""Parts of a data set to look at: one tree as text or values, one packed row."""

from __future__ import annotations

from typing import Any

import numpy as np

from megatron_prefix.data.inspect.images import image_cells, image_values, node_text
from megatron_prefix.data.steps import MicroBatch, Sampler, group_rows
from megatron_prefix.data.steps.compositions import RowBatches
from megatron_prefix.data.store import PreferenceDataset
from megatron_prefix.data.tokenize import Tokenizer, load_tokenizer
from megatron_prefix.data.tree import PrefixTree
from megatron_prefix.errors import InputError
from megatron_prefix.text import align, counted

TEXT_WIDTH = 64
IDS_SHOWN = 6


def packed_rows(dataset: PreferenceDataset, row_capacity: int) -> RowBatches:
    """The rows of whole trees that training takes with `rows_per_step: 1` and seed 0."""
    lengths = dataset.groups_num_tokens()
    if lengths.max() > row_capacity:
        raise InputError(
            f"--row-capacity is {row_capacity} and group {lengths.argmax()} of {dataset.prefix} "
            f"has {counted(lengths.max(), 'token')}: raise it, or build with a smaller --max-length"
        )
    return RowBatches(lengths, row_capacity, 1, dataset.fingerprint, 0)


def packed_row(
    dataset: PreferenceDataset, row: int, row_capacity: int
) -> tuple[MicroBatch, list[int]]:
    """One packed row of whole trees, in the order of seed 0, and its groups."""
    rows = packed_rows(dataset, row_capacity)
    if not 0 <= row < rows.num_steps(1):
        raise InputError(f"--row is {row}: an epoch has rows 0 to {rows.num_steps(1) - 1}")
    sampler = Sampler(dataset=dataset, composition=rows, row_capacity=row_capacity)
    step = sampler.step(row)
    groups = [bundle.group for bundle in step.rows[0][0]]
    return sampler.micro_batches(step)[0], groups


def tree_row(dataset: PreferenceDataset, group: int) -> MicroBatch:
    """One tree alone as a row."""
    return group_rows(dataset, _checked_group(dataset, group))[0]


def find_tokenizer(dataset: PreferenceDataset) -> tuple[Tokenizer | None, str]:
    """The data set's tokenizer if it still exists and is the same; if not, None and the reason."""
    described = dataset.manifest["tokenizer"]
    try:
        tokenizer = load_tokenizer(described["name"])
    except InputError as error:
        return None, str(error)
    if tokenizer.fingerprint != described["fingerprint"]:
        return None, f"tokenizer {described['name']} has changed since the build"
    return tokenizer, ""


def tree_dict(dataset: PreferenceDataset, group: int) -> dict[str, Any]:
    """One tree as plain values; NaN scores and margins become None."""
    tree, mismatches = dataset[_checked_group(dataset, group)], _mismatches(dataset, group)
    return {
        "group": group,
        "record": int(dataset.group_records[group]),
        "nodes": [
            {"parent": int(tree.parents[n]), "tokens": tree.node_tokens(n).tolist()}
            for n in range(tree.num_nodes)
        ],
        "responses": [
            {
                "nodes": tree.response_nodes(r),
                "set": int(tree.response_sets[r]),
                "rank": int(tree.ranks[r]),
                "score": _known(tree.scores[r]),
                **({"is_mismatch": r in mismatches} if mismatches else {}),
            }
            for r in range(tree.num_responses)
        ],
        "pairs": [
            {
                "chosen": int(tree.pairs[p, 0]),
                "rejected": int(tree.pairs[p, 1]),
                "weight": float(tree.pair_weights[p]),
                "margin": _known(tree.pair_margins[p]),
                **({} if np.isnan(tree.pair_betas[p]) else {"beta": float(tree.pair_betas[p])}),
            }
            for p in range(tree.num_pairs)
        ],
        **({"images": image_values(dataset, tree)} if dataset.images is not None else {}),
    }


def _mismatches(dataset: PreferenceDataset, group: int) -> list[int]:
    """The responses of a group that are of another prompt."""
    r0, r1 = (int(x) for x in dataset.group_responses[group : group + 2])
    return np.flatnonzero(dataset.response_roles[r0:r1]).tolist()


def _known(value: float) -> float | None:
    return None if np.isnan(value) else float(value)


def _checked_group(dataset: PreferenceDataset, group: int) -> int:
    if not 0 <= group < len(dataset):
        raise InputError(f"--tree is {group}: {dataset.prefix} has groups 0 to {len(dataset) - 1}")
    return group


def tree_text(dataset: PreferenceDataset, group: int) -> str:
    """One tree as text: its branches, what each node has loss for, ranks, scores and pairs.

    ├─ [1] 12 tokens  loss of 0 (ends)  ' Yes, gladly.<eos>'
    """
    tree = dataset[_checked_group(dataset, group)]
    tokenizer, reason = find_tokenizer(dataset)
    mismatches = _mismatches(dataset, group)
    own = tree.num_responses - len(mismatches)
    lines = [
        f"group {group} of {dataset.prefix}, record {int(dataset.group_records[group])}: "
        f"{counted(tree.num_tokens, 'token')}, {counted(tree.num_nodes, 'node')}, "
        f"{counted(own, 'response')}, {counted(tree.num_pairs, 'pair')}"
        + (f", {len(mismatches)} mismatch of another prompt" if mismatches else "")
        + (f", {counted(len(tree.images), 'image')}" if tree.images is not None else "")
    ]
    if tokenizer is None:
        lines.append(f"(token ids instead of text: {reason})")
    lines += _branch_lines(tree, tokenizer)
    lines += ["", "responses"]
    lines += align([_response_cells(tree, r, r in mismatches) for r in range(tree.num_responses)])
    lines += ["pairs"]
    lines += align([_pair_cells(tree, p) for p in range(tree.num_pairs)])
    if images := image_values(dataset, tree):
        lines += ["images", *align([image_cells(values) for values in images])]
    return "\n".join(lines)


def _branch_lines(tree: PrefixTree, tokenizer: Tokenizer | None) -> list[str]:
    children: dict[int, list[int]] = {}
    for node, parent in enumerate(tree.parents.tolist()):
        children.setdefault(parent, []).append(node)
    losses = _losses(tree)
    lines: list[str] = []
    roots = children[-1]
    stack = [(node, "", node == roots[-1]) for node in reversed(roots)]
    while stack:
        node, indent, is_last = stack.pop()
        length = int(tree.node_lengths[node])
        head = f"{indent}{'└─' if is_last else '├─'} [{node}] {counted(length, 'token')}"
        lines.append(f"{head}  {losses[node]}  {_content(tree, node, tokenizer)}")
        below = children.get(node, [])
        indent += "   " if is_last else "│  "
        stack += [(child, indent, child == below[-1]) for child in reversed(below)]
    return lines


def _losses(tree: PrefixTree) -> list[str]:
    """For each node, the responses that have loss on its tokens.

    "prompt" means none. "loss of 0, 1 (0 ends)" means responses 0 and 1, and 0 ends here.
    """
    carried: list[list[int]] = [[] for _ in range(tree.num_nodes)]
    for response in range(tree.num_responses):
        for node in tree.response_nodes(response):
            carried[node].append(response)
    texts = []
    for node, responses in enumerate(carried):
        if not responses:
            texts.append("prompt")
            continue
        ends = [str(r) for r in responses if tree.response_last[r] == node]
        text = f"loss of {', '.join(map(str, responses))}"
        texts.append(text + (f" ({', '.join(ends)} ends)" if ends else ""))
    return texts


def _content(tree: PrefixTree, node: int, tokenizer: Tokenizer | None) -> str:
    if tokenizer is None:
        ids = tree.node_tokens(node)
        if len(ids) <= 2 * IDS_SHOWN:
            return str(ids.tolist())
        shown = [", ".join(map(str, part.tolist())) for part in (ids[:IDS_SHOWN], ids[-IDS_SHOWN:])]
        return f"[{shown[0]}, …, {shown[1]}]"
    text = repr(node_text(tree, node, tokenizer))
    half = TEXT_WIDTH // 2
    return text if len(text) <= TEXT_WIDTH else f"{text[: half - 2]} … {text[-half + 1 :]}"


def _response_cells(tree: PrefixTree, response: int, is_mismatch: bool) -> list[str]:
    tokens, loss_start = tree.response_tokens(response)
    rank, score = int(tree.ranks[response]), _known(tree.scores[response])
    return [
        f"  {response}",
        "mismatch" if is_mismatch else f"set {int(tree.response_sets[response])}",
        f"rank {rank}" if rank >= 0 else "no rank",
        f"score {score:g}" if score is not None else "no score",
        f"{loss_start:,} prompt tokens",
        f"{len(tokens) - loss_start:,} with loss",
    ]


def _pair_cells(tree: PrefixTree, pair: int) -> list[str]:
    chosen, rejected = tree.pairs[pair].tolist()
    margin = _known(tree.pair_margins[pair])
    return [
        f"  {chosen} over {rejected}",
        f"weight {tree.pair_weights[pair]:g}",
        f"margin {margin:g}" if margin is not None else "no margin",
        *([] if np.isnan(tree.pair_betas[pair]) else [f"beta {tree.pair_betas[pair]:g}"]),
    ]
