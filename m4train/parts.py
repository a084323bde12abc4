"""The names of a model's parts: what freezing, adapters, learning rates and tables speak of. Imports nothing of m4train."""

VISION = "vision"  # the vision tower
CONNECTOR = "connector"  # from its features to those of the text: projection, perceiver
CROSS_ATTENTION = "cross_attention"  # Idefics: the gated layers between those of the text
TEXT = "text"  # the decoder's layers and its last norm
EMBEDDINGS = "embeddings"
NEW_TOKENS = "new_tokens"  # rows of added tokens, apart from the others while they train
LM_HEAD = "lm_head"  # missing if it is tied to the embeddings

PARTS = (VISION, CONNECTOR, CROSS_ATTENTION, TEXT, EMBEDDINGS, NEW_TOKENS, LM_HEAD)
