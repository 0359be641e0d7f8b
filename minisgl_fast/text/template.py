"""ChatTemplate: messages to the text of a prompt, as transformers' apply_chat_template renders it.

Rules:
- jinja2's immutable sandbox with transformers' settings, filters and globals; compiled once.
- A plain conversation is rendered by quick_template.py where the template agrees with it.
- The template is the operator's, the messages are the client's: what goes wrong while rendering is
  a RequestError(param="messages"); the number of messages and the length of the text are bounded.
- Templates ignore what they do not know, silently. So before rendering: text parts become one
  string, role ``developer`` becomes ``system``, content null becomes "", ``reasoning`` is
  ``reasoning_content``, and the arguments of tool calls take the form that the template writes
  without escapes (tool_history.py).
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from minisgl_fast.errors import ModelError, RequestError
from minisgl_fast.text.quick_template import Messages, QuickTemplate, quick_template
from minisgl_fast.text.tokenizer_config import load_tokenizer_config
from minisgl_fast.text.tool_history import PROBE, PROBE_ARGUMENTS, with_arguments

MAX_MESSAGES = 4096  # rendering takes some 15 us a message, on the event loop
MAX_CHARACTERS = 64 * 2**20  # of the rendered text
MAX_ERROR_CHARACTERS = 500
# Variables that are the request's own fields.
RESERVED = frozenset(("messages", "tools", "documents", "add_generation_prompt"))


class ChatTemplate:
    """A model's chat templates: "default", and "tool_use" where tools have one of their own."""

    def __init__(
        self, sources: Mapping[str, str], special_tokens: Mapping[str, str] | None = None
    ) -> None:
        """``sources``: jinja texts by name, maybe none. ModelError if one does not compile."""
        self._templates = {name: _compile(name, source) for name, source in sources.items()}
        self._special_tokens = dict(special_tokens or {})
        self._takes_text: dict[str, bool] = {}  # arguments, by the template's name
        self.source = "\n".join(sources.values())
        self._quick: QuickTemplate | None = None
        if "default" in sources:
            self._quick = quick_template(sources["default"], self._render_probe)

    @classmethod
    def load(cls, path: str | Path, override: str | None = None) -> ChatTemplate:
        """From a model folder or .gguf file. ``override``: a file, or a template itself."""
        config = load_tokenizer_config(Path(path))
        sources = config.chat_templates
        if override is not None:
            sources = {"default": _read_override(override)}
        return cls(sources, config.special_tokens)

    def __bool__(self) -> bool:
        """Whether there is a template at all."""
        return "default" in self._templates

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        documents: Sequence[Mapping[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt's text, special tokens written out (encode it without adding any).

        ``chat_template_kwargs``: the client's own variables, such as ``enable_thinking``.
        ``continue_final_message``: the prompt ends with the last message's content; no generation
        prompt is added then.
        RequestError(param="messages") if the template cannot render the messages.
        """
        name = "tool_use" if tools and "tool_use" in self._templates else "default"
        template = self._templates.get(name)
        if template is None:
            raise RequestError(
                "This model has no chat template. Use /v1/completions, or start the server with "
                "--chat-template.",
                param="messages",
            )
        if not messages or len(messages) > MAX_MESSAGES:
            raise RequestError(
                f"messages must hold 1 to {MAX_MESSAGES} messages, got {len(messages)}.",
                param="messages",
            )
        plain_form = not (tools or documents or continue_final_message)
        if self._quick is not None and plain_form:
            text = self._quick.render(messages, add_generation_prompt, chat_template_kwargs or {})
            if text is not None and len(text) <= MAX_CHARACTERS:
                return text
        variables = dict(chat_template_kwargs or {})
        reserved = RESERVED.intersection(variables)
        if reserved:
            raise RequestError(
                f"chat_template_kwargs must not hold {sorted(reserved)[0]!r}.",
                param="chat_template_kwargs",
            )
        plain = [_plain(index, message) for index, message in enumerate(messages)]
        if any("tool_calls" in message for message in plain):
            as_text = self._takes_text_arguments(name, template)
            plain = [with_arguments(i, message, as_text) for i, message in enumerate(plain)]
        variables = {
            **self._special_tokens,
            **variables,
            "messages": plain,
            "tools": tools,
            "documents": documents,
            "add_generation_prompt": add_generation_prompt and not continue_final_message,
        }
        if continue_final_message:
            return _render_open(template, variables, plain[-1])
        return _render(template, variables)

    def _render_probe(
        self, messages: Messages, add_generation_prompt: bool, variables: Mapping[str, Any]
    ) -> str | None:
        """What jinja2 makes of a probe of QuickTemplate."""
        try:
            return self.render(
                messages,
                add_generation_prompt=add_generation_prompt,
                chat_template_kwargs=variables,
            )
        except RequestError:
            return None

    def _takes_text_arguments(self, name: str, template: jinja2.Template) -> bool:
        """Whether the template writes arguments in JSON text as they are; tried out once."""
        if name not in self._takes_text:
            variables = {**self._special_tokens, "messages": PROBE, "add_generation_prompt": False}
            try:
                rendered = _render(template, {**variables, "tools": None, "documents": None})
            except RequestError:
                rendered = ""
            self._takes_text[name] = PROBE_ARGUMENTS in rendered
        return self._takes_text[name]


def _render(template: jinja2.Template, variables: dict[str, Any]) -> str:
    pieces = []
    num_characters = 0
    try:
        for piece in template.generate(variables):
            pieces.append(piece)
            num_characters += len(piece)
            if num_characters > MAX_CHARACTERS:
                break
    except _RaisedByTemplate as error:
        raise RequestError(error.text[:MAX_ERROR_CHARACTERS], param="messages") from error
    except Exception as error:  # any operation of the template may meet a value it did not expect
        raise RequestError(
            "The model's chat template cannot render these messages.", param="messages"
        ) from error
    if num_characters > MAX_CHARACTERS:
        raise RequestError(
            f"The rendered messages are longer than {MAX_CHARACTERS} characters.", param="messages"
        )
    return "".join(pieces)


def _render_open(template: jinja2.Template, variables: dict[str, Any], last: dict[str, Any]) -> str:
    """The text up to the end of the last message's content.

    A mark that no message has stands there while the template renders. As in transformers, blanks
    at the content's end go where the template trims them.
    """
    mark = f"<{secrets.token_hex(16)}>"
    last["content"] += mark + " "
    text = _render(template, variables)
    at = text.rfind(mark)
    if at < 0:
        raise RequestError(
            "The model's chat template does not show the last message, so it cannot be continued.",
            param="continue_final_message",
        )
    is_trimmed = not text.startswith(" ", at + len(mark))
    text = text[:at].replace(mark + " ", "").replace(mark, "")  # where it is shown earlier too
    return text.rstrip() if is_trimmed else text


def message_text(message: Mapping[str, Any]) -> str:
    """The text of a message, its parts joined."""
    text = _plain(0, message)["content"]
    return text if isinstance(text, str) else ""


def _plain(index: int, message: Mapping[str, Any]) -> dict[str, Any]:
    """The message as templates expect it; the client's own object stays as it is."""
    plain = dict(message)
    if plain.get("role") == "developer":
        plain["role"] = "system"
    content = plain.get("content")
    if content is None:
        plain["content"] = ""
    elif isinstance(content, (list, tuple)):
        plain["content"] = "".join(_part_text(index, part) for part in content)
    if "reasoning" in plain and plain.get("reasoning_content") is None:
        plain["reasoning_content"] = plain.pop("reasoning")
    if "tool_calls" in plain and not plain["tool_calls"]:
        del plain["tool_calls"]  # templates ask whether the key is there
    return plain


def _part_text(index: int, part: Any) -> str:
    if isinstance(part, str):
        return part
    if isinstance(part, Mapping):
        kind = part.get("type", "text")
        text = part.get("refusal" if kind == "refusal" else "text")
        if kind in ("text", "input_text", "refusal") and isinstance(text, str):
            return text
    raise RequestError(f"messages[{index}].content must hold text parts only.", param="messages")


def _read_override(override: str) -> str:
    if any(mark in override for mark in ("{{", "{%", "\n")):
        return override
    try:
        return Path(override).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ModelError(
            f"--chat-template {override!r} is neither a readable file nor a template."
        ) from error


# transformers' environment


class _RaisedByTemplate(jinja2.TemplateError):
    """The template called raise_exception: its text is written for whoever wrote the messages."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.text = text


class _Generation(Extension):
    """``{% generation %}`` marks what the assistant wrote, for training; here it does nothing."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body).set_lineno(line)


class _Namespace(Namespace):
    """jinja2's ``namespace`` without underscored names, behind which CPython's internals lie."""

    def __init__(*args: Any, **attributes: Any) -> None:  # ``self`` may name an attribute
        self, *sources = args
        attributes = dict(*sources, **attributes)
        for name in attributes:
            _check_name(name)
        Namespace.__init__(self, attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: object) -> None:
    if not isinstance(name, str) or name.startswith("_"):
        raise SecurityError(f"{name!r} cannot be set on a namespace")


class _Dict:
    """``dict`` as templates use it, without the type and its attributes."""

    def __call__(self, *args: Any, **items: Any) -> dict[Any, Any]:
        return dict(*args, **items)

    def fromkeys(self, keys: Any, value: Any = None) -> dict[Any, Any]:
        return dict.fromkeys(keys, value)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Plain JSON: jinja2's own filter would escape <, >, & and ' for HTML."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _raise_exception(message: object = "") -> NoReturn:
    raise _RaisedByTemplate(str(message))


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    environment.globals["namespace"] = _Namespace
    environment.globals["dict"] = _Dict()
    return environment


def _compile(name: str, source: str) -> jinja2.Template:
    try:
        return _environment().from_string(source)
    except jinja2.TemplateError as error:
        raise ModelError(f"The chat template {name!r} does not compile: {error}.") from error
