"""The rollout: candidate → ready → smoke → shift → watch → keep, or put the former back."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from components.common.errors import ModelError, ServiceError, UserError
from components.deploy.config import DeploySettings
from components.deploy.folder import ServiceFolder, now
from components.deploy.health import read_health, wait_until_ready
from components.deploy.model import Model, find_model
from components.deploy.smoke import ask_all, watch
from components.deploy.target import Server, Target

SETTLE_S = 0.3


class Record:
    """What happened in a rollout, stage by stage.

    `outcome` is one of: live (the new model serves), already_live (it did before), kept_former (failed before traffic moved),
    rolled_back (failed after it moved, the former serves again), failed (nothing served before, nothing serves now). A stage's name
    is one of the arrow line above, or front: the model was live already, only the front had to be there.
    """

    def __init__(self, settings: DeploySettings, model: Model, url: str, former: Server | None) -> None:
        self.outcome = "failed"
        self.error = ""
        self.stages: list[dict[str, Any]] = []
        self._facts = {
            "service": settings.service_name,
            "target": settings.deploy_target,
            "action": settings.action,
            "url": url,
            "model_uri": model.uri,
            "digest": model.digest,
            "former_digest": former.digest if former else None,
            "began_at": now(),
        }

    @contextmanager
    def stage(self, name: str) -> Iterator[dict[str, Any]]:
        """Time a stage; the block may add facts to the stage's entry."""
        entry: dict[str, Any] = {"stage": name, "ok": False}
        self.stages.append(entry)
        began = time.monotonic()
        try:
            yield entry
            entry["ok"] = True
        except BaseException as error:
            self.error = error.what if isinstance(error, UserError) else f"{type(error).__name__}: {error}".rstrip(": ")
            raise
        finally:
            entry["duration_s"] = round(time.monotonic() - began, 3)
            print(f"{name}: {'ok' if entry['ok'] else 'failed'}, {entry['duration_s']:.1f} s", flush=True)

    def summary(self) -> dict[str, Any]:
        """One line of the history."""
        duration_s = round(sum(entry["duration_s"] for entry in self.stages), 3)
        return {**self._facts, "outcome": self.outcome, "error": self.error or None, "duration_s": duration_s}

    def to_json(self) -> dict[str, Any]:
        return {**self.summary(), "stages": self.stages}


def roll(target: Target, model: Model, settings: DeploySettings, record: Record) -> Server:
    """Serve a model, or keep serving the former one.

    Returns:
        The server that is live now.

    Raises:
        ServiceError: a stage failed; the former model serves as before, if there was one.
    """
    former = target.live()
    if former and former.digest == model.digest and read_health(former.address).digest == model.digest:
        with record.stage("front"):
            target.open_front()
        record.outcome = "already_live"
        return former

    candidate, opened = None, False
    try:
        with record.stage("candidate") as entry:
            opened = target.open_front()
            if former:  # else nobody can say which server is one
                _stop_leftovers(target, former)
            candidate = target.start(model)
            entry["server"] = candidate.description
            print(
                f"candidate: {candidate.description}, model {model.digest[:12]}, at {candidate.address}, log: {candidate.log}", flush=True
            )
        with record.stage("ready"):
            running = candidate
            print(f"ready: waiting until the model is loaded, {settings.ready_timeout_s:g} s at most", flush=True)
            wait_until_ready(candidate.address, model.digest, settings.ready_timeout_s, lambda: target.is_running(running))
        with record.stage("smoke") as entry:
            entry["answers"] = ask_all(candidate.address, model.digest, settings.smoke_timeout_s)
        with record.stage("shift"):
            target.shift(candidate)
            time.sleep(SETTLE_S)  # connections on their way to the former are accepted before it is told to leave
        with record.stage("watch") as entry:
            entry.update(watch(target.front_address, model.digest, settings.watch_s, settings.smoke_timeout_s))
    except BaseException as error:
        lines = target.last_lines(candidate) if candidate else ""
        record.outcome = _put_back(target, former, candidate, opened)
        if isinstance(error, UserError):
            raise _explained(error, record, candidate, lines) from None
        raise

    record.outcome = "live"
    with record.stage("keep"):
        for server in target.servers():
            if server.name != candidate.name:
                target.stop(server)
    return candidate


def stop(target: Target, folder: ServiceFolder) -> list[Server]:
    """Close the public port and end every server of the service; the history stays. Returns the servers that ran."""
    servers = target.servers()
    target.stop_all()
    folder.append_history({"service": folder.service_name, "action": "stop", "outcome": "stopped", "began_at": now()})
    return servers


def former_model(folder: ServiceFolder, live: Server | None) -> Model:
    """The model that served before the live one, or before the last one when nothing is live: two rollbacks end where they began.

    Raises:
        ServiceError: the history names none. ModelError: it is gone.
    """
    served = [entry for entry in folder.history() if entry.get("outcome") == "live"]
    present = live.digest if live else served[-1]["digest"] if served else None
    former = next((entry for entry in reversed(served) if entry["digest"] != present), None)
    if former is None:
        raise ServiceError(
            "there is no former model to go back to",
            where=str(folder.path / "history.jsonl"),
            fix="roll another model first, or give one: --model_uri",
        )
    model = find_model(former["model_uri"])
    if model.digest != former["digest"]:
        raise ModelError(
            "another model has taken the former one's place", where=model.uri, fix="give the model to serve yourself: --model_uri"
        )
    return model


def _stop_leftovers(target: Target, live: Server) -> None:
    """End what a killed rollout left behind."""
    for server in target.servers():
        if server.name != live.name:
            print(f"stopping {server.description}: an interrupted rollout left it", flush=True)
            target.stop(server)


def _put_back(target: Target, former: Server | None, candidate: Server | None, opened: bool) -> str:
    """Make everything as it was, and say what came of it."""
    live = target.live()  # None also when the candidate died after the shift
    moved = former is not None and (live is None or live.name != former.name)
    if former and moved:
        target.shift(former)
        time.sleep(SETTLE_S)
    if opened and former is None:
        target.stop_all()
    else:
        if candidate:
            target.stop(candidate)
        for server in target.servers():  # one whose start was interrupted
            if former is None or server.name != former.name:
                target.stop(server)
    return "failed" if former is None else "rolled_back" if moved else "kept_former"


def _explained(error: UserError, record: Record, candidate: Server | None, lines: str) -> ServiceError:
    """The same error with the stage, the end of the log, and what serves now."""
    now_serving = {
        "failed": "nothing is live",
        "kept_former": "the former model still serves",
        "rolled_back": "the former model was put back and serves again",
    }[record.outcome]
    log = [f"{candidate.description}, log: {candidate.log}", *(f"  | {line}" for line in lines.splitlines())] if candidate else []
    return ServiceError(
        f"{record.stages[-1]['stage']}: {error.what}; {now_serving}",
        where="\n         ".join(part for part in [error.where, *log] if part),
        fix=error.fix or "see the log",
    )
