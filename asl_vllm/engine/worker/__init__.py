"""What runs in each worker process, one a tensor-parallel rank.

Owns the model that a prefill drives, its scratch pages and buffers, the attention
backends and the queue of running prefills.
"""
