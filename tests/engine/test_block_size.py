"""Workers read the block size when vLLM has settled it, not before."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from asl_vllm.config import ConfigError
from asl_vllm.engine.settings import settings_of
from asl_vllm.engine.worker import worker
from asl_vllm_testing.vllm_configs import engine_config

SETTLED = 128


class Platform:
    """A backend prefers another size, which is known once a model is loaded."""

    @staticmethod
    def update_block_size_for_backend(vllm_config: Any) -> None:
        assert vllm_config.loaded
        vllm_config.cache_config.block_size = SETTLED


class Base:
    vllm_config: Any

    def load_model(self) -> None:
        self.vllm_config.loaded = True


class Worker(worker.PrefillWorkerMixin, Base):
    def __init__(self, **policy: Any) -> None:
        config = engine_config({"policy": "asl", **policy}, block_size=16)
        settings_of(config).check_budget()
        self.vllm_config = SimpleNamespace(
            additional_config=config.additional_config,
            cache_config=config.cache_config,
            loaded=False,
        )

        self.model_runner = SimpleNamespace(
            get_model=lambda: None, get_kv_cache_spec=self._specs
        )

    def _specs(self) -> Any:
        raise Reached(self.vllm_config.cache_config.block_size)


class Reached(Exception):
    """The specs of layers are read, with this block size."""


@pytest.fixture(autouse=True)
def platform(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "current_platform", Platform)
    # Of the model, which is not there.
    monkeypatch.setattr(worker, "attention_layers", lambda model: [])
    monkeypatch.setattr(worker, "check_attention", lambda layers: None)


@pytest.mark.parametrize("budget", [None, 0.5, 160])
def test_specs_are_read_with_the_settled_size(budget: Any) -> None:
    with pytest.raises(Reached) as reached:
        Worker(window=32, budget=budget).load_model()
    assert reached.value.args == (SETTLED,)


def test_the_default_budget_is_checked_against_the_settled_size() -> None:
    """50 tokens are enough for a window of 32 and blocks of 16."""
    with pytest.raises(ConfigError, match=r"--kv-budget: .*50.*160"):
        Worker(window=32, budget=50).load_model()
