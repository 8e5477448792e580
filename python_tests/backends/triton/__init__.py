"""The Triton backend beyond the conformance suite. Kernels run on a GPU, or interpreted (``make test-triton``)."""
