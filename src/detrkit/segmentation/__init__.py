"""Segmentation over any variant."""
