"""The published Qwen2.5-VL sizes by name, as their config.json have them; for plans, which need no weights."""

from thyme.model.config import ModelConfig, TextConfig, VisionConfig


def _qwen(
    hidden: int, intermediate: int, layers: int, heads: int, keys: int, *, vocabulary: int, vision: int, tied: bool
) -> ModelConfig:
    text = TextConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=keys,
        head_dim=128,
        mrope_section=(16, 24, 24),
        max_position_embeddings=128_000,
        tie_word_embeddings=tied,
    )
    tower = VisionConfig(
        depth=32,
        hidden_size=1280,
        intermediate_size=vision,
        num_heads=16,
        out_hidden_size=hidden,
        fullatt_block_indexes=(7, 15, 23, 31),
    )
    return ModelConfig(text=text, vision=tower, image_token_id=151_655)


SIZES = {
    "qwen2.5-vl-3b": _qwen(2048, 11_008, 36, 16, 2, vocabulary=151_936, vision=3420, tied=True),
    "qwen2.5-vl-7b": _qwen(3584, 18_944, 28, 28, 4, vocabulary=152_064, vision=3420, tied=False),
    "qwen2.5-vl-32b": _qwen(5120, 27_648, 64, 40, 8, vocabulary=152_064, vision=3456, tied=False),
    "qwen2.5-vl-72b": _qwen(8192, 29_568, 80, 64, 8, vocabulary=152_064, vision=3456, tied=False),
}
