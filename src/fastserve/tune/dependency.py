"""Sees that the libraries of the extra `[tune]` are there, before anything else is done."""

from __future__ import annotations

import logging
import os
import warnings
from importlib.util import find_spec

from fastserve.errors import UnsupportedError

_NEEDED = ("torch", "transformers", "accelerate", "peft")


def check_tune_libraries() -> None:
    """Raise UnsupportedError where a library is missing; have those that are there write no progress bars and
    warnings of their own, and open no connection: models come from `fastserve.hub`."""
    missing = [name for name in _NEEDED if find_spec(name) is None]
    if missing:
        raise UnsupportedError(
            f"tuning needs {' and '.join(missing)}", hint="pip install 'fastserve-llm[tune]'"
        )
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    logging.getLogger("accelerate").setLevel(logging.ERROR)
    # Said of every loader on a machine without a GPU.
    warnings.filterwarnings("ignore", message=".*pin_memory.*", category=UserWarning)
