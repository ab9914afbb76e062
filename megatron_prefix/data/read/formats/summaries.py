"""OpenAI's summarize_from_feedback: a post or an article, two summaries, and the better one."""

from __future__ import annotations

from typing import Any

from megatron_prefix.data.read.fields import column, json_type, optional_text, whole
from megatron_prefix.data.read.formats.base import PAIR_COLUMNS, Example, Format, pair_example
from megatron_prefix.errors import InputError


def read_summaries(record: dict[str, Any]) -> Example:
    """`info` with the text, `summaries` with two texts, `choice` (0 or 1), which is the better.

    The prompt ends with "TL;DR:", as in Stiennon et al. 2020 (arXiv:2009.01325): a post with its
    subreddit and its title, or an article with its title.
    """
    summaries = column(record, "summaries", list)
    texts = []
    for i, item in enumerate(summaries):
        if not isinstance(item, dict):
            raise InputError(f"summaries, entry {i + 1} is {json_type(item)}, not an object")
        texts.append(column(item, "text", str))
    choice = whole(record.get("choice"))
    if len(texts) != 2 or choice not in (0, 1):
        raise InputError(
            f"column 'summaries' has {len(texts)} entries and 'choice' is {record.get('choice')}: "
            "there must be two summaries, and choice must be 0 or 1"
        )
    prompt = _prompt(column(record, "info", dict))
    return pair_example(record, prompt, texts[choice], texts[1 - choice])


def _prompt(info: dict[str, Any]) -> str:
    post, article = (optional_text(info, name) for name in ("post", "article"))
    title = optional_text(info, "title")
    if post:
        parts = [("SUBREDDIT: r/", optional_text(info, "subreddit")), ("TITLE: ", title)]
        parts.append(("POST: ", post))
    elif article:
        parts = [("TITLE: ", title), ("ARTICLE: ", article)]
    else:
        raise InputError("column 'info' has neither 'post' nor 'article'")
    return "\n\n".join([name + text for name, text in parts if text] + ["TL;DR:"])


SUMMARIES = Format(
    read=read_summaries,
    needs=("info", "summaries", "choice"),
    columns=("info", "summaries", "choice", *PAIR_COLUMNS),
    fields=("post", "article", "title", "subreddit", "text"),
)
