"""The tensor operations of KV-cache selection, one package an operation.

Each package holds ``reference.py``, the truth in plain torch, and a wrapper that
checks its arguments and chooses the implementation. Imports torch only.
"""
