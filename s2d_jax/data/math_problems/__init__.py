"""The TFDS builder that stores published sets of mathematics problems."""
