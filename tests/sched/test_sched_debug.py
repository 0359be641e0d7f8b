"""The same tests against the debug build: what overruns an array there fails, not corrupts."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TEXT_TEST = "test_text_is_the_same_whatever_runs_beside_it[1-radix]"
RUN = """
import sys, pytest, minisgl_fast.sched.scheduler as module
assert module.__file__.startswith(sys.argv[1]), module.__file__
sys.exit(pytest.main(sys.argv[2:]))
"""


@pytest.mark.timeout(400)
def test_the_debug_build_passes(tmp_path):
    pytest.importorskip("Cython")
    package = tmp_path / "minisgl_fast"
    environment = os.environ | {
        "MINISGL_DEBUG": "1",
        "MINISGL_ONLY": "sched",
        # Bounds checks of Cython know arrays only; these are those of the vectors.
        "CFLAGS": "-D_GLIBCXX_ASSERTIONS",
    }
    build = [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", str(tmp_path)]
    done = subprocess.run(
        [*build, "--build-temp", str(tmp_path / "objects")],
        cwd=ROOT, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for name in ("__init__.py", "errors.py", "params.py", "sched/__init__.py"):
        shutil.copy(ROOT / "minisgl_fast" / name, package / name)
    for path in (ROOT / "minisgl_fast").glob("wire.*.so"):
        shutil.copy(path, package)
    tests = ROOT / "tests" / "sched"
    chosen = [
        str(tests / "test_plan.py"),
        str(tests / "test_radix.py"),
        str(tests / "test_scheduler.py"),
        str(tests / "test_scheduler_text.py") + "::" + TEXT_TEST,
    ]
    options = ["-q", "-x", "-p", "no:cacheprovider", "-c", str(ROOT / "pyproject.toml")]
    environment["PYTHONPATH"] = str(tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", RUN, str(tmp_path), *options, *chosen],
        cwd=tmp_path, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
