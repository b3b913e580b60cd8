"""Rotary training: every parameter is trained in turn, on a device that holds one quantised copy of the model."""
