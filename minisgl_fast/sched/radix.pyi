from array import array

from minisgl_fast.sched.pages import PagePool

class RadixCache:
    """Prefix cache over the pages of ``pool``; the arrays are array('i')."""

    pool: PagePool
    page_size: int
    enabled: bool
    num_nodes: int
    num_unreferenced: int
    def __init__(self, pool: PagePool, page_size: int, *, enabled: bool = True) -> None: ...
    def match(self, tokens: array[int], path: array[int], salt: int = 0) -> int: ...
    def acquire(self, path: array[int], num_pages: int) -> None: ...
    def take(self, pages: array[int], first: int, last: int) -> int: ...
    def publish(
        self,
        tokens: array[int],
        pages: array[int],
        path: array[int],
        first: int,
        last: int,
        salt: int = 0,
    ) -> int: ...
    def release(
        self,
        pages: array[int],
        path: array[int],
        num_pages: int,
        num_published: int,
        *,
        forget: bool = False,
    ) -> None: ...
    def flush(self) -> None: ...
    def unreferenced(self) -> list[int]: ...
    def references(self) -> dict[int, int]: ...
    def check(self) -> None: ...
