"""Serving: what keeps a running model within its limits."""
