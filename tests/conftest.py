"""Being here, this file puts tests/ on sys.path: helpers beside it are importable by every test."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from server_process import ServerProcess, StartServer
from tiny_folder import make_tiny_model

pytest_plugins = ["api_server", "hub_server"]
# These have an environment of their own: make test-clients.
collect_ignore = ["clients"]


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny random Qwen3. Not to be written into."""
    return make_tiny_model(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="session")
def patient_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with room for streams that do not end while a test looks at them."""
    folder = tmp_path_factory.mktemp("patient") / "model"
    return make_tiny_model(folder, "--max-position", "65536")


@pytest.fixture
def start_server() -> Iterator[StartServer]:
    """Gives a function that starts servers."""
    servers: list[ServerProcess] = []

    def start(*flags: str | Path, **options: Any) -> ServerProcess:
        servers.append(ServerProcess(*flags, **options))
        return servers[-1]

    yield start
    for server in servers:
        server.end()
