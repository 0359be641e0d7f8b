from array import array
from collections.abc import Iterable, Sequence

from minisgl_fast.sched.plan import PlanCapacity, StepPlan
from minisgl_fast.sched.radix import RadixCache

class Scheduler:
    """Schedules over ``num_pages`` KV pages of ``page_size`` tokens (a power of two)."""

    cache: RadixCache
    page_size: int
    max_seqs: int
    max_model_len: int
    max_step_tokens: int
    def __init__(
        self,
        num_pages: int,
        page_size: int,
        max_seqs: int,
        max_model_len: int,
        max_step_tokens: int,
        eos_ids: Iterable[int],
        *,
        radix_cache: bool = True,
    ) -> None: ...
    def plan_capacity(self) -> PlanCapacity: ...
    def add(self, channel: int, payload: bytes) -> None: ...
    def abort(self, channel: int, rid: int) -> None: ...
    def abort_channel(self, channel: int) -> None: ...
    def schedule(self, plan: StepPlan) -> bool: ...
    def commit(
        self,
        plan: StepPlan,
        tokens: array[int] | memoryview,
        outputs: Sequence[bytes | None] = (),
    ) -> None: ...
    def take_frames(self) -> list[tuple[int, int, bytes]]: ...
    def has_work(self) -> bool: ...
    def flush_cache(self) -> bool: ...
    def stats(self) -> dict[str, int]: ...
    def check(self) -> None: ...
