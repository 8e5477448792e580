"""Images for training: folders, classes, augmentation, mixing, random streams."""
