"""Put a model into service: `python -m components.deploy --model_uri …`; also stop, status and rollback."""

from __future__ import annotations

from typing import TYPE_CHECKING

from components.common.errors import UserError, run_command
from components.deploy.config import DeploySettings

if TYPE_CHECKING:
    from components.deploy.folder import ServiceFolder
    from components.deploy.target import Target


def main(argv: list[str] | None = None) -> None:
    settings, outputs = DeploySettings.parse("python -m components.deploy", argv)

    from components.common.files import write_json
    from components.deploy.folder import ServiceFolder
    from components.deploy.model import find_model
    from components.deploy.rollout import Record, former_model, roll, stop
    from components.deploy.status import show_live, status_table

    folder = ServiceFolder(settings.state_dir, settings.service_name)
    if settings.action == "status":
        print(status_table(_target(settings, folder), folder))
        return
    if settings.action == "roll" and not settings.model_uri:
        raise UserError("there is no model to deploy", where="--model_uri", fix="give the model_uri that the merge step printed")
    model = find_model(settings.model_uri) if settings.action == "roll" else None
    with folder.lock(settings.action):
        target = _target(settings, folder)
        if settings.action == "stop":
            stopped = stop(target, folder)
            print(f"stopped {settings.service_name}: {', '.join(server.description for server in stopped) or 'no server was running'}")
            return
        live = target.live()
        model = model or former_model(folder, live)

        record = Record(settings, model, target.url, live)
        try:
            server = roll(target, model, settings, record)
        finally:
            folder.append_history(record.summary())
            write_json(settings.rollout, record.to_json())

    outputs.write(metadata={"rollout": {"url": target.url, "digest": model.digest, "outcome": record.outcome}})
    print(show_live(target, server, record.outcome))


def _target(settings: DeploySettings, folder: ServiceFolder) -> Target:
    if settings.deploy_target == "docker":
        from components.deploy.docker import DockerTarget

        return DockerTarget(folder, settings.service_image, settings.service_host, settings.service_port, settings.drain_s)
    from components.deploy.process import ProcessTarget

    return ProcessTarget(folder, settings.service_host, settings.service_port, settings.drain_s)


if __name__ == "__main__":
    run_command(main)
