"""FCMAE pre-training: data, optimiser, checkpoints, the loop and the demo.

Nothing is imported here, so that the command line starts without waiting for PyTorch.
"""
