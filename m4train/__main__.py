import sys

from m4train.cli import main

sys.exit(main())
