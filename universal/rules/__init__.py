"""Weights in closed form: a layer is written by a rule, from the inputs that reach it and the labels."""
