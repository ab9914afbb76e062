"""What the names of columns say: whether one can change the text that a model reads.

question, system_prompt, chosen_reasoning    can change the text: refused if it is not read
images, video_path, audio                    so can these, and nothing reads them
id, source, model_name, rating, created_at   describe a record: listed if they are not read
anything else                                listed, but it may hold the prompt of plain texts
"""

from __future__ import annotations

import re
from functools import lru_cache

QUESTIONS = ("question", "query", "problem", "user_prompt", "user", "input")
"""Columns that may hold a question; the first that a record has counts."""
RESPONSE_TEXTS = ("response", "answer", "completion", "generation", "text")
"""Fields of an entry that may hold a response; the first that it has counts."""
RESPONSE_SCORES = ("score", "reward", "rating", "helpfulness")
"""Fields of an entry that may hold its score; the first that it has counts."""
VERDICTS = (
    "better_response_id",
    "winner",
    "preference",
    "preferred",
    "preferred_response",
    "choice",
    "better",
    "overall_preference",
    "preference_strength",
    "winner_model_a",
)
"""Columns that name the better of two responses."""
TEXT = frozenset(
    """
    question questions query queries input inputs input_text instruction instructions prompt prompts
    prompt_text user human user_input user_message problem problem_statement post posts article
    articles document documents doc docs passage passages context contexts background premise
    story paragraph dialogue dialogues dialog dialogs conversation conversations message messages
    chat chat_history history histories trajectory trajectories turns system systems system_message
    sys_prompt system_text persona personas character role_description tool tools function functions
    function_call function_calls tool_call tool_calls tool_response tool_responses reasoning
    reasoning_content reasoning_steps thinking thought thoughts chain_of_thought cot scratchpad
    chat_template_kwargs template_kwargs chat_template enable_thinking add_generation_prompt
    knowledge evidence facts search_results retrieved_documents demonstrations demonstration
    few_shot few_shot_examples exemplars suffix prefix quotes title_and_text task_description
    request requests scenario preamble
    """.split()
)
"""Names of columns and fields that can change the text that a model reads."""
ENDINGS = (
    "_prompt",
    "_question",
    "_query",
    "_instruction",
    "_instructions",
    "_context",
    "_history",
    "_messages",
    "_conversation",
    "_conversations",
    "_dialogue",
    "_reasoning",
    "_reasoning_content",
    "_thinking",
    "_system",
    "_tools",
)
"""Endings of names that can change the text: user_query, chosen_messages."""
OF_JUDGES = re.compile(
    r"(label+ing|generation|judge?|annotator|annotation|critic|critique|evaluation|evaluator|grader|"
    r"grading|rating|feedback|raw|original|orig|verifier|reward|rubric)_.*"
)
"""Names of what judges and makers of a data set read: labelling_prompt, raw_prompt."""
MEDIA = re.compile(
    r"(.*_)?(image|images|img|imgs|picture|pictures|photo|photos|video|videos|audio|audios|speech|"
    r"pixel_values|frames)(_(path|paths|url|urls|file|files|bytes|list|base64|id|ids|name|names))?"
)
PICTURES = re.compile(
    r"(.*_)?(image|images|img|imgs|picture|pictures|photo|photos)"
    r"(_(path|paths|url|urls|file|files|bytes|list|base64|id|ids|name|names))?"
)
"""Those of them that are about pictures."""
LABELS = re.compile(
    r"(.*_)?([a-z]{0,3}id|ids|uuid|idx|index|key|hash|sha256|md5|source|sources|dataset|datasets|subset|"
    r"split|origin|category|categories|domain|topic|tag|tags|label|labels|task|type|types|kind|"
    r"lang|language|languages|locale|model|models|engine|policy|provider|version|license|url|urls|"
    r"date|time|timestamp|tstamp|created|updated|score|scores|rating|ratings|rank|ranks|reward|"
    r"rewards|weight|margin|status|state|level|difficulty|quality|worker|annotator|judge|winner|"
    r"batch|order|len|length|tokens|count|num|meta|metadata|info|rationale|critique|feedback|"
    r"explanation|reason|comment|hint|gold|answer_key|ground_truth|file|path|name|author|seed)"
    r"(_.*)?|(num|is|has|in|n)_.*|.*_(at|utc|ratio)"
)
"""Names of what describes a record: of its texts' origin, judgement or size."""


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "_", re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower()).strip("_")


@lru_cache(maxsize=4096)
def is_media(name: str) -> bool:
    """Whether a column or field holds pictures, films or sounds, by its name."""
    return bool(MEDIA.fullmatch(_plain(name)))


def is_of_image(name: str) -> bool:
    """Whether a column or field holds pictures, or says which they are, by its name."""
    return bool(PICTURES.fullmatch(_plain(name)))


@lru_cache(maxsize=4096)
def changes_text(name: str) -> bool:
    """Whether a column or field can change the text that a model reads, by its name."""
    plain = _plain(name)
    if OF_JUDGES.fullmatch(plain):
        return False
    side = re.sub(r"^(chosen|rejected|rejecting)_", "", plain)
    numbered = re.sub(r"_?\d+$", "", side)
    return not {plain, side, numbered}.isdisjoint(TEXT) or plain.endswith(ENDINGS)


def is_label(name: str) -> bool:
    """Whether a column describes its record, by its name, and is no text of the conversation."""
    plain = _plain(name)
    return not changes_text(name) and bool(LABELS.fullmatch(plain) or OF_JUDGES.fullmatch(plain))
