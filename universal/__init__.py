"""What goes beyond the foundational experiment: telling generalisation from recall, and the universal synthesiser."""

from universal.model.synthesizer import GraphWeightSynthesizer, load_synthesizer
from universal.rules.search import search
from universal.rules.synthesis import Accounts, synthesize, write

__all__ = ["Accounts", "GraphWeightSynthesizer", "load_synthesizer", "search", "synthesize", "write"]
