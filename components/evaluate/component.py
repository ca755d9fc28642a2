"""KFP component: evaluate."""

from kfp import dsl


@dsl.container_component
def evaluate(
    dataset: dsl.Input[dsl.Dataset],
    model_uri: str,
    base_model: str,
    sample_size: int,
    max_new_tokens: int,
    bertscore_model: str,
    exam_path: str,
    exam_sample_size: int,
    tolerance: float,
    guarded: str,
    minimums: str,
    max_degenerate: float,
    max_never_stopped: float,
    seed: int,
    decision: dsl.OutputPath(str),
    results: dsl.Output[dsl.Artifact],
    report: dsl.Output[dsl.HTML],
    metrics: dsl.Output[dsl.Metrics],
):
    """Model + held-out rows → metrics, report and decision."""
    return dsl.ContainerSpec(
        image="medical-qa:dev",
        command=["python", "-m", "components.evaluate"],
        args=["--executor_input", dsl.PIPELINE_TASK_EXECUTOR_INPUT_PLACEHOLDER],
    )
