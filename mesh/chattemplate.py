"""A model's chat template: messages to prompt text, in a sandbox, with what Hugging Face templates expect.

Templates come with the model, so the sandbox gives them no attribute that changes anything outside, and they see
nothing but plain JSON values. They may use `tojson`, `raise_exception`, `strftime_now`, `break`/`continue` and the
`{% generation %}` tag (which marks training text and renders as its content).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, NoReturn

import jinja2
import jinja2.ext
from jinja2 import nodes
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from mesh.errors import RequestError

Message = Mapping[str, Any]


class _GenerationTag(jinja2.ext.Extension):
    """`{% generation %}...{% endgeneration %}` renders its content."""

    tags = {"generation"}  # noqa: RUF012  (the base class declares it so)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own filter escapes HTML, which would change the prompt."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols, _GenerationTag]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


class ChatTemplate:
    """A compiled template.

    `sources` maps names to template texts; `default` is used, or `tool_use` (where it exists) when tools are
    given. `special_tokens` are variables of every rendering (`bos_token`, `eos_token`, ...). Raises
    `jinja2.TemplateError` for a text that is no template, `KeyError` when there is no `default`.
    """

    def __init__(self, sources: Mapping[str, str], special_tokens: Mapping[str, str]) -> None:
        environment = _environment()
        self._default = environment.from_string(sources["default"])
        self._tool_use = environment.from_string(sources.get("tool_use", sources["default"]))
        self._special_tokens = dict(special_tokens)
        self.text = "\n".join(sources.values())
        """All of it: what a model's formats are, is written in its template."""
        self.knows_developer_role = "developer" in sources["default"]

    def render(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] | None = None,
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        **variables: Any,
    ) -> str:
        """The prompt. `variables` reach the template under their own names.

        `continue_final_message` leaves the last message open, so that the model goes on with it. Raises
        `RequestError` 400 when the template refuses these messages or fails on them.
        """
        values = {**self._special_tokens, "documents": None, **variables}
        values |= {
            "messages": [dict(message) for message in messages],
            "tools": list(tools) if tools else None,
            "add_generation_prompt": add_generation_prompt and not continue_final_message,
        }
        template = self._tool_use if tools else self._default
        try:
            text = template.render(values)
        except Exception as error:  # a template is a program of the model's author: it may fail in any way
            raise RequestError(
                400, f"The model's chat template refuses these messages: {_sentence(error)}", param="messages"
            ) from None
        return _reopened(text, messages[-1]) if continue_final_message else text


def _sentence(error: Exception) -> str:
    """The template author's own sentence, or the kind of failure; bounded, for it may quote the request."""
    if isinstance(error, jinja2.TemplateError) and error.message:
        return error.message[:200]
    return type(error).__name__


def _reopened(text: str, last: Message) -> str:
    """`text` cut after the last message's content: what a template adds to close the message goes."""
    content = last.get("content")
    if isinstance(content, str) and content.strip():
        for ending in (content, content.rstrip(), content.strip()):
            at = text.rfind(ending)
            if at >= 0:
                return text[: at + len(ending)]
    raise RequestError(
        400,
        "continue_final_message needs a last message whose text the chat template keeps as it is.",
        param="continue_final_message",
    )
