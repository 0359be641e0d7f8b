"""CUDA C++ sources, compiled at run time by ``minisgl_fast.backend.compile``. No Python code."""
