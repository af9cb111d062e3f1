"""Training the model: random architectures, and the rewards of what is written for them."""
