"""The decoder model, its configuration and its weights."""
