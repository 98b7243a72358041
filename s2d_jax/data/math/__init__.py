"""Any JSONL of problems and answers as a TFDS data set."""
