"""Weights of other code bases under the names of ours: what checkpoint formats of several plugins share."""
