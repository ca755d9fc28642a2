"""KFP component: merge."""

from kfp import dsl


@dsl.container_component
def merge(
    adapter: dsl.Input[dsl.Model],
    base_model: str,
    storage_uri: str,
    model_uri: dsl.OutputPath(str),
    merge_info: dsl.Output[dsl.Artifact],
    metrics: dsl.Output[dsl.Metrics],
):
    """Base model + adapter → merged model; only its address travels on."""
    return dsl.ContainerSpec(
        image="medical-qa:dev",
        command=["python", "-m", "components.merge"],
        args=["--executor_input", dsl.PIPELINE_TASK_EXECUTOR_INPUT_PLACEHOLDER],
    )
