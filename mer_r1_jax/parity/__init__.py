"""The port held against transformers: on the tensors of its processor, and on the answers of an export."""
