"""Writes docs/api.md from the server's own routes, Structs and table of refused fields.

    python tools/make_api_docs.py           write it
    python tools/make_api_docs.py --check   exit with 1 if it is not current

What SGLang and vLLM do with a field stands in docs/api-fields.json.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as FastTokenizer
from tokenizers import models

from minisgl_fast.api.app import Api
from minisgl_fast.api.openapi import document
from minisgl_fast.api.refused import (
    REFUSED,
    REFUSED_IN_CHAT,
    REFUSED_OUTSIDE_CHAT,
    Refusal,
)
from minisgl_fast.api.sampling_fields import SamplingFields
from minisgl_fast.config import Config
from minisgl_fast.server.frontend import Frontend
from minisgl_fast.text.template import ChatTemplate
from minisgl_fast.text.tokenizer import Tokenizer
from minisgl_fast.text.tokenizer_config import TokenizerConfig

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "api.md"
COLUMNS = ROOT / "docs" / "api-fields.json"
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
HEAD = """\
# The HTTP API

Made by `tools/make_api_docs.py` from the routes and the Structs that check their bodies, which a
server shows at `/openapi.json` too. Change those, not this page.

Every body is a JSON object. A field that is not in these tables is ignored; `null` means the
default; a wrong type or a value out of range is a 400 whose `error.param` names the field, before
any event of a stream. Errors have OpenAI's shape, with SGLang's flat keys beside it; Anthropic's
and Ollama's routes have theirs.
"""


def main() -> int:
    text = page(_api())
    if "--check" in sys.argv[1:]:
        return int(PAGE.read_text(encoding="utf-8") != text)
    PAGE.write_text(text, encoding="utf-8")
    return 0


def page(api: Api) -> str:
    """The whole page."""
    described = document(api.routes)
    schemas = described["components"]["schemas"]
    columns: dict[str, list[str]] = json.loads(COLUMNS.read_text(encoding="utf-8"))
    parts = [HEAD, "## Routes\n", _routes(api)]
    parts.append("\n## Fields of a chat\n\n`POST /v1/chat/completions`, beside what SGLang 0.5.23")
    parts.append("and vLLM 0.33.0 do with each.\n")
    parts.append(_fields(schemas, "ChatRequest", columns, "chat"))
    parts.append("\n## Fields of a completion\n\n`POST /v1/completions`: the fields above from")
    parts.append("`model` on, and these.\n")
    chat = schemas["ChatRequest"]["properties"]
    own = {
        name
        for name, field in schemas["CompletionRequest"]["properties"].items()
        if chat.get(name) != field
    }
    parts.append(_fields(schemas, "CompletionRequest", columns, "completions", own))
    parts.append(
        "\n## Fields that are refused\n\nA value that asks for something is a 400 with the"
    )
    parts.append("reason; values that ask for nothing are taken.\n")
    parts.append(_refused(REFUSED, columns))
    parts.append("\nOutside chat:\n")
    parts.append(_refused(REFUSED_OUTSIDE_CHAT, columns))
    parts.append("\nIn chat:\n")
    parts.append(_refused(REFUSED_IN_CHAT, columns))
    parts.append("\n## Bodies of the other routes\n")
    parts.append(_others(api, described))
    return "\n".join(parts).rstrip() + "\n"


def _routes(api: Api) -> str:
    rows = ["| route | |", "|---|---|"]
    for (method, path), route in sorted(api.routes.items(), key=lambda item: item[0][1]):
        rows.append(f"| `{method} {path}` | {route.summary} |")
    return "\n".join(rows)


def _fields(
    schemas: Mapping[str, Any],
    name: str,
    columns: Mapping[str, list[str]],
    route: str,
    only: set[str] | None = None,
) -> str:
    rows = ["| field | type | | SGLang | vLLM |", "|---|---|---|---|---|"]
    fields = schemas[name]["properties"]
    shared = SamplingFields.__struct_fields__
    for field in sorted(fields, key=lambda field: field in shared):  # its own come first
        schema = fields[field]
        if only is None or field in only:
            others = columns.get(f"{route}:{field}") or columns.get(field) or ["no", "no"]
            rows.append(
                f"| `{field}` | {_type(schema)} | {_words(schema)} | {' | '.join(others)} |"
            )
            reference = next(_references(schema), None)
            if field == "stream_options" and reference:
                for inner, part in schemas[reference]["properties"].items():
                    rows.append(
                        f"| `{field}.{inner}` | {_type(part)} | {_words(part)} | "
                        f"{' | '.join(columns.get(f'{field}.{inner}', ['yes', 'yes']))} |"
                    )
    return "\n".join(rows)


def _refused(table: Mapping[str, Refusal], columns: Mapping[str, list[str]]) -> str:
    rows = ["| field | taken | why | SGLang | vLLM |", "|---|---|---|---|---|"]
    for name, refusal in table.items():
        harmless = ", ".join(f"`{json.dumps(value)}`" for value in refusal.harmless)
        others = " | ".join(columns.get(name, ["no", "no"]))
        rows.append(f"| `{name}` | {harmless} | {refusal.why} | {others} |")
    return "\n".join(rows)


def _others(api: Api, described: Mapping[str, Any]) -> str:
    parts = []
    for (method, path), route in sorted(api.routes.items(), key=lambda item: item[0][1]):
        if route.body is None or path in (CHAT, COMPLETIONS):
            continue
        content = described["paths"][path][method.lower()]["requestBody"]["content"]
        reference = next(_references(content))
        fields = described["components"]["schemas"][reference]
        required = set(fields.get("required", ()))
        rows = ["| field | type | |", "|---|---|---|"]
        for name, schema in fields["properties"].items():
            words = _words(schema) + (" Required." if name in required else "")
            rows.append(f"| `{name}` | {_type(schema)} | {words.strip()} |")
        parts.append(f"### `{method} {path}`\n\n{route.summary}.\n\n" + "\n".join(rows) + "\n")
    return "\n".join(parts)


def _type(schema: Mapping[str, Any]) -> str:
    """The type and range of a field in a few words."""
    options = schema.get("anyOf", [schema])
    names = [_type_name(option) for option in options if option.get("type") != "null"]
    text = " or ".join(dict.fromkeys(names)) or "any"
    low, high = schema.get("minimum"), schema.get("maximum")
    opening = "["
    if "exclusiveMinimum" in schema:
        low, opening = schema["exclusiveMinimum"], "("
    if low is not None and high is not None:
        text += f" in {opening}{_number(low)}, {_number(high)}]"
    elif low is not None:
        text += f", at least {_number(low)}"
    if "maxItems" in schema:
        text += f", at most {schema['maxItems']}"
    if "maxProperties" in schema:
        text += f", at most {schema['maxProperties']}"
    return text


def _type_name(schema: Mapping[str, Any]) -> str:
    if "$ref" in schema:
        return "object"
    if "enum" in schema:
        return ", ".join(f"`{value}`" for value in schema["enum"] if value is not None)
    if schema.get("type") == "array":
        items = _type(schema.get("items", {}))
        return f"list of {items}"
    return str(schema.get("type", "any"))


def _number(value: float) -> str:
    for power in (31, 63, 64):
        if abs(value) in (2**power, 2**power - 1):
            text = f"2^{power}" + ("" if abs(value) == 2**power else " - 1")
            return text if value >= 0 else f"-{text}" if "-" not in text else f"-({text})"
    return f"{value:g}"


def _words(schema: Mapping[str, Any]) -> str:
    return str(schema.get("description", "")).replace("|", "\\|").replace("\n", " ")


def _references(schema: Any) -> Any:
    if isinstance(schema, Mapping):
        if "$ref" in schema:
            yield str(schema["$ref"]).rsplit("/", 1)[1]
        for value in schema.values():
            yield from _references(value)
    elif isinstance(schema, list):
        for value in schema:
            yield from _references(value)


def _api() -> Api:
    """The routes of a server without a model."""
    config = Config(model="model")
    tokenizer = Tokenizer(FastTokenizer(models.BPE()), TokenizerConfig({}, (), {}))
    return Api(config, Frontend(config, tokenizer, ChatTemplate({}), None))


if __name__ == "__main__":
    sys.exit(main())
