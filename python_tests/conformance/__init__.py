"""The conformance suite: what every backend must compute, op by op. Start at ``backends.py``."""
