"""What clients say and hear: bodies in, answers out, one file per surface. Never imports torch."""
