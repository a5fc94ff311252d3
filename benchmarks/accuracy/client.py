"""Asks a server: any OpenAI-compatible one, and more of one that has a policy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import openai

from asl_vllm.selection import resolve_kept

TIMEOUT_S = 3600.0
TOP = 20
"""Most likely tokens asked for: as many as vLLM gives unless told otherwise."""
RETRIES = 2


class ServerError(Exception):
    """A request that got no usable reply; the message says why."""


@dataclass(frozen=True)
class Served:
    """What a server says of itself.

    A server without `GET /v1/kv/policies` prunes nothing: ``policies`` is empty, and
    ``num_layers`` is unknown.
    """

    model: str
    root: str
    """The model's folder or name, where its tokenizer is."""
    policies: tuple[str, ...] = ()
    num_layers: int | None = None
    window: int = 32
    block_size: int = 1
    minimum_budget: int = 33
    max_model_len: int | None = None
    config: dict[str, Any] = field(default_factory=dict)

    def kept(self, budget: int, num_prompt_tokens: int) -> int:
        """Tokens that this server keeps of a prompt under a budget."""
        return resolve_kept(
            budget,
            num_prompt_tokens=num_prompt_tokens,
            block_size=self.block_size,
            window=self.window,
        )


@dataclass(frozen=True)
class Reply:
    """An answer and what ``usage`` reports."""

    text: str
    prompt_tokens: int
    kv_cache: dict[str, Any] | None
    tokens: tuple[int, ...] = ()
    """Of the answer, the end of it included; only where ``top`` was asked for."""
    top: tuple[dict[int, float], ...] = ()
    """Of each of ``tokens``: `TOP` likeliest ids at its place, with logprobs."""


class Client:
    """A connection to one server.

    Args:
        base_url: The server's, with or without ``/v1``.
        api_key: What the server was started with, if anything.
    """

    def __init__(self, base_url: str, api_key: str = "none") -> None:
        url = base_url.rstrip("/")
        self._openai = openai.AsyncOpenAI(
            base_url=url if url.endswith("/v1") else f"{url}/v1",
            api_key=api_key,
            max_retries=RETRIES,
            timeout=TIMEOUT_S,
        )

    async def close(self) -> None:
        """Ends the connection."""
        await self._openai.close()

    async def served(self, model: str | None = None) -> Served:
        """What the server serves: ``model``, or its only one.

        Raises:
            ServerError: No answer, no such model, or several and none named.
        """
        try:
            models = (await self._openai.models.list()).data
        except openai.OpenAIError as error:
            raise ServerError(f"{self._openai.base_url}: {error}") from error
        names = [entry.id for entry in models]
        if (model not in names) if model else (len(names) != 1):
            raise ServerError(f"model: got {model!r}; allowed: {', '.join(names)}")
        entry = models[names.index(model) if model else 0]
        root = getattr(entry, "root", None) or entry.id
        longest = getattr(entry, "max_model_len", None)
        try:
            info: Any = await self._openai.get("/kv/policies", cast_to=object)
        except openai.NotFoundError:
            return Served(entry.id, root, max_model_len=longest)
        except openai.OpenAIError as error:
            raise ServerError(f"/v1/kv/policies: {error}") from error
        return Served(
            model=entry.id,
            root=root,
            policies=tuple(info["policies"]),
            num_layers=info["num_layers"],
            window=info["window"],
            block_size=info["block_size"],
            minimum_budget=info["minimum_budget"],
            max_model_len=longest,
            config=info["config"],
        )

    async def ask(
        self,
        served: Served,
        token_ids: Sequence[int],
        *,
        max_tokens: int,
        policy: str = "none",
        budget: int | None = None,
        top: bool = False,
        forced: Sequence[int] = (),
    ) -> Reply:
        """The greedy answer to a prompt of token ids.

        With ``top`` also its tokens, and the likeliest ones at each. With ``forced``
        these are its tokens, for servers with `benchmarks.accuracy.forced`.

        Raises:
            ServerError: No answer after retries, no report of a pruned prompt, or not
                the tokens that were forced.
        """
        extra: dict[str, Any] = {}
        if served.policies:
            # Named even where nothing is to be pruned: a server may have defaults. All
            # ask the same prompts, and each is to be computed.
            extra = {"kv_policy": policy, "kv_budget": budget, "kv_reuse": "none"}
        if forced:
            extra |= {"vllm_xargs": {"forced_tokens": list(forced)}, "ignore_eos": True}
        options: dict[str, Any] = {}
        if top or forced:
            options["logprobs"] = TOP
            extra["return_tokens_as_token_ids"] = True
        try:
            reply = await self._openai.completions.create(
                model=served.model,
                prompt=list(token_ids),
                max_tokens=max_tokens,
                temperature=0.0,
                extra_body=extra,
                **options,
            )
        except openai.OpenAIError as error:
            raise ServerError(f"{type(error).__name__}: {error}") from error
        if not reply.choices or reply.usage is None:
            raise ServerError("the reply has no choice or no usage")
        kv_cache = getattr(reply.usage, "kv_cache", None)
        told = getattr(reply, "kv_transfer_params", None)
        kept = served.kept(budget, len(token_ids)) if budget else len(token_ids)
        if kept < len(token_ids) and (told is None or told["policy"] != policy):
            raise ServerError(
                f"kv_transfer_params: got {told}; expected a report of {policy}"
            )
        choice = reply.choices[0]
        tokens, likeliest = _top(choice.logprobs) if options else ((), ())
        if forced and tokens != tuple(forced):
            raise ServerError(
                "the answer is not the one that was forced: start the server with "
                "PYTHONPATH=. and --logits-processors "
                "benchmarks.accuracy.forced:ForcedAnswer"
            )
        return Reply(
            choice.text, reply.usage.prompt_tokens, kv_cache, tokens, likeliest
        )


def _top(logprobs: Any) -> tuple[tuple[int, ...], tuple[dict[int, float], ...]]:
    """An answer's tokens, and the likeliest at each: ids from ``token_id:ID``."""

    def number(token: str) -> int:
        return int(token.removeprefix("token_id:"))

    return tuple(map(number, logprobs.tokens)), tuple(
        {number(token): value for token, value in place.items()}
        for place in logprobs.top_logprobs
    )
