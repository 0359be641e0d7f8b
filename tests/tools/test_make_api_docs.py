"""docs/api.md says what the server does today."""

import importlib.util
import json
from pathlib import Path

import pytest

from minisgl_fast.api.refused import REFUSED, REFUSED_IN_CHAT, REFUSED_OUTSIDE_CHAT

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("docs_tool", ROOT / "tools" / "make_api_docs.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def page(tool):
    return tool.page(tool._api())


def test_the_page_is_current(page):
    written = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    assert written == page, "run: python tools/make_api_docs.py"


def test_every_field_of_the_others_is_honoured_or_refused(page):
    """Each field that SGLang or vLLM has stands on the page, in a table of ours."""
    columns = json.loads((ROOT / "docs" / "api-fields.json").read_text(encoding="utf-8"))
    columns.pop("")
    rows = {line.split("`")[1] for line in page.splitlines() if line.startswith("| `")}
    assert {name.rsplit(":", 1)[-1] for name in columns} <= rows


def test_nothing_of_ours_is_accepted_without_effect_but_what_openai_defines_so(page):
    for line in page.splitlines():
        if "no effect" in line or "no part of the answer" in line:
            assert "Defined by OpenAI" in line


def test_a_refusal_has_a_reason(page):
    for table in (REFUSED, REFUSED_IN_CHAT, REFUSED_OUTSIDE_CHAT):
        for refusal in table.values():
            assert refusal.why
