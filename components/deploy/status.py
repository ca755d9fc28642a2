"""What a person reads about a service: a short table, and how to ask it."""

from __future__ import annotations

from components.deploy.folder import ServiceFolder
from components.deploy.health import read_health
from components.deploy.target import Server, Target


def status_table(target: Target, folder: ServiceFolder) -> str:
    """What is live, as lines of name and value."""
    live, history = target.live(), folder.history()
    rows = [("service", folder.service_name)]
    if live:
        health = read_health(target.front_address)
        state = "answering" if health.digest == live.digest else f"not answering: {health.said}"
        rows += [("state", state), ("url", target.url), ("digest", live.digest), ("model_uri", live.model_uri)]
        rows += [("server", live.description), ("log", live.log)]
    else:
        rows += [("state", "nothing is live")]
    if history:
        last = history[-1]
        rows += [
            ("last", f"{last['action']} → {last['outcome']}, began {last['began_at']}"),
            ("history", f"{folder.path / 'history.jsonl'}, {len(history)} line(s)"),
        ]
    return "\n".join(f"{name:<10} {value}" for name, value in rows)


def show_live(target: Target, server: Server, outcome: str) -> str:
    """The end of a rollout: what is live, and a command to try it."""
    already = " already" if outcome == "already_live" else ""
    return (
        f"live{already}: {target.url}, model {server.digest[:12]} ({server.model_uri}), {server.description}\n"
        f'try it: curl -s {target.url}/ask -H \'Content-Type: application/json\' -d \'{{"question": "感冒了应该怎么办？", "max_length": 128}}\''
    )
