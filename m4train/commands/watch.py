"""`m4train watch RUN ...`: the report of a run while it trains, or several runs over each other, in a browser."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from m4train.commands.compare import runs_in
from m4train.errors import ConfigError
from m4train.inspection.live import live_page, server


def watch(given: Sequence[str], port: int, open_browser: bool) -> int:
    """Serves the page on the loopback until it is interrupted; returns 0. Raises DataError for a folder that holds no run,
    ConfigError for a port that is taken."""
    folders = [folder for name in given for folder in runs_in(Path(name))]
    live_page(folders)  # a folder without a run is named now
    try:
        served, address = server(folders, port)
    except OSError as error:
        raise ConfigError(f"--port {port} cannot be used ({error.strerror}): choose another one.") from error
    print(f"watching {', '.join(map(str, folders))}: {address} (Ctrl-C ends it)", flush=True)
    if open_browser:
        import webbrowser

        webbrowser.open(address)
    try:
        served.serve_forever()
    except KeyboardInterrupt:
        return 0
    finally:
        served.server_close()
    return 0
