"""The decoder of Qwen2.5-VL, Qwen2, Qwen3 and Llama: one definition, switched by TextConfig.

T packed tokens, H hidden, N query heads, K key/value heads, D head dim. No batch dimension and no cache: how queries
and keys are rotated and tokens attend is the `attention` argument.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from thyme.kernels.mrope import mrope_tables
from thyme.model.attention import Attention
from thyme.model.config import TextConfig
from thyme.model.layers import GatedMLP, RMSNorm
from thyme.model.rope import inverse_frequencies


class SelfAttention(nn.Module):
    """Projections around the attention argument. Rows of `qkv`: N D query, K D key, K D value.

    Its bias is added by the product, for nothing and before rounding: mrope_write_kv's own `bias` is left out.
    """

    def __init__(self, config: TextConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.head_dim = config.head_dim
        self.heads = (config.num_attention_heads, config.num_key_value_heads)
        queries, keys = self.heads
        self.qkv = nn.Linear(config.hidden_size, (queries + 2 * keys) * config.head_dim, bias=config.qkv_bias)
        self.o_proj = nn.Linear(queries * config.head_dim, config.hidden_size, bias=config.o_bias)
        self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps) if config.qk_norm else None

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, attention: Attention) -> Tensor:
        """What the tokens gather from each other.

        Args:
            x: [T, H], normalized.
            cos, sin: [T, 1, D / 2] float32, the tokens' rotary tables.
            attention: rotates queries and keys and lets the tokens attend.

        Returns:
            [T, H], to be added to the residual stream.
        """
        queries, keys = self.heads
        qkv = self.qkv(x).view(len(x), queries + 2 * keys, self.head_dim)
        if self.q_norm is not None and self.k_norm is not None:
            q, k, v = qkv.split((queries, keys, keys), 1)
            qkv = torch.cat((self.q_norm(q), self.k_norm(k), v), 1)
        return self.o_proj(attention(self.layer, qkv, keys, cos, sin).flatten(1))


class DecoderLayer(nn.Module):
    """Takes and returns (delta, stream): the residual stream, and what the last block has yet to add to it.

    The sum is made where it is normalized, in one pass over both.
    """

    def __init__(self, config: TextConfig, layer: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = SelfAttention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = GatedMLP(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)

    def forward(
        self, delta: Tensor | None, stream: Tensor, cos: Tensor, sin: Tensor, attention: Attention
    ) -> tuple[Tensor, Tensor]:
        """One layer.

        Args:
            delta: [T, H], what the layer before has yet to add to the stream; None before the first layer.
            stream: [T, H], the residual stream.
            cos, sin: [T, 1, D / 2] float32, the tokens' rotary tables.
            attention: rotates queries and keys and lets the tokens attend.

        Returns:
            (delta, stream) of this layer, [T, H] each.
        """
        x, stream = self.input_layernorm.add(delta, stream)
        x, stream = self.post_attention_layernorm.add(self.self_attn(x, cos, sin, attention), stream)
        return self.mlp(x), stream


class Decoder(nn.Module):
    """Embedding, layers and final norm of a language model; the LM head is the Model's."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config, layer) for layer in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.recomputes = False
        """Of a layer only its inputs are kept for the backward pass, which computes the layer once more."""
        self._frequencies: Tensor | None = None

    def forward(self, x: Tensor, positions: Tensor, attention: Attention) -> Tensor:
        """x [T, H] embeddings, positions [3, T] i64 -> [T, H] after the final norm."""
        cos, sin = self.rotary_tables(positions)
        delta, stream = None, x
        recomputes = self.recomputes and torch.is_grad_enabled()
        for layer in self.layers:
            if recomputes:
                delta, stream = checkpoint(layer, delta, stream, cos, sin, attention, use_reentrant=False)
            else:
                delta, stream = layer(delta, stream, cos, sin, attention)
        normed: Tensor = self.norm.add(delta, stream)[0]
        return normed

    def rotary_tables(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin, [T, 1, D / 2] float32, of positions [3, T]."""
        # Not a buffer: they are computed, never loaded, and stay float32 whatever the model's dtype.
        if self._frequencies is None or self._frequencies.device != positions.device:
            self._frequencies = inverse_frequencies(self.config).to(positions.device)
        return mrope_tables(positions, self._frequencies, self.config.mrope_section)
