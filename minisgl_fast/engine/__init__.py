"""The engine process: one overlapped step loop over scheduler, model and backend."""
