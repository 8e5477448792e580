"""Images for training: folders, classes, augmentation, mixing, random streams."""

MAX_PIXELS = 178_956_970  # of an image; a pixel of more than 8 bits counts as two
