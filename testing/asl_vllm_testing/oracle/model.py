"""A Qwen3 or Llama decoder in plain PyTorch, one sequence at a time.

Shapes: M tokens in this call, P tokens in the cache, H query heads, Hkv KV heads,
D head size. Tokens stand in the first dimension of q, k and v.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

QUERY_BLOCK = 64  # rows of the attention matrix held at once


@dataclass(frozen=True)
class LayerOutput:
    """What one decoder layer computed for its M tokens."""

    hidden: Tensor  # [M, hidden], after the MLP and its residual
    q: Tensor  # [M, H, D], rotated
    k: Tensor  # [M, Hkv, D], rotated
    v: Tensor  # [M, Hkv, D]


@dataclass(frozen=True)
class DecoderConfig:
    """The fields of config.json that the forward pass needs."""

    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    tie_word_embeddings: bool

    @classmethod
    def from_dict(cls, raw: dict) -> "DecoderConfig":
        if raw["model_type"] not in ("qwen3", "llama"):
            raise NotImplementedError(f"model_type {raw['model_type']!r}")
        if raw.get("hidden_act", "silu") != "silu":
            raise NotImplementedError(f"hidden_act {raw['hidden_act']!r}")
        rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
        if rope.get("rope_type", "default") != "default":
            raise NotImplementedError(f"rope_type {rope['rope_type']!r}")
        heads = raw["num_attention_heads"]
        return cls(
            num_layers=raw["num_hidden_layers"],
            num_heads=heads,
            num_kv_heads=raw.get("num_key_value_heads") or heads,
            head_dim=raw.get("head_dim") or raw["hidden_size"] // heads,
            rms_norm_eps=raw["rms_norm_eps"],
            rope_theta=rope.get("rope_theta") or raw.get("rope_theta", 10000.0),
            tie_word_embeddings=raw.get("tie_word_embeddings", False),
        )


class TinyDecoder:
    """Embedding, decoder layers and output head over a dictionary of weights."""

    def __init__(self, config: DecoderConfig, weights: dict[str, Tensor]) -> None:
        self.config = config
        self.weights = weights
        self.embedding = weights["model.embed_tokens.weight"]  # [vocab, hidden]
        self.dtype = self.embedding.dtype

    @classmethod
    def load(
        cls,
        model_dir: str | Path,
        dtype: torch.dtype = torch.float32,
        device: str = "cpu",
    ) -> "TinyDecoder":
        """Read config.json and every *.safetensors file; cast the weights to dtype."""
        model_dir = Path(model_dir)
        config = json.loads((model_dir / "config.json").read_text())
        weights = {}
        for path in sorted(model_dir.glob("*.safetensors")):
            for name, tensor in load_file(path).items():
                weights[name] = tensor.to(device, dtype)
        return cls(DecoderConfig.from_dict(config), weights)

    def embed(self, token_ids: Tensor) -> Tensor:
        """[M] -> [M, hidden]."""
        return self.embedding[token_ids]

    def layer(
        self,
        index: int,
        hidden: Tensor,
        positions: Tensor,
        past: tuple[Tensor, Tensor] | None = None,
    ) -> LayerOutput:
        """Run layer `index` on hidden [M, hidden] at positions [M].

        The M tokens see every entry of past (k, v: [P, Hkv, D]) and, causally,
        one another.
        """
        c = self.config
        prefix = f"model.layers.{index}."
        attn = prefix + "self_attn."
        x = self._norm(hidden, prefix + "input_layernorm")
        q = self._linear(x, attn + "q_proj").unflatten(-1, (c.num_heads, c.head_dim))
        k = self._linear(x, attn + "k_proj").unflatten(-1, (c.num_kv_heads, c.head_dim))
        v = self._linear(x, attn + "v_proj").unflatten(-1, (c.num_kv_heads, c.head_dim))
        if attn + "q_norm.weight" in self.weights:
            q, k = self._norm(q, attn + "q_norm"), self._norm(k, attn + "k_norm")
        q, k = self._rotate(q, positions), self._rotate(k, positions)
        keys, values = (k, v)
        if past is not None:
            keys, values = torch.cat([past[0], k]), torch.cat([past[1], v])
        mixed = self.attend(q, keys, values).flatten(1)
        hidden = hidden + self._linear(mixed, attn + "o_proj")
        x = self._norm(hidden, prefix + "post_attention_layernorm")
        gate = F.silu(self._linear(x, prefix + "mlp.gate_proj"))
        up = self._linear(x, prefix + "mlp.up_proj")
        hidden = hidden + self._linear(gate * up, prefix + "mlp.down_proj")
        return LayerOutput(hidden, q, k, v)

    def logits(self, hidden: Tensor) -> Tensor:
        """[M, hidden] -> [M, vocab], in fp32 or better."""
        x = self._norm(hidden, "model.norm")
        tied = self.config.tie_word_embeddings
        head = self.embedding if tied else self.weights["lm_head.weight"]
        return at_least_fp32(F.linear(x, head))

    def forward(self, token_ids: Tensor, first: int = 0) -> Tensor:
        """Logits [M, vocab] of a whole prompt [M] under full causal attention.

        Its positions begin at first.
        """
        device = token_ids.device
        positions = torch.arange(first, first + len(token_ids), device=device)
        hidden = self.embed(token_ids)
        for index in range(self.config.num_layers):
            hidden = self.layer(index, hidden, positions).hidden
        return self.logits(hidden)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """See `attend`, below."""
        return attend(q, k, v)

    def _linear(self, x: Tensor, name: str) -> Tensor:
        bias = self.weights.get(name + ".bias")
        return F.linear(x, self.weights[name + ".weight"], bias)

    def _norm(self, x: Tensor, name: str) -> Tensor:
        wide = at_least_fp32(x)
        scale = (
            wide.square().mean(-1, keepdim=True) + self.config.rms_norm_eps
        ).rsqrt()
        return (wide * scale).to(x.dtype) * self.weights[name + ".weight"]

    def _rotate(self, x: Tensor, positions: Tensor) -> Tensor:
        """Neox-style RoPE: dimension i is paired with i + D/2. x: [M, heads, D]."""
        half = self.config.head_dim // 2
        exponent = torch.arange(half, dtype=torch.float32, device=x.device) / half
        angle = positions[:, None].float() * self.config.rope_theta**-exponent
        cos = angle.cos().to(x.dtype)[:, None]
        sin = angle.sin().to(x.dtype)[:, None]
        a, b = x[..., :half], x[..., half:]
        return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention of the last M of T tokens: q [M, H, D], k and v [T, Hkv, D].

    Returns [M, H, D]. Query head h reads KV head h // (H // Hkv). The softmax is in
    fp32 (or better).
    """
    num_q, num_heads, head_dim = q.shape
    total, num_kv_heads, _ = k.shape
    group = num_heads // num_kv_heads
    qh = (q * head_dim**-0.5).transpose(0, 1).unflatten(0, (num_kv_heads, group))
    kh = k.permute(1, 2, 0).contiguous()  # [Hkv, D, T]
    vh = v.transpose(0, 1).contiguous()  # [Hkv, T, D]
    square = (QUERY_BLOCK, QUERY_BLOCK)
    future = torch.ones(square, dtype=torch.bool, device=q.device).triu(1)
    out = []
    for start in range(0, num_q, QUERY_BLOCK):
        stop = min(num_q, start + QUERY_BLOCK)
        rows, seen = stop - start, total - num_q + stop
        score = qh[:, :, start:stop].flatten(1, 2) @ kh[..., :seen]
        score = at_least_fp32(score).unflatten(1, (group, rows))
        score[..., seen - rows :].masked_fill_(future[:rows, :rows], float("-inf"))
        mixed = score.softmax(-1).flatten(1, 2).to(v.dtype) @ vh[:, :seen]
        out.append(mixed.unflatten(1, (group, rows)))  # [Hkv, group, rows, D]
    return torch.cat(out, 2).flatten(0, 1).transpose(0, 1)


def at_least_fp32(x: Tensor) -> Tensor:
    """x in fp32, unless it is wider already."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
