"""The model: what writes the weights of a graph's layers."""
