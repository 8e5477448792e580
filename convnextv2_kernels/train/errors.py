"""The one exception whose text is meant for the person at the terminal."""


class TrainingError(Exception):
    """A run that cannot start or go on, with a sentence that says why and what to do."""
