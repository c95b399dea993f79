"""Ports as somebody else would write them: other names, other nesting, fused and split layers.

Each is a pair of a PyTorch model and an MLX port, whose ``fault`` names one thing to get wrong.
"""
