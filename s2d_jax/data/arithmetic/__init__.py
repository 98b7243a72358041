"""Chained addition modulo 100: the problems, and the TFDS builder that stores them."""
