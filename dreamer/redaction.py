"""Keep secrets and home folders out of what a run writes down: configurations, commands, messages."""

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

REDACTED = "<redacted>"
SECRET_WORDS = frozenset(
    {"key", "apikey", "token", "secret", "secrets", "password", "passwords", "passwd", "passphrase"}
    | {"credential", "credentials"}
)
SHORTEST_SECRET = 8  # characters; shorter values of the environment would match by chance


def is_secret_name(name: str) -> bool:
    """Whether one of the words of ``name`` promises a secret. Words end at _ . - and at a capital letter.

    ``api_key``, ``hub.token`` and ``wandbApiKey`` do; ``monkey``, ``context_keys`` and ``table_seed`` do not.
    """
    return any(word.lower() in SECRET_WORDS for word in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", name))


def redact(config: Mapping[str, Any]) -> dict[str, Any]:
    """Copy ``config`` with secrets replaced by ``<redacted>`` and the home folder by ``~``.

    Secret is what a key promises to be secret (:func:`is_secret_name`), the user part of an address, and wherever it
    occurs the value of an environment variable with such a name, if it has 8 characters or more.

    Args:
        config: Nested mappings and lists of plain values. It is not changed.
    """
    return _redact_mapping(config, _environment_secrets())


def redact_text(text: str) -> str:
    """Replace the secrets of the environment, users in addresses and the home folder in ``text``."""
    return _redact_text(text, _environment_secrets())


def redact_command(argv: Sequence[str]) -> list[str]:
    """Copy a command line with secrets replaced, as :func:`redact` does.

    It knows ``a.b_key=VALUE``, ``+a.token=VALUE``, ``--token=VALUE``, ``--api-key VALUE`` and ``a={token: VALUE}``.
    """
    secrets, result, value_is_secret = _environment_secrets(), [], False
    for argument in argv:
        name, equals, value = argument.partition("=")
        if value_is_secret and not argument.startswith("--"):
            result.append(REDACTED)
        elif equals and value and is_secret_name(name):
            result.append(f"{name}={REDACTED}")
        else:
            result.append(_redact_text(re.sub(r"([\w.-]+)(\s*:\s*)([^\s,{}\[\]]+)", _redact_entry, argument), secrets))
        value_is_secret = not equals and argument.startswith("-") and is_secret_name(name)
    return result


def expand_home(config: Mapping[str, Any]) -> dict[str, Any]:
    """Copy ``config`` with ``~`` at the start of a text replaced by the home folder: what :func:`redact` shortened."""
    return {key: _expand(value) for key, value in config.items()}


def _expand(value: Any) -> Any:
    if isinstance(value, Mapping):
        return expand_home(value)
    if isinstance(value, list | tuple):
        return [_expand(entry) for entry in value]
    return str(Path.home()) + value[1:] if isinstance(value, str) and re.match(r"~(/|$)", value) else value


def _redact_mapping(config: Mapping[str, Any], secrets: Sequence[str]) -> dict[str, Any]:
    return {
        key: REDACTED if is_secret_name(str(key)) and _says_something(value) else _redact_value(value, secrets)
        for key, value in config.items()
    }


def _says_something(value: Any) -> bool:
    return value is not None and not isinstance(value, bool) and value not in ("", {}, [])


def _redact_value(value: Any, secrets: Sequence[str]) -> Any:
    if isinstance(value, Mapping):
        return _redact_mapping(value, secrets)
    if isinstance(value, list | tuple):
        return [_redact_value(entry, secrets) for entry in value]
    if isinstance(value, Path):
        value = str(value)
    return _redact_text(value, secrets) if isinstance(value, str) else value


def _redact_text(text: str, secrets: Sequence[str]) -> str:
    for secret in secrets:
        text = text.replace(secret, REDACTED)
    text = re.sub(r"(?<=://)[^/\s@]+@", f"{REDACTED}@", text)
    home = str(Path.home())
    return text if len(home) < 2 else re.sub(rf"(?<![\w./~-]){re.escape(home)}(?![\w.-])", "~", text)


def _redact_entry(match: re.Match[str]) -> str:
    name, colon, _ = match.groups()
    return f"{name}{colon}{REDACTED}" if is_secret_name(name) else match.group()


def _environment_secrets() -> list[str]:
    """Values of the environment that must not be written, longest first, because one may hold another."""
    named = {value for name, value in os.environ.items() if is_secret_name(name) and len(value) >= SHORTEST_SECRET}
    return sorted(named, key=len, reverse=True)
