"""From a recipe to a trained detector."""
