"""Arms side by side over several seeds: what their runs left, what can be said of it, tables and a figure."""
