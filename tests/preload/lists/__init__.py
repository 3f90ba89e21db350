"""Tests of the lists of images, a file a family of formats."""
