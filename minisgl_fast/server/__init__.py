"""The frontend's machinery: HTTP, the token loop, the link to the engine. Never imports torch."""
