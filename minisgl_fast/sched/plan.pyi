from array import array
from enum import IntEnum

from minisgl_fast.engine.grammar import Grammar

class SampleFlag(IntEnum):
    HAS_PENALTIES = 1
    HAS_BIAS = 2
    HAS_MASK = 4

class Span:
    """Rows of one sequence in a step whose results are more than a token."""

    seq: int
    sample: int
    task: int
    first_row: int
    num_rows: int
    position: int
    num_top: int
    targets: array[int]
    ids: array[int]

class PlanCapacity:
    """Upper bounds of one plan; ``num_words`` is the size of its buffer in int32."""

    max_tokens: int
    max_seqs: int
    max_updates: int
    max_bias: int
    num_words: int
    def __init__(self, max_tokens: int, max_seqs: int, max_updates: int, max_bias: int) -> None: ...
    def offsets(self) -> dict[str, tuple[int, int]]: ...

class StepPlan:
    """One step over ``capacity.num_words`` int32 at ``address``, which the caller keeps alive."""

    capacity: PlanCapacity
    histories: list[tuple[int, array[int], int]]
    spans: list[Span]
    masks: list[tuple[Grammar, tuple[int, ...]]]
    in_flight: bool
    def __init__(self, address: int, capacity: PlanCapacity) -> None: ...
    def offsets(self) -> dict[str, tuple[int, int]]: ...
    def pad(self, graph_size: int) -> None: ...
    @property
    def step(self) -> int: ...
    @property
    def num_tokens(self) -> int: ...
    @property
    def num_decode(self) -> int: ...
    @property
    def num_seqs(self) -> int: ...
    @property
    def num_samples(self) -> int: ...
    @property
    def num_updates(self) -> int: ...
    @property
    def num_bias(self) -> int: ...
    @property
    def graph_size(self) -> int: ...
    @property
    def max_q_len(self) -> int: ...
    @property
    def max_context(self) -> int: ...
