"""The part of asl_vllm that touches vLLM; one file per touch point.

Importing the package has no effects. docs/vllm_touchpoints.md lists each symbol of
vLLM that is used or replaced, and tests/contract/ checks them.
"""
