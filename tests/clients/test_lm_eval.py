"""lm-eval with local-completions: its log-likelihoods equal transformers' on the same weights."""

import json
import os
import subprocess
import sys

import pytest
from conftest import HERE, PYTHON, ROOT, running

pytest.importorskip("lm_eval", reason="lm-eval needs Python 3.11")

QUESTIONS = [
    ("The cat sat on the", [" mat", " moon and sang", " 鑫"]),
    ("The cat sat on the roof because it", [" was raining", " could"]),
    ("Two and two is", [" four.", " five hundred", " 🥐"]),
    ("Once upon a time, " * 20 + "there was", [" a king", " a server of language models"]),
]
TASK = """\
task: words
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{context}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
target_delimiter: ""
metric_list: [{{metric: acc}}]
"""


@pytest.fixture
def model(tmp_path):
    folder = tmp_path / "model"
    tool = ROOT / "tools" / "make_tiny_model.py"
    subprocess.run([PYTHON, tool, folder], check=True, capture_output=True, cwd=ROOT)
    return folder


@pytest.fixture
def url(model):
    command = (
        *(PYTHON, "-m", "minisgl_fast", "--model", str(model), "--served-model-name", "tiny"),
        *("--port", "0", "--device", "cpu", "--dtype", "float32", "--max-prefill-length", "64"),
    )
    with running(*command, announces=r"ready to serve on (\S+)$") as found:
        yield f"http://{found[1]}"


def test_log_likelihoods_are_those_of_transformers(url, model, tmp_path):
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    lines = [
        json.dumps({"context": context, "choices": choices, "answer": 0})
        for context, choices in QUESTIONS
    ]
    (tasks / "words.jsonl").write_text("\n".join(lines))
    (tasks / "words.yaml").write_text(TASK.format(data=tasks / "words.jsonl"))
    pairs = [(context, choice) for context, choices in QUESTIONS for choice in choices]
    expected = json.loads(
        subprocess.run(
            [PYTHON, HERE / "loglikelihoods.py", model],
            input=json.dumps(pairs),
            capture_output=True,
            text=True,
            check=True,
            cwd=ROOT,
        ).stdout
    )
    assert evaluate(url, model, tasks) == [
        (pytest.approx(value, abs=1e-3), is_greedy) for value, is_greedy in expected
    ]


def evaluate(url, model, tasks):
    """The (log-likelihood, is greedy) of every choice, as lm-eval finds them."""
    settings = {
        "base_url": f"{url}/v1/completions",
        "model": "tiny",
        "tokenizer": model,
        "tokenized_requests": True,
        "num_concurrent": 4,
    }
    arguments = ",".join(f"{name}={value}" for name, value in settings.items())
    out = tasks.parent / "out"
    subprocess.run(
        [
            *(sys.executable, "-m", "lm_eval", "--model", "local-completions"),
            *("--model_args", arguments, "--tasks", "words", "--include_path", tasks),
            *("--log_samples", "--output_path", out),
        ],
        check=True,
        capture_output=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tasks.parent / "cache")},
    )
    (samples,) = out.rglob("samples_*.jsonl")
    rows = sorted(map(json.loads, samples.read_text().splitlines()), key=lambda row: row["doc_id"])
    return [
        (float(value), is_greedy == "True")
        for row in rows
        for value, is_greedy in row["filtered_resps"]
    ]
