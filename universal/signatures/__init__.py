"""What trained weights have in common: statistics of a weight matrix, and the probability that it was trained.

Design document, sections 1.2 and 4.1.2. `python -m universal.signatures FILE_OR_DIRECTORY...` reads anyone's weights.
"""

from universal.signatures.scorer import score
from universal.signatures.statistics import signature

__all__ = ["score", "signature"]
