"""KFP component: deploy."""

from kfp import dsl


@dsl.container_component
def deploy(
    model_uri: str,
    deploy_target: str,
    service_name: str,
    service_host: str,
    service_port: int,
    service_image: str,
    state_dir: str,
    rollout: dsl.Output[dsl.Artifact],
):
    """Model → answering service, or the former one put back."""
    return dsl.ContainerSpec(
        image="medical-qa-light:dev",
        command=["python", "-m", "components.deploy"],
        args=["--executor_input", dsl.PIPELINE_TASK_EXECUTOR_INPUT_PLACEHOLDER],
    )
