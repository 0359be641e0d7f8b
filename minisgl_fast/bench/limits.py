"""What the client itself costs and may have: whether it, and not the server, was a run's limit."""

from __future__ import annotations

import resource
from dataclasses import dataclass

from minisgl_fast.errors import ConfigError

# The client is called the limit beyond these.
MAX_CPU_SHARE = 0.9
MAX_LAG_S = 0.01
SPARE_FILES = 64  # that are open besides connections


@dataclass(slots=True)
class ClientCost:
    """What the client itself took during a run."""

    cpu_share: float = 0.0
    user_s: float = 0.0  # of CPU time; the kernel's is the rest of cpu_share
    lag_p99_s: float = 0.0
    lag_max_s: float = 0.0
    num_reads: int = 0
    num_resent: int = 0

    def limits(self) -> list[str]:
        """Why the client may have been the limit; empty if it was not."""
        found = []
        if self.cpu_share > MAX_CPU_SHARE:
            found.append(f"it used {self.cpu_share:.0%} of a core")
        if self.lag_p99_s > MAX_LAG_S:
            found.append(f"its loop ran {self.lag_p99_s * 1e3:.0f} ms late (p99)")
        return found


def user_s() -> float:
    """CPU time of this process outside the kernel."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_utime


def raise_file_limit(num_connections: int) -> None:
    """Let this process have as many connections as the system allows it. ConfigError: too few."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    if hard != resource.RLIM_INFINITY and num_connections + SPARE_FILES > hard:
        raise ConfigError(
            f"--max-concurrency {num_connections} needs {num_connections + SPARE_FILES} open files,"
            f" of which this system allows a process {hard}: raise it (ulimit -Hn, or LimitNOFILE "
            "of a systemd unit, or --ulimit nofile of a container)"
        )
