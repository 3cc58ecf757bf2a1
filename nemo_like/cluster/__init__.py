"""Place: the only importers of Ray. Backends and engines arrive as picklable factories."""
