"""From `conf/` and the command line to one checked `Config`.

Read `schema.py` first, and `data_schema.py`: one dataclass per group. `compose.py` puts `conf/` and overrides together, `checks.py` and
`data_checks.py` refuse impossible values, `combinations.py` what does not work together, and `deepspeed.py` makes the
DeepSpeed configuration. Nothing heavy is imported here: a wrong key is answered before torch is loaded.
"""

from m4train.config.data_schema import *  # noqa: F403
from m4train.config.schema import *  # noqa: F403
