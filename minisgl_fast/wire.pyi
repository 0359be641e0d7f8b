from array import array
from collections.abc import Iterable, Sequence
from enum import IntEnum
from typing import Any, NamedTuple

from minisgl_fast.params import SamplingParams

class FrameKind(IntEnum):
    ADD = 1
    ABORT = 2
    CONFIG = 3
    FLUSH = 4
    JOIN = 5
    PROGRESS = 16
    READY = 17
    STEP = 18
    STATS = 19
    FATAL = 20
    LOGPROBS = 21
    EMBEDDING = 22
    FLUSHED = 23

class FinishReason(IntEnum):
    RUNNING = 0
    EOS = 1
    LENGTH = 2
    STOP_TOKEN = 3
    ABORTED = 4
    ERROR = 5
    GRAMMAR = 6

class AddFlag(IntEnum):
    IGNORE_EOS = 1

class Task(IntEnum):
    GENERATE = 0
    EMBED_LAST = 1
    EMBED_MEAN = 2

class LogprobsRecord(NamedTuple):
    rid: int
    is_prompt: bool
    position: int
    num_top: int
    tokens: array[int]
    chosen: array[float]
    top_ids: array[int]
    top_values: array[float]
    id_values: array[float]

FRAME_HEADER_BYTES: int

def frame(kind: int, payload: bytes) -> bytes: ...

class AddTemplate:
    """All of an ADD payload that many requests have in common."""

    def __init__(
        self,
        params: SamplingParams,
        *,
        cache_salt: int = 0,
        priority: int = 0,
        num_top_logprobs: int = -1,
        prompt_logprobs_from: int = -1,
        logprob_ids: Sequence[int] = (),
        task: int = 0,
        grammar: bytes = b"",
    ) -> None: ...
    def pack(self, rid: int, prompt: Sequence[int], seed: int, max_tokens: int) -> bytes: ...

def pack_add(
    rid: int,
    params: SamplingParams,
    prompt: Sequence[int],
    *,
    seed: int,
    max_tokens: int,
    **options: Any,
) -> bytes: ...
def grammar_of(payload: bytes) -> tuple[int, bytes]: ...
def add_summary(payload: bytes) -> tuple[int, int, int, int, int]: ...
def pack_step(
    rows: Iterable[tuple[int, int, int]], first: Iterable[tuple[int, int]] = ()
) -> bytes: ...
def unpack_step(payload: bytes) -> tuple[list[tuple[int, int, int]], list[tuple[int, int]]]: ...
def logprobs_header(
    rid: int, is_prompt: bool, position: int, num_tokens: int, num_top: int, num_ids: int
) -> bytes: ...
def pack_logprobs(records: Iterable[LogprobsRecord]) -> bytes: ...
def unpack_logprobs(payload: bytes) -> list[LogprobsRecord]: ...
def pack_embedding(rid: int, vector: bytes) -> bytes: ...
def unpack_embedding(payload: bytes) -> tuple[int, array[float]]: ...
