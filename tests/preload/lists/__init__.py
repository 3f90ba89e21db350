"""Tests of image lists, one file for each format or family of formats."""
