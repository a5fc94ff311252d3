"""What runs where requests enter: API server processes, and offline `LLM`.

Owns the options of the command line, the request fields and their validation, the
`PrunePlan` that a request travels with, and what replies say of it.
"""
