"""Downloads from a ModelScope hub on localhost."""

from __future__ import annotations

import sys
from functools import partial

import pytest
from hub_server import (
    MAIN,
    OLD,
    REPOSITORY,
    WANTED,
    WEIGHTS,
    contents,
    one_line,
    resolve_in_a_process,
)

from minisgl_fast.errors import ConfigError
from minisgl_fast.hub import resolve_model


@pytest.fixture
def resolve(hub, tmp_path):
    settings = {
        "MODELSCOPE_ENDPOINT": hub.url,
        "MODELSCOPE_CACHE": str(tmp_path / "cache"),
        "MODELSCOPE_HOME": str(tmp_path / "home"),
        "MODELSCOPE_API_MAX_RETRIES": "1",
        "MODELSCOPE_REPO_TREE_PAGE_MAX_ATTEMPTS": "1",
        "MODELSCOPE_DOWNLOAD_MAX_RETRIES": "3",
        "MODELSCOPE_DOWNLOAD_CHUNK_SIZE_MB": "1",
        "HOME": str(tmp_path),
    }
    return partial(resolve_in_a_process, "modelscope", settings)


def test_a_fresh_download_holds_the_wanted_files_and_no_others(hub, resolve):
    result = resolve()
    assert contents(result["path"]) == {name: MAIN[name] for name in WANTED}
    assert hub.fetched() == WANTED
    assert result["heavy"] == []
    assert "it/s]" not in result["stderr"] and "%|" not in result["stderr"]  # no foreign bars
    stage, done, total = result["reports"][-1]
    assert stage == f"Downloading {REPOSITORY}"
    assert done == total == sum(len(MAIN[name]) for name in WANTED)


def test_a_second_start_downloads_nothing(hub, resolve):
    first = resolve()
    hub.gets.clear()
    assert resolve()["path"] == first["path"]
    assert hub.gets == []


def test_a_cut_connection_is_resumed_from_where_it_broke(hub, resolve):
    hub.revisions["master"] = {"config.json": b"{}", "model.safetensors": WEIGHTS * 6}
    hub.cut_bodies = 1
    result = resolve()
    assert contents(result["path"])["model.safetensors"] == WEIGHTS * 6
    first, second = hub.weight_ranges()
    assert first is None
    assert second == f"bytes={3 * len(WEIGHTS)}-"


def test_a_broken_download_says_so_and_the_next_start_resumes_it(hub, resolve):
    hub.revisions["master"] = {"config.json": b"{}", "model.safetensors": WEIGHTS * 6}
    hub.cut_bodies, hub.refuse_ranges = 1, True
    message = one_line(resolve())
    assert message.startswith(f"The download of {REPOSITORY} broke off")
    hub.refuse_ranges = False
    hub.gets.clear()
    result = resolve()
    assert contents(result["path"])["model.safetensors"] == WEIGHTS * 6
    assert hub.gets == [("model.safetensors", f"bytes={3 * len(WEIGHTS)}-")]


def test_the_revision_pins_every_file(hub, resolve):
    assert contents(resolve(revision="v1")["path"]) == OLD
    message = one_line(resolve(revision="v9"))
    assert f"no repository {REPOSITORY} at revision v9 at {hub.url}" in message


def test_a_missing_repository_is_one_clear_line(hub, resolve):
    message = one_line(resolve("org/missing"))
    assert f"no repository org/missing at {hub.url}" in message


def test_a_forbidden_repository_says_where_to_ask(hub, resolve):
    hub.gated = True
    assert f"accept its terms at {hub.url}/models/{REPOSITORY}" in one_line(resolve())


def test_without_a_network_the_cache_is_used(hub, resolve):
    first = resolve()
    hub.close()
    assert resolve()["path"] == first["path"]


def test_without_a_network_and_cache_it_says_so(hub, resolve):
    hub.close()
    message = one_line(resolve())
    assert message.startswith(f"{hub.url} cannot be reached and {REPOSITORY} is not in the cache")


def test_without_a_network_a_partial_cache_is_not_served(hub, resolve):
    hub.revisions["master"] = {"config.json": b"{}", "model.safetensors": WEIGHTS * 6}
    hub.cut_bodies, hub.refuse_ranges = 1, True
    resolve()
    hub.close()
    assert f"the cached copy of {REPOSITORY} is incomplete" in one_line(resolve())


def test_without_the_package_the_message_says_how_to_install_it(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "modelscope_hub", None)
    with pytest.raises(ConfigError, match=r"pip install 'minisgl_fast\[modelscope\]'"):
        resolve_model("org/tiny", source="modelscope")


def test_an_id_without_an_organisation_is_refused(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"'tiny' is not a ModelScope id \(organisation/name\)"):
        resolve_model("tiny", source="modelscope")
