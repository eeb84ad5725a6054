"""The terms of the method: tensors and the adapter Protocol in, tensors out."""
