"""What the names of columns say."""

import pytest

from megatron_prefix.data.read.column_names import changes_text, is_label, is_media
from megatron_prefix.data.read.formats import FORMATS

PUBLISHED = {
    "text": "system question input instruction history trajectory context messages conversation "
    "prompt chosen_prompt system_prompt query user_input document",
    "label": "id prompt_id post_id source origin_dataset origin_split idx ds_name dataset task "
    "parent_id model_a chosen_model models score_ratio upvote_ratio created_at_utc_A domain "
    "language lang tstamp judge in_gsm8k_train status labelling_model labelling_prompt rating "
    "rationale chosen_policy rank_str num_responses chosen_len qid date metadata "
    "original_chosen raw_prompt is_response_0_safe",
    "media": "image images image_path image_url video videos audio audios frames chosen_image "
    "has_image",
}


@pytest.mark.parametrize("kind", PUBLISHED)
def test_names_of_published_sets(kind):
    for name in PUBLISHED[kind].split():
        kinds = {"text": changes_text(name), "label": is_label(name), "media": is_media(name)}
        wrong = {k: v for k, v in kinds.items() if v != (k == kind)}
        if kind == "media":
            wrong.pop("label", None)
        assert not wrong, name


def test_sides_and_numbers_do_not_hide_a_name():
    for name in ("chosen_system", "rejected_thinking", "document_2", "Question", "user-query"):
        assert changes_text(name)
    assert not any(map(changes_text, ("chosen", "rejected", "completion", "answer", "label")))


def test_nothing_is_both_a_label_and_a_text():
    names = {name for format in FORMATS.values() for name in format.columns}
    assert not [name for name in names if changes_text(name) and is_label(name)]
