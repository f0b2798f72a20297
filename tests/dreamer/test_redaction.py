"""What is kept out of files: secrets by name and by value, and home folders."""

import json
import random
import string
from copy import deepcopy
from pathlib import Path

import pytest

from dreamer.redaction import REDACTED, expand_home, is_secret_name, redact, redact_command, redact_text

SECRET_NAMES = (
    "key",
    "api_key",
    "apiKey",
    "APIKey",
    "WANDB_API_KEY",
    "hub.token",
    "hf-token",
    "accessToken",
    "client_secret",
    "password",
    "db.passwd",
    "credential",
    "apikey",
    "S3KEY2",
)
PLAIN_NAMES = ("table_seed", "context_keys", "monkey", "keyboard", "tokenizer", "hotkeys", "turkey", "secretary")


@pytest.mark.parametrize("name", SECRET_NAMES)
def test_names_that_promise_a_secret(name):
    assert is_secret_name(name)
    assert redact({"a": [{name: "hunter2"}]}) == {"a": [{name: REDACTED}]}
    assert redact_command([f"{name}=hunter2", f"+logger.{name}=hunter2", f"--{name}", "hunter2", f"--{name}=x"]) == [
        f"{name}={REDACTED}",
        f"+logger.{name}={REDACTED}",
        f"--{name}",
        REDACTED,
        f"--{name}={REDACTED}",
    ]


@pytest.mark.parametrize("name", PLAIN_NAMES)
def test_names_that_do_not(name):
    config = {name: "hunter2", "nested": {name: [1, None, 2.5, True]}}
    assert redact(config) == config
    command = [f"{name}=hunter2", f"--{name}", "hunter2"]
    assert redact_command(command) == command


def test_nothing_is_no_secret():
    config = {"token": None, "key": "", "secret": {}, "password": False}
    assert redact(config) == config
    assert redact({"credential": {"user": "me"}, "key": 12345}) == {"credential": REDACTED, "key": REDACTED}


def test_secrets_of_the_environment(monkeypatch):
    monkeypatch.setenv("SOME_SERVICE_TOKEN", "abcdef123456")
    monkeypatch.setenv("SHORT_KEY", "walker")
    config = {"url": "x-abcdef123456-y", "other": "abcdef123456", "name": "walker"}
    assert redact(config) == {"url": f"x-{REDACTED}-y", "other": REDACTED, "name": "walker"}
    assert redact_command(["a=abcdef123456"]) == [f"a={REDACTED}"]
    assert "abcdef" not in redact_text("error: abcdef123456")


def test_one_secret_inside_another(monkeypatch):
    monkeypatch.setenv("A_KEY", "abcdefgh")
    monkeypatch.setenv("B_KEY", "abcdefgh-and-more")
    assert redact_text("abcdefgh-and-more") == REDACTED


def test_users_in_addresses():
    assert redact_text("https://me:hunter2@host/path") == f"https://{REDACTED}@host/path"
    assert redact_text("me@host https://host/a@b") == "me@host https://host/a@b"


def test_mappings_on_the_command_line():
    assert redact_command(["logger={api_key: hunter2, project: lucid}"]) == [
        f"logger={{api_key: {REDACTED}, project: lucid}}"
    ]
    assert redact_command(["train.py", "--token", "--verbose"]) == ["train.py", "--token", "--verbose"]


def test_home_is_shortened_and_found_again(monkeypatch):
    monkeypatch.setenv("HOME", "/home/ann")
    config = {"a": "/home/ann/data", "b": Path("/home/ann"), "c": "/home/anna/x", "d": "/mnt/home/ann", "e": ["~x"]}
    short = redact(config)
    assert short == {"a": "~/data", "b": "~", "c": "/home/anna/x", "d": "/mnt/home/ann", "e": ["~x"]}
    assert expand_home(short) == config | {"b": "/home/ann"}
    assert redact_command(["run_dir=/home/ann/runs/1"]) == ["run_dir=~/runs/1"]


def make_config(generator: random.Random, planted: list[str], depth: int = 0) -> dict:
    """Nested settings; the values under names that promise a secret are kept in ``planted``."""
    config = {}
    for _ in range(generator.randint(1, 4)):
        name = generator.choice(SECRET_NAMES + PLAIN_NAMES)
        value = "".join(generator.choices(string.ascii_letters, k=20))
        if name in SECRET_NAMES:
            planted.append(value)
        elif depth < 3:
            value = generator.choice([value, make_config(generator, planted, depth + 1), 3, None, [value]])
        config[name] = value
    return config


@pytest.mark.parametrize("seed", range(20))
def test_no_secret_survives_and_nothing_else_changes(seed):
    planted: list[str] = []
    config = make_config(random.Random(seed), planted)
    original = deepcopy(config)
    short = redact(config)
    assert config == original, "the argument is not changed"
    assert redact(short) == short, "twice is once"
    text = json.dumps(short)
    assert not [secret for secret in planted if secret in text]
    assert json.loads(text) == short

    def shape(value):
        if isinstance(value, dict):
            return {key: shape(entry) for key, entry in value.items() if not is_secret_name(key)}
        return value

    assert shape(short) == shape(original)
