"""Being here, this file puts tests/ on sys.path: helpers beside it are importable by every test."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_folder import make_tiny_model

pytest_plugins = ["api_server"]
# These have an environment of their own: make test-clients.
collect_ignore = ["clients"]


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny random Qwen3. Not to be written into."""
    return make_tiny_model(tmp_path_factory.mktemp("tiny") / "model")
