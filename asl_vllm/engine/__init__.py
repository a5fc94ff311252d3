"""The part that touches vLLM, in rooms named by the process that they run in.

`frontend`, `scheduler` and `worker` import what lies beside them here, and never each
other. Two modules join rooms, because vLLM makes the pair: `connector`, which has a
half in the scheduler and one in each worker, and `kv_spec`, which ties the layers'
spec to the scheduler's block manager.
"""
