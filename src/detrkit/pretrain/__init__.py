"""Pretext tasks: each holds a model, brings its loss, and needs no labels."""
