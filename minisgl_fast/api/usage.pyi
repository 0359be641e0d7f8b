def usage_json(
    num_prompt: int, num_completion: int, num_cached: int, num_reasoning: int | None
) -> bytes:
    """The ``usage`` object; ``num_reasoning`` None where nothing tells reasoning from content."""
