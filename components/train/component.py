"""KFP component: train."""

from kfp import dsl


@dsl.container_component
def train(
    dataset: dsl.Input[dsl.Dataset],
    base_model: str,
    max_length: str,
    batch_size: str,
    gradient_accumulation_steps: str,
    packing: str,
    epochs: str,
    learning_rate: str,
    warmup_steps: str,
    lora_r: str,
    lora_alpha: str,
    lora_dropout: str,
    use_rslora: bool,
    use_dora: bool,
    quantization: str,
    gradient_checkpointing: str,
    precision: str,
    evaluations_per_epoch: int,
    patience: int,
    checkpoint_uri: str,
    sharding: str,
    num_nodes: int,
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
