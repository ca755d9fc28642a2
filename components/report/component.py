"""KFP component: report."""

from kfp import dsl


@dsl.container_component
def report(
    status: dsl.PipelineTaskFinalStatus,
    run_record: str,
    page: dsl.Output[dsl.HTML],
):
    """Final status → the page of the run, also after a failure."""
    return dsl.ContainerSpec(
        image="medical-qa-light:dev",
        command=["python", "-m", "components.report"],
        args=["--executor_input", dsl.PIPELINE_TASK_EXECUTOR_INPUT_PLACEHOLDER],
    )
