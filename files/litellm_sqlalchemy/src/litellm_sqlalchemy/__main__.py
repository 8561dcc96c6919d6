"""`python -m litellm_sqlalchemy` is the command `litellm-sqlalchemy`."""

import sys

from litellm_sqlalchemy.cli import main

sys.exit(main())
