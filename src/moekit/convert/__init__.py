"""From and to other libraries' models."""
