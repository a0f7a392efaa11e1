"""The hot operations: a plain reference beside each fast path, and one registry that picks."""
