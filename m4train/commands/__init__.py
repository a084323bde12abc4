"""The commands of `m4train`, one file per command or small group: what each does with a configuration.

`arguments.py` says how a command is described and its arguments are read; the table of commands is in `m4train/cli.py`.
"""
