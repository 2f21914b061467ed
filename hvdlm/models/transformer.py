"""The default model: a decoder-only transformer with the arithmetic of Llama.

RMSNorm before each branch, rotary positions, SwiGLU, grouped-query attention, no biases.
`hvdlm.models.llama` maps its weights to and from Hugging Face's LlamaForCausalLM.

Source: Touvron et al., "LLaMA", 2023, section 2.2.
"""

from __future__ import annotations

from typing import Any, final

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask
from torch.utils.checkpoint import checkpoint

from hvdlm.config import ModelConfig
from hvdlm.models.cross_entropy import IGNORED_LABEL, linear_cross_entropy
from hvdlm.models.layers import Attention, KVCache, RMSNorm, SwiGLU, fill_normal_, rotary_table
from hvdlm.models.masks import causal_mask, document_mask

INIT_STD = 0.02


def mlp_width(config: ModelConfig) -> int:
    """Inner width of the MLP: as configured, or 8/3 of the width rounded up to a multiple of 64."""
    return config.mlp_width or -(-config.width * 8 // (3 * 64)) * 64


@final
class Block(nn.Module):
    """Attention, then MLP, each normalised before and added to the residual stream."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.dropout = config.dropout
        self.attention_norm = RMSNorm(config.width, config.norm_eps)
        self.attention = Attention(config.width, config.heads, config.kv_heads or config.heads)
        self.mlp_norm = RMSNorm(config.width, config.norm_eps)
        self.mlp = SwiGLU(config.width, mlp_width(config))

    def forward(
        self,
        x_BTD: Tensor,
        rotary: tuple[Tensor, Tensor],
        mask: Tensor | BlockMask | None = None,
        cache: KVCache | None = None,
        layer: int = 0,
    ) -> Tensor:
        """[B, T, D] -> [B, T, D]; arguments as `Attention.forward`."""
        x_BTD = x_BTD + self._drop(self.attention(self.attention_norm(x_BTD), rotary, mask, cache, layer))
        return x_BTD + self._drop(self.mlp(self.mlp_norm(x_BTD)))

    def _drop(self, branch_BTD: Tensor) -> Tensor:
        return F.dropout(branch_BTD, self.dropout, self.training) if self.dropout else branch_BTD


@final
class Transformer(nn.Module):
    """Decoder-only language model."""

    def __init__(self, config: ModelConfig, vocab_size: int) -> None:
        """Build on the CPU with initial weights that depend only on torch's current seed.

        Args:
            config: the model section.
            vocab_size: rows of the embedding, padding included (`hvdlm.models.pad_vocab`).
        """
        super().__init__()
        self.config = config
        self.vocab_size = vocab_size
        self.embedding = nn.utils.skip_init(nn.Embedding, vocab_size, config.width, device="cpu")
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = RMSNorm(config.width, config.norm_eps)
        if not config.tie_embeddings:
            self.head = nn.utils.skip_init(nn.Linear, config.width, vocab_size, bias=False, device="cpu")
        self.init_weights_()

    def init_weights_(self) -> None:
        """Normal weights of std 0.02; those that write to the residual stream, 0.02 / sqrt(2 layers).

        Source: Radford et al., "Language Models are Unsupervised Multitask Learners", 2019, section 2.3.
        """
        for name, weight in self.named_parameters():
            if name.endswith("norm.weight"):
                nn.init.ones_(weight)
                continue
            to_residual = name.endswith(("attention.out.weight", "mlp.down.weight"))
            fill_normal_(weight, INIT_STD / (2 * self.config.layers) ** 0.5 if to_residual else INIT_STD)

    def forward(
        self,
        tokens: Tensor,
        cache: KVCache | None = None,
        *,
        last_only: bool = False,
        positions: Tensor | None = None,
    ) -> Tensor:
        """Predict the token after each position.

        Args:
            tokens: int64 [B, T], ids below vocab_size.
            cache: positions read before; these T are added to it.
            last_only: only the last position's logits, so that a long prompt costs no [B, T, V].
            positions: int64 [B, T], below T: of each token in its document, which is all it then sees;
                None = the sequence is one document.

        Returns:
            Logits [B, T, V], or [B, 1, V] with last_only.

        Raises:
            ValueError: the cache has no room for T more positions, or `positions` came with a cache.
        """
        if cache and positions is not None:
            raise ValueError("positions came with a KV cache, which holds one document; give one of them")
        x_BTD = self._stream(tokens, cache, positions)
        x_BTD = self.norm(x_BTD[:, -1:] if last_only else x_BTD)
        return F.linear(x_BTD, self._output_weight())

    def loss(self, tokens: Tensor, labels: Tensor, positions: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Summed cross-entropy, so that a caller can weight it by its own token count.

        Args:
            tokens: int64 [B, T].
            labels: int64 [B, T], the token after each position; -100 = does not count.
            positions: int64 [B, T], of each token in its document, as for `forward`.

        Returns:
            Sum of the losses in nats (fp32, 0-d), and the number of labels that count (int64, 0-d).
        """
        hidden_ND = self.norm(self._stream(tokens, None, positions)).flatten(0, 1)
        loss_sum = linear_cross_entropy(hidden_ND, self._output_weight(), labels.flatten())
        return loss_sum, (labels != IGNORED_LABEL).sum()

    def new_cache(self, batch: int, positions: int) -> KVCache:
        """An empty cache for `batch` sequences of at most `positions` tokens, beside the weights."""
        config = self.config
        shape = (batch, config.kv_heads or config.heads, positions, config.width // config.heads)
        return KVCache(config.layers, shape, like=self.embedding.weight.detach())

    def flops_per_token(self, seq_len: int) -> int:
        """Floating-point operations to train on one token (forward and backward), for MFU.

        Six for each weight of a matrix multiplication (two forward, four backward; the embedding is a
        look-up, the output projection counts also where tied), and 12 D T a layer for attention,
        also with fewer key and value heads (causality is not discounted).

        What a model needs is counted, not what is done: neither what activation checkpointing or a fused
        attention computes again, nor less where a document mask lets blocks of attention be skipped.

        Args:
            seq_len: tokens in a sequence.

        Source: Chowdhery et al., "PaLM", 2022, appendix B.
        """
        matrices = sum(p.numel() for n, p in self.blocks.named_parameters() if not n.endswith("norm.weight"))
        matrices += self._output_weight().numel()
        return 6 * matrices + 12 * self.config.layers * self.config.width * seq_len

    def _stream(self, tokens: Tensor, cache: KVCache | None, positions: Tensor | None) -> Tensor:
        """The residual stream [B, T, D] after the last block; arguments as `forward`."""
        x_BTD = self.embedding(tokens)
        rotary, mask = self._places(x_BTD, cache.length if cache else 0, positions)
        for layer, block in enumerate(self.blocks):
            # A compiled block would be compiled again for every way of calling it in evaluation.
            call = block if self.training else block.forward
            if self.training and self.config.checkpoint_activations and not cache:
                x_BTD = self._checkpointed(block, x_BTD, rotary, mask)
            else:
                x_BTD = call(x_BTD, rotary, mask, cache, layer)
        if cache:
            cache.advance(tokens.shape[1])
        return x_BTD

    def _checkpointed(self, block: nn.Module, x_BTD: Tensor, *shared: Any) -> Tensor:
        """A block of which only the input is kept; the backward pass draws the same dropout again.

        Source: Chen et al., "Training Deep Nets with Sublinear Memory Cost", 2016, section 4.
        """
        draws = self.config.dropout > 0
        y_BTD: Tensor = checkpoint(block, x_BTD, *shared, use_reentrant=False, preserve_rng_state=draws)
        return y_BTD

    def _places(
        self, x_BTD: Tensor, first: int, positions_BT: Tensor | None
    ) -> tuple[tuple[Tensor, Tensor], Tensor | BlockMask | None]:
        """What all layers share: rotary table and mask of T positions from `first`, or of documents."""
        head_size = self.config.width // self.config.heads
        cos_T1K, sin_T1K = rotary_table(
            first, x_BTD.shape[1], head_size=head_size, theta=self.config.rope_theta, like=x_BTD
        )
        if positions_BT is None:
            return (cos_T1K, sin_T1K), causal_mask(first, x_BTD)
        mask = document_mask(positions_BT, head_size=head_size)
        return (cos_T1K[positions_BT], sin_T1K[positions_BT]), mask

    def _output_weight(self) -> Tensor:
        return self.embedding.weight if self.config.tie_embeddings else self.head.weight
