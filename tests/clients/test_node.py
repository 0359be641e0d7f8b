"""The clients of npm: node's own test runner over node/*.test.mjs."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

NODE = Path(__file__).parent / "node"


@pytest.mark.skipif(shutil.which("node") is None, reason="node is not installed")
def test_the_clients_of_npm(scripted):
    assert (NODE / "node_modules").is_dir(), "make test-clients installs what this needs"
    files = sorted(map(str, NODE.glob("*.test.mjs")))
    result = subprocess.run(
        ["node", "--test", "--test-reporter=spec", *files],
        cwd=NODE,
        env={**os.environ, "BASE_URL": scripted},
        capture_output=True,
        text=True,
        timeout=240,
    )
    print(result.stdout)
    assert result.returncode == 0, result.stdout + result.stderr
    assert int(re.search(r"ℹ pass (\d+)", result.stdout)[1]) >= 10
