"""``python -m bench gpu``: its stages, one module each, and what they share."""
