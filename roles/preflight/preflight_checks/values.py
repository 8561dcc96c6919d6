"""Whether those who read a value take it: the log's package, systemd, PostgreSQL, LiteLLM."""

from __future__ import annotations

import datetime
import re
from collections.abc import Iterator
from typing import Any

from .controller import UPDATE
from .model import CONTROLLER, Host, Run, check
from .secrets import type_name
from .services import ENVIRONMENT_VARIABLES
from .variables import quoted, where

SETTING_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_$]*(\.[A-Za-z_][A-Za-z0-9_$]*)*")
ENVIRONMENT_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
# What the gateway's launcher and those that it starts rest on: a key of that name would take its place.
PROCESS_ENVIRONMENT = re.compile(
    r"PATH|HOME|USER|LOGNAME|SHELL|TMPDIR|LD_\w+|GLIBC_TUNABLES|PYTHON\w+|LITELLM_MASTER_KEY(_PREVIOUS)?|"
    r"LITELLM_SQLALCHEMY_SETTINGS|CREDENTIALS_DIRECTORY|NOTIFY_SOCKET|GATEWAY_(ADDRESS|FIRST_PORT|MAX_REQUEST_MB)"
)
# The role, a variable of its own, and the least that it may be.
LEAST = (
    ("postgresql", "postgresql_log_days", 1),
    ("postgresql_backup", "postgresql_backup_recovery_window_days", 1),
    ("postgresql_backup", "postgresql_backup_archive_timeout", 0),
    ("postgresql_backup", "postgresql_backup_random_delay", 0),
)


@check("log-settings", "The request log's package takes its settings")
def log_settings(run: Run) -> Iterator[tuple[str, ...]]:
    for reason in run.controller["log_unchecked"]:
        yield CONTROLLER, f"the log's settings cannot be checked: {reason}", UPDATE
    for host in run.on("litellm_logger"):
        for name, refusal in run.controller["log_refusals"].get(host.name, ()):
            fix = "see the settings in files/litellm_sqlalchemy/README.md."
            yield host.name, f"{name}{where(host, name)} is refused by the log: {refusal}.", fix


@check("validation-model", "The validation's model is one that the gateway has")
def validation_model(run: Run) -> Iterator[tuple[str, ...]]:
    for host in run.on("litellm_logger"):
        name, model = "litellm_logger_validation_model", run.value(host, "litellm_logger_validation_model")
        own = run.mapping(host, "litellm_logger_settings").get("validation")
        if isinstance(own, dict) and "model" in own:
            name, model = "litellm_logger_settings.validation.model", own["model"]
        known = model_names(run, host)
        if not model or not isinstance(model, str) or not known:
            continue
        if not any(re.fullmatch(re.escape(one).replace(r"\*", ".*"), model) for one in known):
            yield (
                host.name,
                f"{name}{where(host, name.partition('.')[0])} is {model}, which litellm_models does not have.",
                f"set it to one that it has: {', '.join(sorted(known)[:5])}.",
            )


def model_names(run: Run, host: Host) -> set[str]:
    """Return what clients may call the gateway's models; `*` stands for any characters."""
    models = run.value(host, "litellm_models")
    found: set[Any] = set()
    for model in models if isinstance(models, list) else []:
        parameters = model.get("litellm_params") if isinstance(model, dict) else None
        if isinstance(parameters, dict):
            found |= {model.get("model_name"), parameters.get("model")}
    for name, key in (("litellm_router_settings", "model_group_alias"), ("litellm_settings", "model_alias_map")):
        aliases = run.mapping(host, name).get(key)
        found |= set(aliases) if isinstance(aliases, dict) else set()
    return {name for name in found if isinstance(name, str)}


@check("environment-names", "Keys have names that an environment can have, and take nothing's place there")
def environment_names(run: Run) -> Iterator[tuple[str, ...]]:
    for host in run.on("litellm"):
        for name in ENVIRONMENT_VARIABLES:
            for position, key in enumerate(run.mapping(host, name), 1):
                if not ENVIRONMENT_NAME.fullmatch(key):
                    # Who mixes up name and key would find the key in the report.
                    shown = f"({len(key)} characters, hidden)" if key.startswith("sk-") or len(key) > 24 else repr(key)
                    yield (
                        host.name,
                        f"{name}{where(host, name)} has a name that no environment variable can have: "
                        f"entry {position}, {shown}.",
                        "write NAME: value, the name of letters, digits and _ and not beginning with a digit.",
                    )
                elif name == "litellm_provider_keys" and PROCESS_ENVIRONMENT.fullmatch(key):
                    yield (
                        host.name,
                        f"{name}{where(host, name)} has {key}, which would take the place of the gateway's own.",
                        "give the key another name, also where os.environ/ refers to it, or remove it.",
                    )


@check("postgresql-settings", "Settings of PostgreSQL are names with plain values, and none that is decided elsewhere")
def postgresql_settings(run: Run) -> Iterator[tuple[str, ...]]:
    for host in run.on("postgresql"):
        place = where(host, "postgresql_settings")
        for key, value in run.mapping(host, "postgresql_settings").items():
            if role := run.controller["decided_settings"].get(key.lower()):
                yield (
                    host.name,
                    f"postgresql_settings.{key}{place} is decided by the role {role}.",
                    f"remove it; roles/{role}/vars/main.yml says which variable sets it, if any does.",
                )
            elif not SETTING_NAME.fullmatch(key):
                fix = "write the name as postgresql.conf has it."
                yield host.name, f"postgresql_settings{place} has {quoted(key)}, which is no setting's name.", fix
            elif not all(isinstance(one, (str, int, float)) for one in (value if isinstance(value, list) else [value])):
                seen = "empty" if value is None else f"{type_name(value)} ({quoted(value)})"
                yield host.name, f"postgresql_settings.{key}{place} is {seen}.", "give it one value, or a list of them."


@check("backup-values", "What the backups go by has the keys and numbers that they know")
def backup_values(run: Run) -> Iterator[tuple[str, ...]]:
    for role, name, least in LEAST:
        for host in run.on(role):
            value = run.value(host, name, least)
            if re.fullmatch(r"-?\d+", str(value)) and int(value) < least:
                yield host.name, f"{name}{where(host, name)} is {value}.", f"set it to {least} or more."
    for host in run.on("postgresql_backup"):
        for name, complete, least in (
            ("postgresql_backup_schedules", True, None),
            ("postgresql_backup_limits", True, 1),
            ("postgresql_backup_retention", False, 0),
        ):
            value = run.value(host, name)
            known = run.defaults["postgresql_backup"][name]
            for fault, fix in faults(value, list(known), complete, least) if isinstance(value, dict) else ():
                yield host.name, f"{name}{where(host, name)} {fault}", fix
        share = run.value(host, "postgresql_backup_dump_share", 1)
        if isinstance(share, (int, float)) and not 0 < share <= 1:
            yield (
                host.name,
                f"postgresql_backup_dump_share{where(host, 'postgresql_backup_dump_share')} is {share}.",
                "set it above 0 and to at most 1.",
            )


def faults(value: dict[str, Any], known: list[str], complete: bool, least: int | None) -> Iterator[tuple[str, str]]:
    """Yield (what is wrong, what to do) of a mapping with these keys to times or, with `least`, whole numbers."""
    for key in value.keys() - set(known):
        yield f"has {key}, which nothing reads.", f"the keys are {', '.join(known)}."
    if complete and (missing := [key for key in known if key not in value]):
        yield f"has no {', '.join(missing)}.", "name all keys: what is set takes the default's place as a whole."
    for key, item in value.items():
        if key not in known:
            continue
        if least is None and (item is None or isinstance(item, (bool, list, dict))):
            yield f"has {key}: {quoted(item)}.", "give it a time as systemd.time(7) has it, in quotes."
        elif least is not None and (not isinstance(item, int) or isinstance(item, bool) or item < least):
            yield f"has {key}: {quoted(item)}.", f"give it a whole number of at least {least}, without quotes."


def schedules(run: Run, host: Host) -> Iterator[tuple[str, str]]:
    """Yield (variable, time) of every timer of the host."""
    found: dict[str, Any] = {}
    if "postgresql_backup" in host.roles:
        timers = run.mapping(host, "postgresql_backup_schedules")
        found |= {f"postgresql_backup_schedules.{key}": time for key, time in timers.items()}
    if "litellm_logger" in host.roles:
        found["litellm_logger_prune_schedule"] = run.value(host, "litellm_logger_prune_schedule")
    # without quotes, YAML makes a date of 2027-01-01 and the number 36000 of 10:00:00
    yield from ((name, str(time)) for name, time in found.items() if isinstance(time, (str, int, datetime.date)))


@check("schedule", "Timers run at times that the host's systemd knows")
def schedule(run: Run) -> Iterator[tuple[str, ...]]:
    for host, facts in run.looked_at():
        for name, time in schedules(run, host):
            if facts["calendars"].get(time):
                yield (
                    host.name,
                    f"{name}{where(host, name.partition('.')[0])} is {time!r}, which systemd does not take as a time.",
                    "write it in quotes as systemd.time(7) has it, such as `Sun *-*-* 01:00`.",
                )
