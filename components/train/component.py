"""KFP component: train."""

from kfp import dsl


@dsl.container_component
def train(
    dataset: dsl.Input[dsl.Dataset],
    base_model: str,
    epochs: float,
    learning_rate: float,
    batch_size: int,
    gradient_accumulation_steps: int,
    max_length: int,
    warmup_steps: int,
    lora_r: int,
    lora_alpha: int,
    lora_dropout: float,
    load_in_4bit: bool,
    gradient_checkpointing: bool,
    precision: str,
    seed: int,
    adapter: dsl.Output[dsl.Model],
    curves: dsl.Output[dsl.HTML],
    metrics: dsl.Output[dsl.Metrics],
):
    """Data set + base model → LoRA adapter."""
    return dsl.ContainerSpec(
        image="medical-qa:dev",
        command=["python", "-m", "components.train"],
        args=["--executor_input", dsl.PIPELINE_TASK_EXECUTOR_INPUT_PLACEHOLDER],
    )
