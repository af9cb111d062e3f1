"""What goes beyond the foundational experiment: telling generalisation from recall, and the universal synthesiser."""

from universal.model.synthesizer import GraphWeightSynthesizer, load_synthesizer

__all__ = ["GraphWeightSynthesizer", "load_synthesizer"]
