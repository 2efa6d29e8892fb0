"""An estimate of the memory that training takes on a GPU, from what each layer keeps for the way back. No torch."""

from __future__ import annotations

from e88.models.config import AttentionConfig, E88Config, GatedDeltaNetConfig, MixerConfig, ModelConfig
from e88.sizing.closed_form import count_params, mixer_shapes, state_per_layer

# Of a Gated DeltaNet layer's chunks: each token keeps one row of the chunk's matrix for every head.
FLA_CHUNK = 64


def training_memory(config: ModelConfig, batch: int = 32, window: int = 512) -> dict[str, int]:
    """An ESTIMATE, in bytes, of training on one GPU with float32 weights and bfloat16 compute.

    weights: 4 bytes a parameter and 2 for the bfloat16 copy; optimizer: AdamW's 8; activations: what the kernels and
    the rivals' libraries keep for the way back; gradients: 4 bytes a parameter. As gradients come activations go, so
    that the total has the larger of the two. Work space comes on top: the peaks of six 500M models on an H200 were 1 to
    7 % higher.
    """
    params = count_params(config)
    activations = 2 * batch * window * token_values(config)
    for part in config.parts():
        if isinstance(part.mixer, E88Config):
            steps, width = kept_states(part.mixer)
            activations += width * batch * (window // steps + 1) * part.depth * state_per_layer(part)
    parts = {"weights": 6 * params, "optimizer": 8 * params, "activations": activations, "gradients": 4 * params}
    return {**parts, "total": 14 * params + max(activations, 4 * params)}


def token_values(config: ModelConfig) -> int:
    """Values of 16 bits that a model keeps for each token, E88's states apart. Of an MLP: the norm's output, both
    projections and their product."""
    mlp = config.dim + 3 * config.mlp_hidden if config.mlp_hidden else 0
    blocks = sum(part.depth * (mixer_values(part.dim, part.mixer) + mlp) for part in config.parts())
    return blocks + 4 * config.vocab_size


def mixer_values(dim: int, mixer: MixerConfig) -> int:
    """Values of 16 bits that one mixer and its norm keep for each token, E88's states apart."""
    matrices = [(group, shape) for group, shape in mixer_shapes(dim, mixer) if len(shape) == 2]
    convolved = sum(rows for group, (rows, _) in matrices if group == "conv")
    projected = sum(rows for group, (rows, _) in matrices if group not in ("conv", "output"))
    (read,) = (columns for group, (_, columns) in matrices if group == "output")
    # The norm's output, its projections and what the mixer reads. Attention's q, k and v are kept in their turned form
    # alone, and Mamba2's kernel computes the rest again.
    values = dim + projected + read
    if isinstance(mixer, GatedDeltaNetConfig):
        # The norm of what is read, and a row of the chunk's matrix.
        values += convolved + read + mixer.n_heads * FLA_CHUNK
    if isinstance(mixer, AttentionConfig) and mixer.qk_norm:
        values += 2 * dim
    if isinstance(mixer, E88Config):
        # What is written; what is read once more before the gate, or before the norm.
        values += convolved + (1 + max(mixer.gate, mixer.head_norm)) * read
    return values


def kept_states(mixer: E88Config) -> tuple[int, int]:
    """(steps from one state that an E88 layer keeps to the next, bytes of each of its elements), as the CUDA kernels
    choose them where there are many heads."""
    if mixer.linear_state:
        return 4, 4
    if mixer.head_k_dim <= 32:
        return 8, 2
    if mixer.head_k_dim <= 64:
        return 7, 2
    return (5 if mixer.head_v_dim > 32 else 4), 2
