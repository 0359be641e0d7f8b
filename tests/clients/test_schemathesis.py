"""Generated requests, valid and not, from our own document and from OpenAI's.

Thousands a document, the same in every run but for where the time ends: no 5xx, answers that keep
the document's schemas and content types, no request taken that breaks the schema.
"""

import re
import subprocess
import sys
from pathlib import Path
from urllib.request import urlopen

import pytest

PROGRAM = Path(sys.executable).with_name("schemathesis")
OPENAI = Path(__file__).parents[1] / "data" / "openai-openapi" / "openapi.json"
# Not among them: status_code_conformance (OpenAI's document has 200 alone) and
# positive_data_acceptance (rules between fields are more than a schema says).
CHECKS = (
    "not_a_server_error",
    "response_schema_conformance",
    "content_type_conformance",
    "negative_data_rejection",
)


def run(folder, document, *options, checks=CHECKS, seconds=60):
    """The report and how many requests were made."""
    command = [
        *(str(PROGRAM), "run", document, "--phases", "coverage,fuzzing", "--max-examples", "10"),
        *("--checks", ",".join(checks), "--max-time", str(seconds), "--continue-on-failure"),
        *("--generation-deterministic", "--no-color", *options),
    ]
    made = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    found = re.search(r"(\d+) generated", made.stdout)
    assert made.returncode == 0, made.stdout[-8000:] + made.stderr[-2000:]
    return made.stdout, int(found[1])


@pytest.mark.timeout(200)
def test_our_own_document_holds(scripted, tmp_path):
    options = ("--exclude-operation-id", "get_metrics")
    checks = (*CHECKS, "unsupported_method")
    report, number = run(tmp_path, f"{scripted}/openapi.json", *options, checks=checks, seconds=60)
    assert number > 500, report


@pytest.mark.timeout(200)
def test_openais_document_holds_for_chat_completions_and_models(scripted, tmp_path):
    report, number = run(tmp_path, str(OPENAI), "--url", f"{scripted}/v1")
    assert number > 500, report


def test_the_server_is_alive_behind_all_that(scripted):
    with urlopen(f"{scripted}/health") as response:
        assert response.status == 200
