"""One-shot detection: a detector of any variant that finds whatever is like an example that it is shown."""
