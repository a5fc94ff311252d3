"""Measurements beside stock vLLM; never run by the tests."""
