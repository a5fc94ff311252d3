"""What tests need of vLLM that lies elsewhere, or is otherwise, in a newer line.

The only place for differences between lines: it asks for the feature, the newer one
first, never for the version. `OLDER` says what goes when the oldest line does;
tests/engine/test_lines.py fails then. asl_vllm itself needs nothing of the kind yet;
should it, the room is a module of this form beside ``asl_vllm/engine/lines.py``.
"""

from __future__ import annotations

from importlib.util import find_spec

try:
    from vllm.v1.core.kv_cache_planning import (
        get_kv_cache_config_from_groups,
        get_kv_cache_groups,
    )
except ImportError:
    from vllm.v1.core.kv_cache_utils import (  # type: ignore[attr-defined, no-redef]
        get_kv_cache_config_from_groups,
        get_kv_cache_groups,
    )

try:
    from vllm.entrypoints.common.cli_args import make_arg_parser
except ImportError:
    from vllm.entrypoints.launchers.cli_args import (  # type: ignore[no-redef]
        make_arg_parser,
    )

HAS_DECISIONS = find_spec("vllm.entrypoints.openai.decisions") is not None

OLDER = {
    "vllm.v1.core.kv_cache_planning": "groups were planned in kv_cache_utils",
    "vllm.entrypoints.common.cli_args": "the parser was in entrypoints.launchers",
    "vllm.entrypoints.openai.decisions.protocol": "there was no /v1/decisions",
}
"""What the newer lines have and the oldest has not -> how it was there."""

__all__ = [
    "HAS_DECISIONS",
    "OLDER",
    "get_kv_cache_config_from_groups",
    "get_kv_cache_groups",
    "make_arg_parser",
]
