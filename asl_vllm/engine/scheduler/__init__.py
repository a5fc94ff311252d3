"""What runs in the engine core's process, inside vLLM's scheduler.

Owns which blocks a pruned request holds, the jobs that workers are sent each step,
what became of them, and the counts that metrics are made of.
"""
