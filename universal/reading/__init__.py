"""Reading: any module as a graph of layers, as its own forward pass shows it."""
