"""Routing records: what routers decided, in one format for training, evaluation, prediction and generation."""
