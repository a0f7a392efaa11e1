"""Models: stems, one backbone, heads, named sizes and the Transformer-XL baseline."""

from moekit.models.build import build_model
from moekit.models.output import LanguageModelOutput

__all__ = ["LanguageModelOutput", "build_model"]
