"""Local models, and downloads from a Hugging Face hub on localhost."""

from __future__ import annotations

import errno
from functools import partial
from pathlib import Path
from typing import Any

import huggingface_hub
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
from huggingface_hub.constants import DOWNLOAD_CHUNK_SIZE

from minisgl_fast.errors import ConfigError
from minisgl_fast.hub import resolve_model

# Cut in the middle, it leaves one whole chunk on disk: huggingface_hub resumes by chunks.
BIG = {"config.json": b"{}", "model.safetensors": WEIGHTS * (3 * DOWNLOAD_CHUNK_SIZE >> 20)}


@pytest.fixture
def resolve(hub, tmp_path):
    settings = {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(tmp_path / "hf"),
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_IMPLICIT_TOKEN": "1",
    }
    return partial(resolve_in_a_process, "huggingface", settings)


def test_a_fresh_download_holds_the_wanted_files_and_no_others(hub, resolve):
    result = resolve()
    assert contents(result["path"]) == {name: MAIN[name] for name in WANTED}
    assert hub.fetched() == WANTED
    assert result["heavy"] == []
    stage, done, total = result["reports"][-1]
    assert stage == f"Downloading {REPOSITORY}"
    assert done == total == sum(len(MAIN[name]) for name in WANTED)
    assert all(report[1] < report[2] for report in result["reports"][:-1])


def test_without_weights_the_tensors_stay_where_they_are(hub, resolve):
    result = resolve(weights=False)
    assert sorted(contents(result["path"])) == [n for n in sorted(WANTED) if "safetensors" not in n]
    assert not any("safetensors" in name for name in hub.fetched())


def test_a_second_start_downloads_nothing(hub, resolve):
    first = resolve()
    hub.gets.clear()
    second = resolve()
    assert second["path"] == first["path"]
    assert hub.gets == [] and second["reports"] == []


def test_a_cut_connection_is_resumed_from_where_it_broke(hub, resolve):
    hub.revisions["main"] = BIG
    hub.cut_bodies = 1
    result = resolve()
    assert contents(result["path"]) == BIG
    assert hub.weight_ranges() == [None, f"bytes={DOWNLOAD_CHUNK_SIZE}-"]


def test_a_broken_download_says_so_and_the_next_start_completes_it(hub, resolve):
    hub.revisions["main"] = BIG
    hub.cut_bodies, hub.refuse_ranges = 1, True
    message = one_line(resolve())
    assert message.startswith(f"The download of {REPOSITORY} broke off")
    assert message.endswith("start again: the files that are complete are kept.")
    hub.refuse_ranges = False
    hub.gets.clear()
    result = resolve()
    assert contents(result["path"]) == BIG
    assert hub.fetched() == {"model.safetensors"}


def test_the_revision_pins_every_file(hub, resolve):
    assert contents(resolve(revision="v1")["path"]) == OLD
    message = one_line(resolve(revision="v9"))
    assert message == f"The repository {REPOSITORY} has no revision v9; check --revision."


def test_a_missing_repository_is_one_clear_line(hub, resolve):
    message = one_line(resolve("org/missing"))
    assert f"no repository org/missing at {hub.url}" in message
    assert "hf auth login" in message


def test_a_gated_repository_says_where_to_ask(hub, resolve):
    hub.gated = True
    message = one_line(resolve())
    assert f"accept its terms at {hub.url}/{REPOSITORY}" in message


def test_without_a_network_the_cache_is_used(hub, resolve):
    first = resolve()
    hub.close()
    assert resolve()["path"] == first["path"]


def test_without_a_network_and_cache_it_says_so(hub, resolve):
    hub.close()
    message = one_line(resolve())
    assert message.startswith(f"{hub.url} cannot be reached and {REPOSITORY} is not in the cache")


def test_without_a_network_a_partial_cache_is_not_served(hub, resolve):
    hub.revisions["main"] = BIG
    hub.cut_bodies, hub.refuse_ranges = 1, True
    resolve()
    hub.close()
    message = one_line(resolve())
    assert f"the cached copy of {REPOSITORY} is incomplete" in message


def test_a_repository_without_safetensors_is_refused(hub, resolve):
    hub.revisions["main"] = {"config.json": b"{}", "pytorch_model.bin": b"x", "x.gguf": b"x"}
    assert "holds no *.safetensors file" in one_line(resolve())


def test_a_full_disk_names_the_cache(monkeypatch, tmp_path):
    def full(*args: Any, **kwargs: Any) -> str:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", full)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ConfigError, match=rf"disk is full; org/tiny .* {tmp_path} \(set HF_HOME"):
        resolve_model("org/tiny")


def test_a_folder_and_a_gguf_file_are_taken_as_they_stand(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    assert resolve_model(str(tmp_path)) == tmp_path
    assert resolve_model(str(tmp_path / "x.gguf")) == tmp_path / "x.gguf"


def test_a_folder_wins_over_a_repository_of_its_name(tmp_path, monkeypatch):
    (tmp_path / "org" / "tiny").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert resolve_model("org/tiny") == Path("org/tiny")


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("./models/x", "There is no file or folder ./models/x; check the path."),
        ("/nowhere/x", "There is no file or folder /nowhere/x; check the path."),
        ("~/nowhere/x", "There is no file or folder ~/nowhere/x; check the path."),
        ("org/x.gguf", "There is no file or folder org/x.gguf; check the path."),
        ("a/b/c", "neither a file or folder here nor a repository id"),
        ("org/ti ny", "neither a file or folder here nor a repository id"),
        ("org/../../etc", "neither a file or folder here nor a repository id"),
        ("", "neither a file or folder here nor a repository id"),
    ],
)
def test_a_mistyped_path_is_not_looked_up(model, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", None)
    with pytest.raises(ConfigError, match=message.replace(".", r"\.")):
        resolve_model(model)


def test_a_file_of_another_kind_and_a_folder_of_gguf_are_explained(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"")
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    with pytest.raises(ConfigError, match=r"is a file; pass the model's folder or a \.gguf file"):
        resolve_model(str(tmp_path / "model.safetensors"))
    with pytest.raises(ConfigError, match=r"pass its GGUF file: .*x\.gguf$"):
        resolve_model(str(tmp_path))
