"""What model runner V2 calls and shows, on CPU tensors; and steps in flight."""

from __future__ import annotations

from collections import deque
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.v1.attention.backend import AttentionMetadataBuilder, CommonAttentionMetadata
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.request import RequestStatus
from vllm.v1.worker.gpu import kv_connector
from vllm.v1.worker.gpu.kv_connector import ActiveKVConnector

from asl_vllm.engine.worker.attention import ViewMixin
from asl_vllm_testing.scheduler_host import (
    BLOCK,
    FREED,
    FULL,
    PROMPT,
    REPORT,
    make_host,
    report_of,
)
from asl_vllm_testing.vllm_configs import engine_config
from asl_vllm_testing.worker_connector import JOB, Queue, scheduled, worker_connector
from tests.contract.looking import parameters


@pytest.fixture
def runner(monkeypatch: pytest.MonkeyPatch) -> tuple[ActiveKVConnector, Queue]:
    """The runner's side of the connector, over ours and a queue."""
    ours, queue = worker_connector()
    monkeypatch.setattr(kv_connector, "get_kv_transfer_group", lambda: ours)
    return ActiveKVConnector(engine_config({"policy": "asl"}), {}), queue


BATCH = SimpleNamespace(
    idx_mapping=torch.tensor([0]), req_ids=["b"], num_tokens=1
)  # fmt: skip


@pytest.mark.parametrize("synchronous", [False, True])
def test_passes_run_after_the_forward_with_more_arguments(
    runner: tuple[ActiveKVConnector, Queue], synchronous: bool
) -> None:
    host, queue = runner
    step = scheduled([JOB], has_sync_kv_loads=synchronous)
    host.pre_forward(step, BATCH, {"layer": object()})
    host.finish_forward()
    assert not queue.steps
    output = host.post_forward(set())
    assert queue.steps == [100]
    assert output is not None
    assert output.finished_recving == {"a"}
    assert output.failed_recving == set()
    assert output.kv_connector_worker_meta.reports == {"a": REPORT}
    host.pre_forward(scheduled([]), BATCH)
    output = host.post_forward(set())
    assert output is not None
    assert not output.finished_recving
    assert queue.steps == [100], "nothing to do is no step"


def test_passes_run_before_drafts_where_their_end_is_put_off(
    runner: tuple[ActiveKVConnector, Queue],
) -> None:
    """Since 0.33, with a drafter: reports are read, then it drafts, then all ends."""
    if "defer_finalize" not in parameters(ActiveKVConnector.post_forward):
        pytest.skip("this line drafts before post_forward")
    host, queue = runner
    host.pre_forward(scheduled([JOB]), BATCH)
    output = host.post_forward(set(), defer_finalize=True)
    assert queue.steps == [100]
    assert output.finished_recving == {"a"}
    assert output.kv_connector_worker_meta.reports == {"a": REPORT}
    host.finalize_step()
    assert queue.steps == [100]
    host.pre_forward(scheduled([]), BATCH)
    output = host.post_forward(set(), defer_finalize=True)
    assert not output.finished_recving, "reported once"
    host.finalize_step()


def test_passes_run_in_a_step_without_forward(
    runner: tuple[ActiveKVConnector, Queue],
) -> None:
    host, queue = runner
    result = host.no_forward(scheduled([JOB]))
    assert queue.steps == [100]
    assert result.kv_connector_output.finished_recving == {"a"}


def test_a_disabled_connector_runs_nothing(
    runner: tuple[ActiveKVConnector, Queue], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Warm-up and capture switch it off."""
    monkeypatch.setattr(kv_connector.kv_transfer_state, "_KV_CONNECTOR_AGENT", None)
    host, queue = runner
    host.set_disabled(True)
    host.pre_forward(scheduled([JOB]))
    assert host.post_forward(set()) is None
    assert not queue.steps
    host.set_disabled(False)


class Built(AttentionMetadataBuilder):  # type: ignore[type-arg]
    """A backend's builder that returns what it is shown."""

    def __init__(self, spec: Any, names: list[str], config: Any, device: Any) -> None:
        super().__init__(spec, names, config, device)

    def build(
        self, common_prefix_len: int, common_attn_metadata: Any, fast_build: Any = False
    ) -> Any:
        return common_attn_metadata


class Viewing(ViewMixin, Built):
    """It with the view, as `wrapped_backend` makes them."""


def builder(columns: int, max_num_seqs: int = 8) -> Viewing:
    config = engine_config({"policy": "asl"}, max_num_seqs=max_num_seqs)
    spec = SimpleNamespace(block_size=BLOCK)
    return Viewing(spec, ["layer"], config, torch.device("cpu"))  # type: ignore[arg-type]


def shown(table: list[list[int]], seq_lens: list[int]) -> CommonAttentionMetadata:
    rows = len(table)
    starts = torch.arange(rows + 1, dtype=torch.int32)
    return CommonAttentionMetadata(
        query_start_loc=starts,
        query_start_loc_cpu=starts,
        seq_lens=torch.tensor(seq_lens, dtype=torch.int32),
        seq_lens_cpu_upper_bound=torch.tensor(seq_lens, dtype=torch.int32),
        num_reqs=rows,
        num_actual_tokens=rows,
        max_query_len=1,
        max_seq_len=max(seq_lens),
        block_table_tensor=torch.tensor(table, dtype=torch.int32),
        slot_mapping=torch.arange(rows, dtype=torch.int64),
    )


def test_padding_rows_are_zero_and_stay_so() -> None:
    common = shown([[0, 0, 7, 8], [3, 4, 0, 0], [0] * 4, [0] * 4], [100, 40, 0, 0])
    seen = builder(4).build(0, common)
    rows = [[7, 8, 0, 0], [3, 4, 0, 0], [0] * 4, [0] * 4]
    assert seen.block_table_tensor.tolist() == rows
    assert seen.seq_lens.tolist() == [100 - 2 * BLOCK, 40, 0, 0]


def test_what_lies_behind_a_requests_blocks_does_not_matter() -> None:
    """Rows of the batch's table are not cleared behind a request's blocks."""
    stale = shown([[0, 0, 7, 8, 91, 92]], [4 * BLOCK])
    clean = shown([[0, 0, 7, 8, 0, 0]], [4 * BLOCK])
    for common in (stale, clean):
        seen = builder(6).build(0, common)
        assert seen.seq_lens.tolist() == [2 * BLOCK]
        assert seen.block_table_tensor[0, :2].tolist() == [7, 8]
        # Bounds stay bounds: they are not shortened, which would need a look.
        assert seen.max_seq_len == 4 * BLOCK
        assert seen.seq_lens_cpu_upper_bound.tolist() == [4 * BLOCK]


def test_only_what_the_longest_row_has_is_copied() -> None:
    """A table has columns for `max_model_len` tokens, of which most are unused."""
    made = builder(64)
    behind = list(range(100, 160))
    seen = made.build(
        0, shown([[0, 0, 7, 8, *behind], [3, 0, 0, 0, *behind]], [100, 9])
    )
    assert seen.block_table_tensor.shape == (2, 64)
    assert seen.block_table_tensor[:, :4].tolist() == [[7, 8, 0, 0], [3, 0, 0, 0]]
    assert not seen.block_table_tensor[:, 4:].any()
    full = made.build(0, shown([[5, 6, 7, 8, *behind]], [64 * BLOCK]))
    assert full.block_table_tensor[0].tolist() == [5, 6, 7, 8, *behind]


def test_each_builder_has_buffers_of_its_own() -> None:
    """Views of two groups may differ. tests/e2e runs them, interpreted."""
    assert ViewMixin.supports_update_block_table is False
    shallow, deep = builder(4), builder(4)
    full = shallow.build(0, shown([[5, 6, 7, 8], [0, 0, 2, 3]], [100, 100]))
    pruned = deep.build(0, shown([[0, 0, 7, 8], [0, 0, 2, 3]], [100, 100]))
    assert full.seq_lens.tolist() == [100, 100 - 2 * BLOCK]
    assert pruned.seq_lens.tolist() == [100 - 2 * BLOCK] * 2
    assert full.block_table_tensor[0].tolist() == [5, 6, 7, 8]


def test_capture_goes_through_build() -> None:
    common = shown([[0, 0, 7, 8]], [100])
    seen = builder(4).build_for_cudagraph_capture(common)
    assert seen.seq_lens.tolist() == [100 - 2 * BLOCK]


def test_the_views_buffers_stay_where_they_are() -> None:
    """Captured graphs read them by address, whatever the batch."""
    made = builder(4, max_num_seqs=3)
    first = made.build(0, shown([[0, 0, 7, 8]] * 3, [100] * 3))
    places = (first.block_table_tensor.data_ptr(), first.seq_lens.data_ptr())
    for rows in (1, 2, 3):
        seen = made.build(0, shown([[0, 5, 6, 7]] * rows, [128] * rows))
        assert (seen.block_table_tensor.data_ptr(), seen.seq_lens.data_ptr()) == places
        assert seen.seq_lens.tolist() == [128 - BLOCK] * rows


@pytest.mark.parametrize("bands", [1, 5])
def test_a_pruned_prompt_with_steps_in_flight(bands: int) -> None:
    """Each step is scheduled before the one before it has been answered."""
    host = make_host(
        scheduler_class=AsyncScheduler,
        bands=bands,
        pool_blocks=bands * 30,
    )
    full = "full" if bands > 1 else None
    start = host.free
    request = host.add("a", shallow=full, max_tokens=3 * BLOCK)
    host.add("b", budget=None, tokens=BLOCK, max_tokens=3 * BLOCK)
    report = report_of(3, bands) if full else REPORT
    deep = report.pruned_bands
    flying: deque[Any] = deque()
    seen, done = 0, None
    for turn in range(400):
        output = host.scheduler.schedule()
        orders = output.kv_connector_metadata
        if any(job.request_id == "a" for job in orders.jobs):
            done = turn + 3
        flying.append((output, {"a"} if turn == done else None))
        if request.status == RequestStatus.RUNNING:
            counts = host.held("a")
            assert counts == [counts[0]] * (bands - deep) + [counts[-1]] * deep
            assert min(counts) >= FULL - FREED
            if full:
                assert counts[0] - counts[-1] == FREED
            seen += 1
        if len(flying) == 2:
            host.answer(*flying.popleft(), report=report)
        if not host.scheduler.requests:
            break
    while flying:
        host.answer(*flying.popleft(), report=report)
    assert seen > 3 * BLOCK - 5
    assert request.status == RequestStatus.FINISHED_LENGTH_CAPPED
    assert request.num_tokens == PROMPT + 3 * BLOCK
    assert host.free == start
