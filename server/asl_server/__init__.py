"""The server process: vLLM's own API server with asl_vllm in it."""
