"""The algorithm: pure functions on plain numbers and tensors, free of transformers, peft and files."""
