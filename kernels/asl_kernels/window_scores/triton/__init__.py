"""Window scores on a GPU, in Triton: four kernels that read K twice, or five.

- `statistics.statistics_kernel`: largest logit and sum of each row, over a split of
  the keys;
- `statistics.combine_kernel`: the same over all splits;
- `column_sums.mass_kernel`: the attention each key gets, summed over a KV head's rows;
- `pooling.average_kernel`: the pooling, and the sum over KV heads;
- `pooling.reach_kernel`: how far scores reach, where they do.
"""

from __future__ import annotations

from asl_kernels.window_scores.triton.launch import window_scores

__all__ = ["window_scores"]
