"""Text from a trained model: key/value cache, sampling and streaming."""

from moekit.generate.cache import KVCache
from moekit.generate.sampling import Sampler
from moekit.generate.text import Generation, generate

__all__ = ["Generation", "KVCache", "Sampler", "generate"]
