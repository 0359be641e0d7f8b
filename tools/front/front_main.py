"""What bench_front.py and bench_client.py share: their command line, and what each section has."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from front_figures import Output
from front_loads import Loads
from front_rounds import MAX_LOST, Rounds
from front_servers import OURS, started


class Bench:
    """A benchmark: its sections are methods, and this is what they have."""

    def __init__(self, options: argparse.Namespace, folder: Path) -> None:
        cpus = {options.server_cpu, options.client_cpu}
        self.options = options
        self.folder = folder
        self.loads = Loads(folder, options.client_cpu)
        self.rounds = Rounds(options.rounds, options.patience, cpus)
        self.out = Output()

    def server(self, name: str = OURS, tick_us: int = 0, **more: Any) -> Any:
        """A server, by its name, on its core."""
        cpus = self.options.server_cpu, self.options.client_cpu
        return started(name, self.folder, *cpus, tick_us, **more)


B = TypeVar("B", bound=Bench)


def make_parser(description: str | None, sections: Sequence[str]) -> argparse.ArgumentParser:
    """The options of both programs."""
    parser = argparse.ArgumentParser(
        description=(description or "").partition("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "sections",
        nargs="*",
        choices=[[], *sections],
        default=[],
        metavar="SECTION",
        help=f"of {', '.join(sections)}; all if none is named",
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--patience",
        type=float,
        default=12.0,
        metavar="SECONDS",
        help=f"for runs of a table that are made again as they lost over {MAX_LOST:.0%}%",
    )
    parser.add_argument("--server-cpu", type=int, default=0)
    parser.add_argument("--client-cpu", type=int, default=min(1, (os.cpu_count() or 1) - 1))
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="a page with marks for it")
    return parser


def run(
    parser: argparse.ArgumentParser,
    make_bench: Callable[[argparse.Namespace, Path], B],
    sections: Sequence[Callable[[B], None]],
) -> None:
    """The program: the wanted sections, a summary, and the page."""
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="minisgl-bench-") as folder:
        bench = make_bench(options, Path(folder))
        for section in sections:
            if not options.sections or section.__name__ in options.sections:
                bench.out.text((section.__doc__ or "").partition("\n")[0])
                section(bench)
    bench.out.text("Beside the targets:")
    bench.out.summary()
    if options.markdown is not None:
        bench.out.write_into(options.markdown, Path(sys.argv[0]).name)
