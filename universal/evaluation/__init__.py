"""What the model is measured on and beside: networks that it never trained on, and baselines."""
