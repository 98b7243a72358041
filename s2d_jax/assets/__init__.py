"""The embedded world's models and tokenizer, and the scripts that made them."""
