"""Arguments of tool calls in the form that a chat template can write: an object, or JSON text.

    template `{{ call.arguments | tojson }}`    given the text {"a": 1}: writes it quoted
    template `'call ' + call.arguments`         given an object: fails

OpenAI's messages have texts, other data has objects. A template is tried once with both forms. If
it writes only one of them well, the other is converted; else arguments stay as they are.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from megatron_prefix.errors import InputError

PROBE = "probe"


class ArgumentForm:
    """Converts the arguments of tool calls for one chat template.

    `apply` renders messages; it is called only once there is a message with tool calls.
    """

    def __init__(self, apply: Callable[[list[dict[str, Any]]], str]) -> None:
        self._apply = apply
        self._form: str | None = None

    def adapt(self, turns: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The messages with all arguments in the form that the template needs."""
        if not any("tool_calls" in turn for turn in turns):
            return turns
        if self._form is None:
            self._form = self._needed()
        for turn in turns if self._form else ():
            for call in turn.get("tool_calls", ()):
                function = call.get("function", call) if isinstance(call, dict) else None
                if isinstance(function, dict) and "arguments" in function:
                    function["arguments"] = self._converted(function["arguments"])
        return turns

    def _needed(self) -> str:
        """ "object" or "text" if the template writes only that form well, else ""."""
        with_object, with_text = self._probe({PROBE: 1}), self._probe(json.dumps({PROBE: 1}))
        is_quoted = with_text is not None and f'\\"{PROBE}\\"' in with_text
        if with_object is not None and (with_text is None or is_quoted):
            return "object"
        return "text" if with_object is None and with_text is not None else ""

    def _probe(self, arguments: Any) -> str | None:
        """What the template writes for a call with these arguments; None if it fails."""
        function = {"name": "f", "arguments": arguments}
        calls = [{"id": "call00000", "type": "function", "function": function}]
        try:
            return self._apply(
                [
                    {"role": "user", "content": "a"},
                    {"role": "assistant", "content": "", "tool_calls": calls},
                ]
            )
        except InputError:
            return None

    def _converted(self, arguments: Any) -> Any:
        if self._form == "text":
            return arguments if isinstance(arguments, str) else json.dumps(arguments)
        if not isinstance(arguments, str):
            return arguments
        try:
            decoded = json.loads(arguments)
        except (ValueError, RecursionError):
            return arguments
        return decoded if isinstance(decoded, dict) else arguments
