"""Look at a data set: one tree, one packed row, a picture, a survey of the whole."""

from megatron_prefix.data.inspect.describe import packed_row, tree_dict, tree_row, tree_text
from megatron_prefix.data.inspect.measure import survey
from megatron_prefix.data.inspect.picture import draw_row
from megatron_prefix.data.inspect.report import survey_text
from megatron_prefix.data.inspect.side_by_side import compare_surveys

__all__ = [
    "compare_surveys",
    "draw_row",
    "packed_row",
    "survey",
    "survey_text",
    "tree_dict",
    "tree_row",
    "tree_text",
]
