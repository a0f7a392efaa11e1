"""Text from a trained model: key/value cache, sampling and streaming."""

from moekit.generate.sampling import Sampler
from moekit.generate.text import Generation, generate
from moekit.layers.cache import KVCache

__all__ = ["Generation", "KVCache", "Sampler", "generate"]
