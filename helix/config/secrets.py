"""Keeping what is secret in the environment out of what a run writes.

A run writes down its command line and its configuration (reports, Hydra's `.hydra/`, W&B), and both may hold a
variable's value: `key=$TOKEN` by the shell, `key=${oc.env:TOKEN}` by OmegaConf. Masking it in each of these files
would need all of them to be known; a command that would write one is refused instead.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from helix.config.schema import ConfigError

# In the middle of a name a word has to be one; at its end also a part of one, as in PGPASSWORD.
_WORD = r"KEYS?|SECRETS?|TOKENS?|PASSWORDS?|PASSWD|PASSPHRASE|CREDENTIALS?"
_SECRET = re.compile(rf"(?:^|_)(?:{_WORD})_|(?:{_WORD})$|(?:^|_)(?:PASS|PWD|PAT|AUTH)$", re.IGNORECASE)
_LEAST_LENGTH = 8  # shorter ones are in many a text by chance, such as TOKENS=1


class SecretError(ConfigError):
    """A secret where a run would write it down."""


def refuse_secrets(told: Mapping[str, Any]) -> None:
    """Check that nothing a run will write down holds the value of an environment variable that is secret by its name.

    Args:
        told: texts, numbers, mappings and sequences of them; by the name that an error gives them.

    Raises:
        SecretError: if one does; the sentence has the variable's name, not its value.
    """
    secrets = {name: value for name, value in os.environ.items() if _SECRET.search(name)}
    # A path is none, as in SSL_KEY_DIR, and what is PWD alone is where the shell is.
    secrets = {name: value for name, value in secrets.items() if len(value) >= _LEAST_LENGTH and "/" not in value[:1]}
    for where, text in _texts("", told):
        for name, value in secrets.items():
            if value in text:
                raise SecretError(
                    f"{where} holds the value of the environment variable {name}, and a run's report would keep it; "
                    "leave it in the environment, where W&B and Hugging Face look for theirs"
                )


def _texts(where: str, told: Any) -> Iterator[tuple[str, str]]:
    if isinstance(told, str):
        yield where, told
    elif isinstance(told, Mapping):
        for key, each in told.items():
            yield where, str(key)
            yield from _texts(f"{where}.{key}" if where else str(key), each)
    elif isinstance(told, Sequence):
        for each in told:
            yield from _texts(where, each)
    else:  # a number may be one
        yield where, str(told)
