"""The frontend: HTTP, the OpenAI surface, sessions. Never imports torch."""
