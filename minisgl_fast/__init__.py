"""minisgl_fast: a small, fast, OpenAI-compatible LLM inference server.

``LLM`` and ``SamplingParams`` are the Python API; ``minisgl-fast`` (``cli.main``) is the server.
Both names are imported on first use, so that a process that only serves HTTP never loads torch.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from minisgl_fast.llm import LLM
    from minisgl_fast.params import SamplingParams

__all__ = ["LLM", "SamplingParams", "__version__"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name == "LLM":
        from minisgl_fast.llm import LLM

        return LLM
    if name == "SamplingParams":
        from minisgl_fast.params import SamplingParams

        return SamplingParams
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
