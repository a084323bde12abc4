"""`python -m data_pipelines NAME key=value ...`, the same as `m4train pipeline NAME key=value ...`."""

import sys

from m4train.cli import main

if __name__ == "__main__":
    sys.exit(main(["pipeline", *sys.argv[1:]]))
