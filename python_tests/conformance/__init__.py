"""The conformance suite: the results every backend must produce, op by op. Start at ``backends.py``."""
