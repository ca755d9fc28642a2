"""No request fails while the model changes: eight clients without a pause, on kept and fresh connections, httpx and plain sockets."""

from __future__ import annotations

from pathlib import Path

from tests.unit.deploy_support import Command, Load, free_port, project_with_stand_in, stored_model


def test_no_request_fails_through_three_rolls_and_a_rollback(tmp_path: Path) -> None:
    command = Command(project_with_stand_in(tmp_path), tmp_path / "state", free_port())
    models = [stored_model(tmp_path, name) for name in "abcd"]
    try:
        assert command.roll(models[0]).returncode == 0
        with Load("127.0.0.1", command.port).running() as load:
            load.wait_for(models[0].digest)
            for model in models[1:]:
                result = command.roll(model)
                assert result.returncode == 0, result.stderr
                load.wait_for(model.digest)
            former = load.answers[models[2].digest]
            assert command.run("--action", "rollback").returncode == 0
            load.wait_for(models[2].digest, former + 20)
            # Nothing of a rejected model may be heard, and its end may disturb nobody.
            bad = stored_model(tmp_path, "bad", unhealthy_after_answers=40)
            assert command.roll(bad, "--watch_s", "5").returncode == 2
            back = load.answers[models[2].digest]
            load.wait_for(models[2].digest, back + 20)
        print(f"{sum(load.answers.values())} answers, {len(load.failures)} failures")
        assert not load.failures, (len(load.failures), load.failures[:5])
    finally:
        command.run("--action", "stop")
        command.clean_up()
