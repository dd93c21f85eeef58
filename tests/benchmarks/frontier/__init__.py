"""Accuracy, bytes and milliseconds of every way to make a network small."""
