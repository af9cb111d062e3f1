"""What goes beyond the foundational experiment: telling generalisation from recall, and the universal synthesiser."""

from universal.synthesizer import GraphWeightSynthesizer, load_synthesizer

__all__ = ["GraphWeightSynthesizer", "load_synthesizer"]
