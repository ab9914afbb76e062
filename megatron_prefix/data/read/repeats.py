"""Responses that begin with their own prompt, which would then be there twice.

prompt "2 + 2 =" with the response "2 + 2 = 4" reads "2 + 2 =2 + 2 = 4": chosen is a whole text
"""

from __future__ import annotations

from megatron_prefix.data.read.formats import Example, ExampleResponse

FEWEST_WORDS = 3
"""Words of a user's message; people answer "Good morning" with the same words."""
NOTE_REPEATED = (
    "responses that begin with their whole prompt, which is there twice "
    "(--format hh reads whole texts)"
)


def repeat_notes(example: Example) -> list[str]:
    """A note for each response that begins with its prompt, or with the user's last message."""
    return [NOTE_REPEATED for response in example.responses if _repeats(response)]


def _repeats(response: ExampleResponse) -> bool:
    prompt, answer = response.prompt, response.response
    if not isinstance(prompt, str):
        asked = prompt[-1].content.strip() if prompt and prompt[-1].role == "user" else ""
        if len(asked.split()) < FEWEST_WORDS:
            return False
    else:
        asked = prompt.strip()
    answer = (answer if isinstance(answer, str) else answer[0].content if answer else "").strip()
    return bool(asked) and len(answer) > len(asked) and answer.startswith(asked)
