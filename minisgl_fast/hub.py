"""Where a model lies: a local folder, a ``.gguf`` file, or a repository of a model hub.

Rules:
- What exists on disk is used as it stands; nothing is looked up for it.
- Only what a server reads is downloaded: safetensors, JSON, jinja templates and tokenizer files of
  the repository's top folder; never pickles, code, GGUF or the ``consolidated`` second copy.
- Both hubs keep a cache, go on after a cut connection and check sizes; a second start fetches only
  the files that are not complete (huggingface_hub drops half a file when its process ends).
- Without a network a complete cached copy is used; an incomplete one is never returned.
- Every failure is a ConfigError of one line that says what to do next.
- No torch, no transformers; the hubs' packages are imported only when they are needed.
"""

from __future__ import annotations

import errno
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

from tqdm import tqdm

from minisgl_fast.errors import ConfigError
from minisgl_fast.progress import Progress, silent

MODELSCOPE_INSTALL = "pip install 'minisgl_fast[modelscope]'"
WANTED_FILES = [
    "*.safetensors",
    "*.json",
    "*.jinja",
    "merges.txt",
    "vocab.txt",
    "tokenizer.model",
]
WANTED_BESIDE_WEIGHTS = [pattern for pattern in WANTED_FILES if "safetensors" not in pattern]
UNWANTED_FILES = ["*/*", "consolidated*.safetensors"]

_Tqdm: Any = tqdm
_REPOSITORY_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}(/[A-Za-z0-9_][\w.-]{0,95})?")
_PATH_START = ("/", "./", "../", "~", ".\\")
_NETWORK_HINT = "check the network (or a proxy) and start again"


def resolve_model(
    model: str,
    *,
    revision: str | None = None,
    source: str = "huggingface",
    weights: bool = True,
    progress: Progress = silent,
) -> Path:
    """The local path of ``model``: an existing folder, a ``.gguf`` file or a downloaded snapshot.

    ``revision`` is a branch, tag or commit of the repository, for every file. ``source`` is
    "huggingface" or "modelscope". Without ``weights`` a download leaves the tensors out (for
    ``--dummy-weight``). ``progress`` gets (stage, bytes done, bytes in all).
    Raises ConfigError.
    """
    path = Path(model).expanduser()
    if model and path.exists():  # Path("") is the current folder
        return _local(path)
    if model.startswith(_PATH_START) or model.endswith(".gguf"):
        raise ConfigError(f"There is no file or folder {model}; check the path.")
    if not _REPOSITORY_ID.fullmatch(model) or "--" in model or ".." in model:
        raise ConfigError(
            f"{model!r} is neither a file or folder here nor a repository id (organisation/name)."
        )
    wanted = WANTED_FILES if weights else WANTED_BESIDE_WEIGHTS
    if source == "modelscope":
        folder = _modelscope(model, revision, wanted, progress)
    else:
        folder = _huggingface(model, revision, wanted, progress)
    missing = _missing_file(folder, weights)
    if missing is not None:
        raise ConfigError(
            f"The repository {model} holds no {missing}, so it cannot be served; pass a repository "
            "with safetensors weights, or the path of a .gguf file."
        )
    return folder


def _local(path: Path) -> Path:
    if path.is_file():
        if path.suffix != ".gguf":
            raise ConfigError(f"{path} is a file; pass the model's folder or a .gguf file.")
        return path
    if not (path / "config.json").is_file():
        gguf_files = sorted(path.glob("*.gguf"))
        if gguf_files:
            raise ConfigError(f"{path} has no config.json; pass its GGUF file: {gguf_files[0]}")
    return path


def _missing_file(folder: Path, weights: bool) -> str | None:
    """The first file that a served model needs and ``folder`` lacks."""
    if not (folder / "config.json").is_file():
        return "config.json"
    if not weights:
        return None
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            shards = set(json.loads(index.read_bytes())["weight_map"].values())
        except (ValueError, KeyError, AttributeError, TypeError):
            return "readable model.safetensors.index.json"
        return next((name for name in sorted(shards) if not (folder / name).is_file()), None)
    return None if any(folder.glob("*.safetensors")) else "*.safetensors file"


# Hugging Face


def _huggingface(model: str, revision: str | None, wanted: list[str], progress: Progress) -> Path:
    import huggingface_hub
    from huggingface_hub import constants, errors

    stage = f"Downloading {model}"
    bars = _HubBars(stage, progress)
    try:
        folder = huggingface_hub.snapshot_download(
            model,
            revision=revision,
            allow_patterns=wanted,
            ignore_patterns=UNWANTED_FILES,
            tqdm_class=bars.bar_class(),
        )
    except errors.GatedRepoError:
        raise ConfigError(
            f"{model} is gated: accept its terms at {constants.ENDPOINT}/{model}, then log in with "
            "`hf auth login` or set HF_TOKEN."
        ) from None
    except errors.RepositoryNotFoundError:
        raise ConfigError(
            f"There is no local folder {model} and no repository {model} at {constants.ENDPOINT}; "
            "check the name (if it is private, log in with `hf auth login` or set HF_TOKEN)."
        ) from None
    except errors.RevisionNotFoundError:
        raise ConfigError(
            f"The repository {model} has no revision {revision}; check --revision."
        ) from None
    except errors.IncompleteSnapshotError:
        raise ConfigError(
            f"{constants.ENDPOINT} cannot be reached and the cached copy of {model} is incomplete; "
            f"{_NETWORK_HINT} to finish the download."
        ) from None
    except errors.LocalEntryNotFoundError:
        raise ConfigError(
            f"{constants.ENDPOINT} cannot be reached and {model} is not in the cache "
            f"({constants.HF_HUB_CACHE}); {_NETWORK_HINT}."
        ) from None
    except errors.HFValidationError:
        raise ConfigError(f"{model!r} is not a repository id (organisation/name).") from None
    except Exception as error:  # whatever the hub's HTTP stack raises in the middle of a file
        cache = Path(constants.HF_HUB_CACHE)
        raise _download_error(model, error, f"{cache} (set HF_HOME to move it)") from error
    bars.finish()
    return Path(folder)


class _HubBars:
    """Turns huggingface_hub's bars of bytes into calls of one ``Progress``.

    It draws one bar for bytes received and one for bytes written, and their totals grow as files
    start; the further one is reported, and the stage is ended only by ``finish``.
    """

    def __init__(self, stage: str, progress: Progress) -> None:
        self._stage = stage
        self._progress = progress
        self._lock = threading.Lock()
        self._bars: list[Any] = []
        self._done = 0
        self._total = 0

    def bar_class(self) -> Any:
        """A class for ``snapshot_download(tqdm_class=...)``; its bars are never drawn."""
        owner = self

        class Bar(_Tqdm):  # type: ignore[misc]
            def __init__(self, *args: Any, **kwargs: Any) -> None:
                super().__init__(*args, **{**kwargs, "disable": True})
                if kwargs.get("unit") == "B":
                    owner._bars.append(self)

            def update(self, n: float | None = 1) -> None:
                self.n += n or 0
                owner._report()

        return Bar

    def _report(self) -> None:
        with self._lock:
            done = max((int(bar.n) for bar in self._bars), default=0)
            total = max((int(bar.total or 0) for bar in self._bars), default=0)
            if done != self._done and total:
                self._done, self._total = done, total
                self._progress(self._stage, min(done, total - 1), total)

    def finish(self) -> None:
        """End the stage, if anything was downloaded at all."""
        if self._total:
            self._progress(self._stage, self._total, self._total)


# ModelScope


def _modelscope(model: str, revision: str | None, wanted: list[str], progress: Progress) -> Path:
    try:
        import modelscope_hub
        from modelscope_hub import errors
        from modelscope_hub.constants import DEFAULT_ENDPOINT
    except ImportError:
        raise ConfigError(
            f"--model-source modelscope needs the package modelscope-hub: {MODELSCOPE_INSTALL}"
        ) from None
    if "/" not in model:
        raise ConfigError(f"{model!r} is not a ModelScope id (organisation/name).")
    meter = _ByteMeter(f"Downloading {model}", progress)
    api = modelscope_hub.HubApi()
    endpoint = modelscope_hub.get_default_config().endpoint or DEFAULT_ENDPOINT
    try:
        with _quiet_modelscope():
            endpoint = api.resolve_endpoint_for_read(model)
            folder = modelscope_hub.HubApi(endpoint=endpoint).download_repo(
                model,
                "model",
                revision=revision,
                allow_patterns=wanted,
                ignore_patterns=UNWANTED_FILES,
                progress_callbacks=[meter.callback_class()],
            )
    except errors.NotExistError:
        place = model if revision is None else f"{model} at revision {revision}"
        raise ConfigError(
            f"There is no local folder {model} and no repository {place} at {endpoint}; check "
            "the name and --revision."
        ) from None
    except (errors.AuthenticationError, errors.PermissionDeniedError):
        raise ConfigError(
            f"{model} needs a permission that you do not have: accept its terms at "
            f"{endpoint}/models/{model}, then log in with `ms-hub login` or set "
            "MODELSCOPE_API_TOKEN."
        ) from None
    except (errors.NetworkError, errors.ServerError) as error:
        return _cached_modelscope(api, model, revision, endpoint, wanted, error)
    except Exception as error:  # a file that failed after all retries, a full disk
        causes = list(getattr(error, "failed_files", {}).values()) or [error]
        cache = "the ModelScope cache (set MODELSCOPE_CACHE to move it)"
        raise _download_error(model, causes[0], cache) from error
    meter.finish()
    return folder


def _cached_modelscope(
    api: Any,
    model: str,
    revision: str | None,
    endpoint: str,
    wanted: list[str],
    error: Exception,
) -> Path:
    """A complete copy that an earlier run left, or what to do about the missing network."""
    from modelscope_hub.errors import CacheNotFound

    try:
        folder = Path(api.download_repo(model, "model", revision=revision, local_files_only=True))
    except CacheNotFound:
        raise ConfigError(
            f"{endpoint} cannot be reached and {model} is not in the cache; {_NETWORK_HINT}."
        ) from error
    if _missing_file(folder, wanted is WANTED_FILES) is not None or any(
        folder.glob("*.incomplete")
    ):
        raise ConfigError(
            f"{endpoint} cannot be reached and the cached copy of {model} is incomplete; "
            f"{_NETWORK_HINT} to finish the download."
        ) from error
    return folder


@contextmanager
def _quiet_modelscope() -> Iterator[None]:
    """modelscope-hub draws its own bars wherever stderr goes and has no switch for it."""
    downloads: Any = import_module("modelscope_hub._download")
    drawn = downloads.tqdm
    downloads.tqdm = partial(drawn, disable=True)
    try:
        yield
    finally:
        downloads.tqdm = drawn


class _ByteMeter:
    """Adds up modelscope-hub's per-file callbacks for one ``Progress``."""

    def __init__(self, stage: str, progress: Progress) -> None:
        self._stage = stage
        self._progress = progress
        self._lock = threading.Lock()
        self._done = 0
        self._total = 0

    def callback_class(self) -> type:
        """A class for ``download_repo(progress_callbacks=[...])``, made once for each file."""
        owner = self

        class Callback:
            def __init__(self, filename: str, file_size: int) -> None:
                owner._add(0, file_size)

            def update(self, size: int) -> None:
                owner._add(size, 0)

            def end(self) -> None:
                """Nothing: the whole download ends in ``finish``."""

        return Callback

    def _add(self, done: int, total: int) -> None:
        with self._lock:
            self._done += done
            self._total += total
            if self._total:
                self._progress(self._stage, min(self._done, self._total - 1), self._total)

    def finish(self) -> None:
        """End the stage, if anything was downloaded at all."""
        if self._total:
            self._progress(self._stage, self._total, self._total)


def _download_error(model: str, error: BaseException, cache: str) -> ConfigError:
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return ConfigError(f"The disk is full; {model} needs more room in {cache}.")
    if isinstance(error, OSError) and error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return ConfigError(f"{model} cannot be written to {cache}: {error.strerror}.")
    reason = str(error).strip().split("\n")[0]
    return ConfigError(
        f"The download of {model} broke off ({type(error).__name__}: {reason}); {_NETWORK_HINT}: "
        "the files that are complete are kept."
    )
