"""One file per data format; `base` is what a format offers, `registry` lists them by name."""
