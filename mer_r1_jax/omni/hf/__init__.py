"""Reading and writing Hugging Face directories: configuration, weights, tokenizer and processor files."""
