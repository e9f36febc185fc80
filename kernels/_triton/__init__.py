"""Triton implementations; imported only from inside the public functions, so that no import needs Triton."""
