"""A model's text taken apart: reasoning, content and tool calls. Text in, events out; no I/O."""
