"""The stages of ``bench/gpu_check.py``, one module each, and what they share."""
