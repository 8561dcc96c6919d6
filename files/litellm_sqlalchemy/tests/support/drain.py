"""A writer that ends when the spool is empty, as a program: drain.py SETTINGS."""

import sys
from pathlib import Path

from litellm_sqlalchemy.settings import Settings, load_settings
from litellm_sqlalchemy.writer import Writer


def drain(settings: Settings) -> None:
    """Deliver until there is nothing left to read."""
    writer = Writer(settings)
    try:
        while writer.drain_once():
            pass
    finally:
        writer._consumer.close()
        writer.engine.dispose()


if __name__ == "__main__":
    drain(load_settings(Path(sys.argv[1])))
