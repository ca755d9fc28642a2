"""KFP component: merge."""

from kfp import dsl


@dsl.container_component
def merge(
    adapter: dsl.Input[dsl.Model],
    dataset: dsl.Input[dsl.Dataset],
    base_model: str,
    storage_uri: str,
    merge_base: str,
    export: str,
    model_uri: dsl.OutputPath(str),
    merge_info: dsl.Output[dsl.Artifact],
    report: dsl.Output[dsl.HTML],
    metrics: dsl.Output[dsl.Metrics],
):
    """Base model + adapter → merged model, proven on held-out rows; only its address travels on."""
    return dsl.ContainerSpec(
        image="medical-qa:dev",
        command=["python", "-m", "components.merge"],
        args=["--executor_input", dsl.PIPELINE_TASK_EXECUTOR_INPUT_PLACEHOLDER],
    )
