"""Labelled images from the Hub, from folders and from IDX files. Needs the extra `demo`."""
