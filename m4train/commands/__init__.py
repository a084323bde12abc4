"""One file per command or small group of commands: what it does. `arguments.py` is how commands are described."""
