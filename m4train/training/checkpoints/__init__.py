"""Checkpoints: `save.py` writes and reads them, `saver.py` does so in the background, `files.py` checks the files,
`find.py` finds the one a run continues from, `weights.py` and `adapter_files.py` read weights out of them."""
