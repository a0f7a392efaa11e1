"""Typed, frozen configuration beside each concept."""
