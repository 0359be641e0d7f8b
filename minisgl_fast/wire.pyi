from collections.abc import Iterable, Sequence
from enum import IntEnum

from minisgl_fast.params import SamplingParams

class FrameKind(IntEnum):
    ADD = 1
    ABORT = 2
    CONFIG = 3
    PROGRESS = 16
    READY = 17
    STEP = 18
    STATS = 19
    FATAL = 20

class FinishReason(IntEnum):
    RUNNING = 0
    EOS = 1
    LENGTH = 2
    STOP_TOKEN = 3
    ABORTED = 4
    ERROR = 5

class AddFlag(IntEnum):
    IGNORE_EOS = 1

FRAME_HEADER_BYTES: int

def frame(kind: int, payload: bytes) -> bytes: ...
def pack_add(
    rid: int,
    params: SamplingParams,
    prompt: Sequence[int],
    *,
    seed: int,
    max_tokens: int,
    cache_salt: int = 0,
    priority: int = 0,
) -> bytes: ...
def pack_step(
    rows: Iterable[tuple[int, int, int]], first: Iterable[tuple[int, int]] = ()
) -> bytes: ...
def unpack_step(payload: bytes) -> tuple[list[tuple[int, int, int]], list[tuple[int, int]]]: ...
