"""Time limits of single examples say nothing on a machine that does other work."""

from hypothesis import settings

settings.register_profile("m4train", deadline=None)
settings.load_profile("m4train")
