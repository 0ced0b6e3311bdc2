"""Layers with parameters: attention, positions, backbones, heads. None knows a variant or a config."""
