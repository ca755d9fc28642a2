"""KFP component: prepare."""

from kfp import dsl


@dsl.container_component
def prepare(
    data_path: str,
    data_digest: str,
    question_column: str,
    answer_column: str,
    validation_fraction: float,
    test_fraction: float,
    dataset: dsl.Output[dsl.Dataset],
    data_report: dsl.Output[dsl.HTML],
    metrics: dsl.Output[dsl.Metrics],
):
    """Question/answer rows → validated, split data set."""
    return dsl.ContainerSpec(
        image="medical-qa-light:dev",
        command=["python", "-m", "components.prepare"],
        args=["--executor_input", dsl.PIPELINE_TASK_EXECUTOR_INPUT_PLACEHOLDER],
    )
