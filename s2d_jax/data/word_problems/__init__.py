"""Sums and word problems of small whole numbers, and the TFDS builder that stores them."""
