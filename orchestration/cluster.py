"""Runs on a cluster, through KFP's own client: submit one, and watch it to its end."""

from __future__ import annotations

import time
import warnings
from pathlib import Path
from typing import Any

from components.common.errors import ServiceError, UserError

# KFP's own waiter never returns on CANCELED (kubeflow/pipelines#14473).
END_STATES = {"SUCCEEDED", "FAILED", "SKIPPED", "CANCELED"}
POLL_EVERY_S = 5.0
# Transient answers of the API server while one waits: tolerated this many times in a row.
MAX_FAILURES = 12


def connect(host: str, namespace: str, token: str) -> Any:
    """A KFP client.

    Raises:
        ServiceError: nothing answers at `host`.
    """
    from kfp import Client

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            return Client(host=host, namespace=namespace, existing_token=token or None)
    except Exception as error:
        raise _unreachable(host, error) from None


def submit(client: Any, compiled: Path, parameters: dict[str, Any], *, run_name: str, experiment: str, service_account: str) -> str:
    """Submit the compiled pipeline; the new run's id.

    Raises:
        ServiceError: the API server refused it.
    """
    try:
        result = client.create_run_from_pipeline_package(
            str(compiled),
            arguments=parameters,
            run_name=run_name or None,
            experiment_name=experiment,
            service_account=service_account or None,
        )
    except Exception as error:
        raise ServiceError(
            f"KFP refused the run: {_first_line(error)}", fix="check the server's version (2.17 or newer) and your rights in the namespace"
        ) from None
    return str(result.run_id)


def watch(client: Any, run_id: str, *, poll_every_s: float = POLL_EVERY_S, timeout_s: float = 0) -> str:
    """Print each change of a run's tasks until the run ends, whatever the end; its final state.

    Args:
        timeout_s: give up after this many seconds; 0: never.

    Raises:
        UserError: no such run. ServiceError: the server stayed away, or the time is over.
    """
    import kfp_server_api

    seen: dict[str, str] = {}
    failures = 0
    started = time.monotonic()
    while True:
        try:
            run = client.get_run(run_id)
            failures = 0
        except kfp_server_api.ApiException as error:
            if error.status == 404:
                raise UserError(f"KFP has no run {run_id}", fix="see the run's page in the KFP UI for its id") from None
            failures += 1
        except Exception:
            failures += 1
        else:
            for task in (run.run_details.task_details if run.run_details else None) or []:
                name, state = str(task.display_name), str(task.state or "PENDING")
                if seen.get(name) != state and not name.endswith("-driver") and name != "executor":
                    seen[name] = state
                    print(f"{time.strftime('%H:%M:%S')}  {name}: {state}", flush=True)
            state = str(run.state or "PENDING").upper()
            if state in END_STATES:
                print(f"run {run_id}: {state}{': ' + run.error.message if run.error and run.error.message else ''}", flush=True)
                return state
        if failures >= MAX_FAILURES:
            raise ServiceError("the KFP API server stopped answering", where=run_id, fix="the run goes on without us: watch it again later")
        if timeout_s and time.monotonic() - started > timeout_s:
            raise ServiceError(
                f"the run did not end within {timeout_s:.0f} s",
                where=run_id,
                fix="the run goes on: watch it again with a longer --timeout_s",
            )
        time.sleep(poll_every_s)


def _unreachable(host: str, error: Exception) -> ServiceError:
    return ServiceError(
        f"no KFP API server answers: {_first_line(error)}",
        where=host,
        fix="check --host; inside a network: kubectl port-forward -n kubeflow svc/ml-pipeline-ui 8080:80, then --host http://localhost:8080",
    )


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    return text.splitlines()[0][:300] if text else type(error).__name__
