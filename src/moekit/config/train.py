"""Configuration of training and of a whole run."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from moekit.config.adversarial import AdversarialConfig
from moekit.config.base import StrictConfig
from moekit.config.data import DataConfig
from moekit.config.elastic import DynamicExpertsConfig, ElasticConfig
from moekit.config.errors import require
from moekit.config.model import AnyModelConfig, ModelConfig


class OptimizerConfig(StrictConfig):
    """AdamW in groups: matrices with weight decay; norms, biases and embeddings without; router and experts apart."""

    lr: float = Field(default=3e-3, gt=0, description="peak learning rate of the matrices")
    router_lr_scale: float = Field(default=1.0, gt=0, description="factor on lr for routers")
    expert_lr_scale: float = Field(default=1.0, gt=0, description="factor on lr for expert matrices")
    embedding_lr_scale: float = Field(default=1.0, gt=0, description="factor on lr for embeddings")
    stem_lr_scale: float = Field(
        default=1.0, gt=0, description="factor on lr for the tables of a task's stems"
    )
    wide_lr_scale: float = Field(
        default=1.0, gt=0, description="factor on lr for the wide maps of tasks, which want 10 to 30"
    )
    weight_decay: float = Field(default=0.1, ge=0, description="decoupled weight decay of matrices")
    betas: tuple[float, float] = Field(default=(0.9, 0.95), description="AdamW's running-average factors")
    eps: float = Field(default=1e-8, gt=0, description="AdamW's epsilon")


class ScheduleConfig(StrictConfig):
    """Learning-rate schedule over optimizer steps."""

    kind: Literal["cosine", "wsd", "constant"] = Field(
        default="cosine",
        description="warm-up then cosine, warm-up then stable then decay, or warm-up then constant",
    )
    warmup_steps: int = Field(default=40, ge=0, description="steps of linear warm-up")
    decay_share: float = Field(default=0.3, gt=0, le=1, description="share of the steps in the decay of wsd")
    final_scale: float = Field(
        default=0.05, ge=0, le=1, description="learning rate at the end, as a share of the peak"
    )


class LoraConfig(StrictConfig):
    """Low-rank adaptation: the model is frozen, and some of its matrices get a small trainable part."""

    rank: int = Field(
        default=8, ge=1, description="inner width of the trained part, for each expert by itself"
    )
    alpha: float = Field(default=16.0, gt=0, description="the trained part counts alpha / rank times")
    targets: tuple[Literal["experts", "attention", "mlp"], ...] = Field(
        default=("experts",), description="whose matrices get one; mlp: dense and shared feed-forward blocks"
    )


class DistillConfig(StrictConfig):
    """Learning from another model's answers: its next-token distribution beside the text itself."""

    teacher: str = Field(
        default="", description="a run, a model folder, a Hugging Face folder or a GGUF file; must be given"
    )
    weight: float = Field(
        default=0.5,
        gt=0,
        le=1,
        description="share of the loss that the teacher gives; the text gives the rest",
    )
    temperature: float = Field(default=1.0, gt=0, description="divisor of both models' logits")


ParameterGroup = Literal["routers", "experts", "embeddings", "matrices", "vectors", "stems", "wide"]


class RecordConfig(StrictConfig):
    """What a run keeps of its routing, in its folder `routing`."""

    tokens: int = Field(
        default=1024,
        ge=0,
        description="validation tokens, the same ones each time, whose choices are kept; 0 keeps sums alone",
    )
    every: int = Field(default=10, ge=1, description="steps between moments of the history of choices")


class AlarmConfig(StrictConfig):
    """When a run says that its routers go wrong."""

    dead_steps: int = Field(
        default=200, ge=1, description="steps without tokens after which an expert is called dead"
    )
    collapse_steps: int = Field(
        default=50, ge=1, description="steps that a few experts may have nearly all tokens without an alarm"
    )


class TrainConfig(StrictConfig):
    """The training loop."""

    steps: int = Field(default=300, ge=1, description="optimizer steps")
    batch_size: int = Field(
        default=16, ge=1, description="sequences in an optimizer step, over all micro-batches"
    )
    accumulation: int = Field(default=1, ge=1, description="micro-batches in an optimizer step")
    optimizer: OptimizerConfig = Field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = Field(default_factory=ScheduleConfig)
    trainable: tuple[ParameterGroup, ...] | None = Field(
        default=None,
        description="groups of parameters that are trained, such as [routers, experts]; all where null",
    )
    lora: LoraConfig | None = Field(
        default=None,
        description="train low-rank parts of frozen matrices; null trains the matrices themselves",
    )
    distill: DistillConfig | None = Field(
        default=None, description="a teacher whose answers are learnt as well; null for none"
    )
    elastic: ElasticConfig | None = Field(
        default=None,
        description="train for several numbers of experts at once; null trains at moe.top_k alone",
    )
    experts: DynamicExpertsConfig | None = Field(
        default=None, description="split, revive, drop or add experts while training; null keeps them"
    )
    adversarial: AdversarialConfig | None = Field(
        default=None, description="learn from inputs that are moved against the model; null for none"
    )
    gradient_clip: float = Field(default=1.0, gt=0, description="largest norm of the whole gradient")
    precision: Literal["auto", "bf16", "float32"] = Field(
        default="auto", description="autocast type; auto takes bf16 where the machine has it in hardware"
    )
    recompute: bool = Field(
        default=False, description="recompute activations in the backward pass to save memory"
    )
    device: str = Field(default="auto", description="cpu, cuda, cuda:N, mps or auto")
    seed: int = Field(default=0, ge=0, description="seed of initial weights, data order and routing noise")
    validate_every: int = Field(
        default=100, ge=0, description="steps between validations; 0 validates at the end only"
    )
    validation_batches: int = Field(default=8, ge=1, description="batches in each validation during training")
    checkpoint_every: int = Field(
        default=200, ge=0, description="steps between checkpoints; 0 saves at the end only"
    )
    keep_checkpoints: int = Field(default=2, ge=1, description="checkpoints that stay on disk")
    log_every: int = Field(default=10, ge=1, description="steps between lines of metrics")
    trackers: tuple[Literal["tensorboard", "wandb"], ...] = Field(
        default=(), description="further trackers beside the JSONL file"
    )
    record: RecordConfig | None = Field(
        default=None, description="keep what routers decided, through training; null keeps nothing"
    )
    alarms: AlarmConfig | None = Field(
        default_factory=AlarmConfig, description="say once what goes wrong with a router; null says nothing"
    )

    @model_validator(mode="after")
    def _rules(self) -> TrainConfig:
        require(self.batch_size % self.accumulation == 0, "batch_size", self.batch_size,
                f"must be a multiple of accumulation ({self.accumulation})")  # fmt: skip
        require(self.experts is None or (self.lora is None and self.trainable is None), "experts", "set",
                "cannot be combined with lora or trainable, which freeze what it changes")  # fmt: skip
        require(self.experts is None or self.elastic is None or not self.elastic.n_experts, "elastic",
                "n_experts", "must have no n_experts with experts: copies stand behind the prefix, and what is dropped "
                "leaves it")  # fmt: skip
        require(self.lora is None or self.trainable is None, "lora", "set",
                "cannot be combined with trainable: it freezes everything else", "Remove one of them")  # fmt: skip
        return self


class RunConfig(StrictConfig):
    """Everything that defines a run; stored beside it as config.yaml."""

    name: str = Field(default="run", description="name of the run, part of its folder")
    runs_dir: str = Field(default="runs", description="folder that holds the folders of runs")
    model: AnyModelConfig = Field(default_factory=ModelConfig)
    data: DataConfig = Field(default_factory=DataConfig)
    train: TrainConfig = Field(default_factory=TrainConfig)

    @model_validator(mode="after")
    def _predicts_tokens(self) -> RunConfig:
        require(self.model.kind != "encoder", "model.kind", self.model.kind,
                "must be decoder or transformer_xl in a run",
                "Training predicts the next token, which an encoder has seen")  # fmt: skip
        return self
