"""The embedded worlds' models and tokenizer, and the scripts that made them."""
