"""The pipeline: prepare → train → merge → evaluate → deploy, and a report whatever happens.

Read `medical_qa` as the picture in the README. Run as a program, this file is the command line: `python pipeline.py --help`.

Every value is a run-time parameter, so one compiled file serves every cluster; every default is written once, in the `config.py` of
the step that uses it; every parameter is passed explicitly, because an omitted one fails on a KFP 2.17.0 backend.
"""

from kfp import dsl, kubernetes

from components.deploy.component import deploy
from components.deploy.config import DeploySettings
from components.evaluate.component import evaluate
from components.evaluate.config import EvaluateSettings
from components.merge.component import merge
from components.merge.config import MergeSettings
from components.prepare.component import prepare
from components.prepare.config import PrepareSettings
from components.report.component import report
from components.train.component import train
from components.train.config import TrainSettings

STORAGE_KEYS = {
    "AWS_ACCESS_KEY_ID": "AWS_ACCESS_KEY_ID",
    "AWS_SECRET_ACCESS_KEY": "AWS_SECRET_ACCESS_KEY",
    "AWS_ENDPOINT_URL": "AWS_ENDPOINT_URL",
}


# What checks the values of the parameters that a step takes, before anything runs.
SETTINGS = (
    (prepare, PrepareSettings),
    (train, TrainSettings),
    (merge, MergeSettings),
    (evaluate, EvaluateSettings),
    (deploy, DeploySettings),
)


@dsl.pipeline(name="medical-qa", description="Fine-tune a medical question-answering model and put it into service")
def medical_qa(
    # data
    data_path: str = PrepareSettings.default("data_path"),
    data_digest: str = PrepareSettings.default("data_digest"),
    question_column: str = PrepareSettings.default("question_column"),
    answer_column: str = PrepareSettings.default("answer_column"),
    validation_fraction: float = PrepareSettings.default("validation_fraction"),
    test_fraction: float = PrepareSettings.default("test_fraction"),
    # training
    base_model: str = TrainSettings.default("base_model"),
    max_length: str = TrainSettings.default("max_length"),
    batch_size: str = TrainSettings.default("batch_size"),
    gradient_accumulation_steps: str = TrainSettings.default("gradient_accumulation_steps"),
    packing: str = TrainSettings.default("packing"),
    epochs: str = TrainSettings.default("epochs"),
    learning_rate: str = TrainSettings.default("learning_rate"),
    warmup_steps: str = TrainSettings.default("warmup_steps"),
    lora_r: str = TrainSettings.default("lora_r"),
    lora_alpha: str = TrainSettings.default("lora_alpha"),
    lora_dropout: str = TrainSettings.default("lora_dropout"),
    use_rslora: bool = TrainSettings.default("use_rslora"),
    use_dora: bool = TrainSettings.default("use_dora"),
    quantization: str = TrainSettings.default("quantization"),
    gradient_checkpointing: str = TrainSettings.default("gradient_checkpointing"),
    precision: str = TrainSettings.default("precision"),
    evaluations_per_epoch: int = TrainSettings.default("evaluations_per_epoch"),
    patience: int = TrainSettings.default("patience"),
    sharding: str = TrainSettings.default("sharding"),
    num_nodes: int = TrainSettings.default("num_nodes"),
    seed: int = TrainSettings.default("seed"),
    # merging
    merge_base: str = MergeSettings.default("merge_base"),
    export: str = MergeSettings.default("export"),
    # evaluation and the gate
    sample_size: int = EvaluateSettings.default("sample_size"),
    max_new_tokens: int = EvaluateSettings.default("max_new_tokens"),
    bertscore_model: str = EvaluateSettings.default("bertscore_model"),
    exam_path: str = EvaluateSettings.default("exam_path"),
    exam_sample_size: int = EvaluateSettings.default("exam_sample_size"),
    guarded: str = EvaluateSettings.default("guarded"),
    tolerance: float = EvaluateSettings.default("tolerance"),
    minimums: str = EvaluateSettings.default("minimums"),
    max_degenerate: float = EvaluateSettings.default("max_degenerate"),
    max_never_stopped: float = EvaluateSettings.default("max_never_stopped"),
    # service
    deploy_target: str = DeploySettings.default("deploy_target"),
    service_name: str = DeploySettings.default("service_name"),
    service_host: str = DeploySettings.default("service_host"),
    service_port: int = DeploySettings.default("service_port"),
    state_dir: str = str(DeploySettings.default("state_dir")),
    # where it runs
    image: str = "medical-qa:dev",
    light_image: str = "medical-qa-light:dev",
    storage_uri: str = "s3://medical-qa",
    storage_secret: str = "medical-qa-storage",
    cpu: str = "4",
    memory: str = "32Gi",
    accelerator_type: str = "nvidia.com/gpu",
    accelerator_count: str = "1",
    tolerations: list = [],  # noqa: B006 - KFP reads it as a constant
    node_selector: dict = {},  # noqa: B006
    run_record: str = "",
):
    def light(task: dsl.PipelineTask) -> dsl.PipelineTask:
        """A step without a model: the small image."""
        task.set_container_image(light_image)
        kubernetes.use_secret_as_env(task, storage_secret, STORAGE_KEYS, optional=True)
        return task

    def heavy(task: dsl.PipelineTask) -> dsl.PipelineTask:
        """A step that runs the model: the large image, and the accelerator."""
        task.set_container_image(image).set_cpu_limit(cpu).set_memory_limit(memory)
        task.set_accelerator_type(accelerator_type).set_accelerator_limit(accelerator_count)
        # The setters above don't tell KFP 2.17's compiler that the task reads these: inside an ExitHandler they would be missing.
        task.register_pipeline_channels([cpu, memory, accelerator_type, accelerator_count])
        kubernetes.add_toleration_json(task, tolerations)
        kubernetes.add_node_selector_json(task, node_selector)
        kubernetes.use_secret_as_env(task, storage_secret, STORAGE_KEYS, optional=True)
        return task

    reporting = light(report(run_record=run_record)).set_caching_options(enable_caching=False)
    with dsl.ExitHandler(reporting, name="pipeline"):
        prepared = light(
            prepare(
                data_path=data_path,
                data_digest=data_digest,
                question_column=question_column,
                answer_column=answer_column,
                validation_fraction=validation_fraction,
                test_fraction=test_fraction,
            )
        )
        trained = heavy(
            train(
                dataset=prepared.outputs["dataset"],
                base_model=base_model,
                max_length=max_length,
                batch_size=batch_size,
                gradient_accumulation_steps=gradient_accumulation_steps,
                packing=packing,
                epochs=epochs,
                learning_rate=learning_rate,
                warmup_steps=warmup_steps,
                lora_r=lora_r,
                lora_alpha=lora_alpha,
                lora_dropout=lora_dropout,
                use_rslora=use_rslora,
                use_dora=use_dora,
                quantization=quantization,
                gradient_checkpointing=gradient_checkpointing,
                precision=precision,
                evaluations_per_epoch=evaluations_per_epoch,
                patience=patience,
                sharding=sharding,
                num_nodes=num_nodes,
                checkpoint_uri=f"{storage_uri}/checkpoints",
                seed=seed,
            )
        )
        merged = heavy(
            merge(
                adapter=trained.outputs["adapter"],
                dataset=prepared.outputs["dataset"],
                base_model=base_model,
                storage_uri=storage_uri,
                merge_base=merge_base,
                export=export,
            )
        )
        evaluated = heavy(
            evaluate(
                dataset=prepared.outputs["dataset"],
                model_uri=merged.outputs["model_uri"],
                base_model=base_model,
                sample_size=sample_size,
                max_new_tokens=max_new_tokens,
                bertscore_model=bertscore_model,
                exam_path=exam_path,
                exam_sample_size=exam_sample_size,
                guarded=guarded,
                tolerance=tolerance,
                minimums=minimums,
                max_degenerate=max_degenerate,
                max_never_stopped=max_never_stopped,
                seed=seed,
            )
        )
        with dsl.If(evaluated.outputs["decision"] == "promote", name="promoted"):
            deployed = light(
                deploy(
                    model_uri=merged.outputs["model_uri"],
                    deploy_target=deploy_target,
                    service_name=service_name,
                    service_host=service_host,
                    service_port=service_port,
                    service_image=image,
                    state_dir=state_dir,
                )
            )
            deployed.set_caching_options(enable_caching=False)


if __name__ == "__main__":
    from orchestration.cli import main

    main()
