"""m4train: trains the Idefics family of vision-language models."""
