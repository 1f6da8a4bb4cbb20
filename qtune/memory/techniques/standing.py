"""What a model holds through a whole step with no memory technique on, as counts that `plan.parameter_count` makes."""

from dataclasses import dataclass, field

Parts = dict[str, int]  # bytes by part
ATTENTION_PASSES = 3.5  # forward and backward beside forward alone, which has 2 products to the 5 of backward
PAGED_OPTIMIZER = "paged optimizer"  # on the card while there is room, and not of torch's allocator


@dataclass(frozen=True)
class Layer:
    """One decoder layer's frozen weights: bytes where they stand on the device, and packed for streaming."""

    resident_bytes: int
    packed_bytes: int


@dataclass(frozen=True)
class Standing:
    """Bytes of a whole model, and the counts that a plan is made from. A tied embedding has no table of its own: the
    head's is read for it. Gradients are as large as the adapter.

    `head_parameters` are vocabulary x hidden; `attention_width` is heads x head_dim of a layer. `refusals` says which
    techniques the model does not allow, by their names, each with a sentence on why, and `movable` how many bytes those
    would move that are counted nowhere else. `paged_bytes` of the optimizer's the driver moves between card and host.
    `left_out` says which linear layers can have no adapter, by name, each with why.
    `document_tokens` is the length of a token's document, the mean over what is trained on.

    `ranks` hold the model together, and hand each other their parts over a link that brings `link_bytes` a second to
    each; `pass_seconds` is the arithmetic of the smallest batch, forward and backward. 0 for what is not known.
    """

    base_bytes: int
    layers: tuple[Layer, ...]
    embedding_bytes: int
    head_bytes: int
    quantized_head_bytes: int
    largest_bytes: int
    is_tied: bool
    adapter_bytes: int
    optimizer_bytes: int
    optimizer_workspace_bytes: int
    parameters: int
    active_parameters: int
    trained_parameters: int
    head_parameters: int
    attention_width: int
    key_value_heads: int
    refusals: dict[str, str]
    movable: dict[str, int]
    paged_bytes: int = 0
    left_out: dict[str, str] = field(default_factory=dict)
    document_tokens: float = 0.0
    ranks: int = 1
    link_bytes: float = 0.0
    pass_seconds: float = 0.0

    @property
    def frozen_operations(self) -> float:
        """Of a token, forward and backward, in frozen weights, which have no gradient."""
        return 4 * (self.active_parameters + self.head_parameters)

    @property
    def trained_operations(self) -> float:
        """Of a token, forward and backward, in the adapter."""
        return 6 * self.trained_parameters

    @property
    def attention_operations(self) -> float:
        """Of a token, forward and backward, for each token of its document."""
        return ATTENTION_PASSES * 2 * self.attention_width * max(1, len(self.layers))

    @property
    def attention_share(self) -> float:
        """Of all arithmetic of a pass forward and backward that keeps what it saves, attention's."""
        attention = self.attention_operations * self.document_tokens
        return attention / max(1, attention + self.frozen_operations + self.trained_operations)

    @property
    def attention_again(self) -> float:
        """Attention's forward pass alone, as a share of the same."""
        return self.attention_share / ATTENTION_PASSES

    def parts(self) -> Parts:
        """What stands on the device, by part, with nothing switched on."""
        return {
            "base": self.base_bytes,
            "embedding": 0 if self.is_tied else self.embedding_bytes,
            "head": self.head_bytes,
            "adapter": self.adapter_bytes,
            "gradients": self.adapter_bytes,
            "optimizer": self.optimizer_bytes - self.paged_bytes,
            PAGED_OPTIMIZER: self.paged_bytes,
        }
