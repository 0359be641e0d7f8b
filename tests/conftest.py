"""Being here, this file puts tests/ on sys.path: helpers beside it are importable by every test."""
