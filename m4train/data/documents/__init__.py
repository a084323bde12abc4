"""One sample: `sample` (what is stored), `variants` and `augment` (what is drawn), `rendering` (pieces), `labels`, `build`."""
