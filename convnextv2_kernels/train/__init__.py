"""FCMAE pre-training and fine-tuning: recipes, the loop and its tasks, optimiser, checkpoints, processes, the demo.

Nothing is imported here: the command line reads the recipes for its help, also without NumPy, Pillow and rich.
"""
