"""Which package may load what, seen in the modules of a fresh interpreter."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
HTTP = {"httptools", "uvloop", "minisgl_fast.server"}
TEXT = {"tokenizers", "jinja2"}
RULES = {
    "minisgl_fast": {"torch", "cupy", "numpy", "minisgl_fast.engine", *HTTP, *TEXT},
    "minisgl_fast.cli": {"torch", "cupy", "numpy", *TEXT},
    "minisgl_fast.bench.cli": {
        *("torch", "cupy", "numpy", "minisgl_fast.engine", "minisgl_fast.server"),
        *TEXT,
    },
    "minisgl_fast.channel": {"torch", "cupy", "numpy", *HTTP, *TEXT},
    "minisgl_fast.launch": {"torch", "cupy", "minisgl_fast.engine", "minisgl_fast.sched"},
    "minisgl_fast.api.app": {"torch", "cupy", "numpy", "minisgl_fast.engine", "minisgl_fast.sched"},
    "minisgl_fast.parsers.select": {"torch", "cupy", "numpy", "msgspec", *HTTP, *TEXT},
    "minisgl_fast.text.tokenizer": {"torch", "cupy", *HTTP},
    "minisgl_fast.sched.scheduler": {"torch", "cupy", "numpy", "minisgl_fast.model", *HTTP, *TEXT},
    "minisgl_fast.model.config": {"torch", "cupy", *HTTP, *TEXT},
    "minisgl_fast.model.qwen3": {"cupy", "minisgl_fast.engine", "minisgl_fast.sched", *HTTP},
    "minisgl_fast.backend.reference": {"cupy", "minisgl_fast.engine", *HTTP, "tokenizers"},
    "minisgl_fast.engine.worker": {"httptools", "uvloop", "tokenizers", "minisgl_fast.server"},
    "minisgl_fast.engine.fake": {"torch", "cupy", "numpy", "minisgl_fast.server", *HTTP, *TEXT},
    "minisgl_fast.extra_frontend": {"torch", "cupy", "minisgl_fast.engine", "minisgl_fast.sched"},
}


@pytest.mark.parametrize("module", RULES)
def test_importing_a_module_loads_nothing_that_it_must_not(module: str) -> None:
    code = f"import sys, json, {module}; print(json.dumps(sorted(sys.modules)))"
    printed = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout
    assert RULES[module].isdisjoint(json.loads(printed))


def test_only_the_cuda_backend_imports_cupy() -> None:
    importers = [
        str(path.relative_to(ROOT))
        for path in (ROOT / "minisgl_fast").rglob("*.py")
        if "import cupy" in path.read_text()
    ]
    assert all(importer.startswith("minisgl_fast/backend/") for importer in importers)
