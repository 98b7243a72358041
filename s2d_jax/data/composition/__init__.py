"""Steps that must be composed in the right order: the problems, and their TFDS builder."""
