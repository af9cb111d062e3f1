"""Trial and error: a synthesiser that learns from rewards that nothing can differentiate.

Design document, section 4.1.3. `python -m universal.reinforce --reward ternary` improves one by black-box reward alone.
"""
