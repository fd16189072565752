"""The native runtime (csrc/bind.cpp)."""

import enum
from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from fastserve.types import Batch, SamplingBatch  # what the binding reads by attribute

# (is_valid [R], token_ids [R], logprobs [R], top_token_ids [R, 20], top_logprobs [R, 20])
SampledRows = tuple[
    NDArray[np.bool_], NDArray[np.int32], NDArray[np.float32], NDArray[np.int32], NDArray[np.float32]
]

class Runtime:
    def __init__(self, num_threads: int = 0, isa: str = "") -> None: ...
    @property
    def num_threads(self) -> int: ...
    @property
    def isa(self) -> str: ...
    def decode(self, format: str, data: NDArray[np.uint8], count: int) -> NDArray[np.float32]: ...

class Weight:
    def __init__(
        self,
        runtime: Runtime,
        sources: Sequence[tuple[str, NDArray[np.uint8], int, int]],
        format: str,
        *,
        group_size: int = 0,
        activation_group_size: int = 0,
        scale_format: str = "bf16",
        offset: str = "none",
        storage: str = "dense",
    ) -> None: ...
    @staticmethod
    def from_panels(
        panels: NDArray[np.uint8],
        rows: int,
        depth: int,
        format: str,
        *,
        group_size: int = 0,
        activation_group_size: int = 0,
        scale_format: str = "bf16",
        offset: str = "none",
        storage: str = "dense",
    ) -> Weight: ...
    def stored_as(self, runtime: Runtime, storage: str) -> Weight: ...
    def share_of_zeros(self, runtime: Runtime) -> float: ...
    def can_be_stored_as(self, storage: str) -> bool: ...
    @property
    def storage(self) -> Literal["dense", "bitmask", "csr"]: ...
    @property
    def panels(self) -> NDArray[np.uint8]: ...
    @property
    def num_bytes(self) -> int: ...

class Rows(enum.Enum):
    TOKENS = 0

    OUTPUTS = 1

    SEQUENCES = 2

class IdSource(enum.Enum):
    token_ids = 0

    positions = 1

    token_types = 2

class PoolKind(enum.Enum):
    mean = 0

    first = 1

    last = 2

class FloatTable:
    def __init__(self, values: NDArray[np.float32]) -> None: ...

class AttentionScores:
    def __init__(
        self,
        scale: float,
        *,
        keys_before: int | None,
        keys_after: int | None,
        soft_cap: float | None,
        bias: FloatTable | None,
        first_key: int = 0,
    ) -> None: ...

class Matrix:
    def __init__(
        self,
        offset_bytes: int,
        stride: int,
        width: int,
        rows: Rows,
        group_size: int | None = None,
        strip_offset_bytes: int | None = None,
        needs_whole_sequences: bool = False,
    ) -> None: ...

class KvPool:
    def __init__(
        self, num_layers: int, num_blocks: int, num_kv_heads: int, head_dim: int, format: str
    ) -> None: ...
    @property
    def num_bytes(self) -> int: ...
    @property
    def block_bytes(self) -> int: ...
    def read_block(self, block: int, out: NDArray[np.uint8]) -> None: ...
    def write_block(self, block: int, data: NDArray[np.uint8]) -> None: ...
    def copy_block(self, source: int, target: int) -> None: ...

class AdapterTable:
    def __init__(self, num_slots: int, rows: int, depth: int, max_ranks: int) -> None: ...
    def set(
        self,
        slot: int,
        down: Weight,
        parts: Sequence[tuple[int, int, Weight, NDArray[np.float32] | None, NDArray[np.float32] | None]],
    ) -> None: ...
    def clear(self, slot: int) -> None: ...

class Plan:
    def __init__(
        self,
        runtime: Runtime,
        arena_bytes: int,
        *,
        max_tokens: int,
        max_outputs: int,
        max_sequences: int,
        num_blocks: int,
        max_context: int,
        vocab_size: int,
        num_token_types: int,
        needs_whole_sequences: bool,
    ) -> None: ...
    def embedding(
        self, ids: IdSource, weight: Weight, out: Matrix, offset: int = 0, scale: float = 1.0
    ) -> None: ...
    def linear(self, x: Matrix, weight: Weight, bias: NDArray[np.float32] | None, out: Matrix) -> None: ...
    def adapter_down(self, x: Matrix, table: AdapterTable, out: Matrix) -> None: ...
    def adapter_up(self, low: Matrix, table: AdapterTable, out: Matrix) -> None: ...
    def linear_activation(
        self, kind: str, x: Matrix, weight: Weight, bias: NDArray[np.float32] | None, out: Matrix
    ) -> None: ...
    def linear_gated_activation(
        self, kind: str, x: Matrix, weight: Weight, bias: NDArray[np.float32] | None, out: Matrix
    ) -> None: ...
    def quantize_rows(self, x: Matrix, out: Matrix) -> None: ...
    def rms_norm(self, x: Matrix, weight: NDArray[np.float32], eps: float, out: Matrix) -> None: ...
    def layer_norm(
        self, x: Matrix, weight: NDArray[np.float32], bias: NDArray[np.float32], eps: float, out: Matrix
    ) -> None: ...
    def add(self, x: Matrix, y: Matrix, out: Matrix) -> None: ...
    def add_rms_norm(
        self, x: Matrix, y: Matrix, weight: NDArray[np.float32], eps: float, out_sum: Matrix, out: Matrix
    ) -> None: ...
    def add_layer_norm(
        self,
        x: Matrix,
        y: Matrix,
        weight: NDArray[np.float32],
        bias: NDArray[np.float32],
        eps: float,
        out_sum: Matrix,
        out: Matrix,
    ) -> None: ...
    def rope(
        self, x: Matrix, cosines: FloatTable, sines: FloatTable, dim: int, head_dim: int, out: Matrix
    ) -> None: ...
    def attention(
        self,
        q: Matrix,
        k: Matrix,
        v: Matrix,
        pool: KvPool,
        layer: int,
        scores: AttentionScores,
        out: Matrix,
    ) -> None: ...
    def store_source(self, k: Matrix, v: Matrix, pool: KvPool, layer: int) -> None: ...
    def cross_attention(self, q: Matrix, pool: KvPool, layer: int, scale: float, out: Matrix) -> None: ...
    def rope_attention(
        self,
        q: Matrix,
        k: Matrix,
        v: Matrix,
        cosines: FloatTable,
        sines: FloatTable,
        dim: int,
        pool: KvPool,
        layer: int,
        scores: AttentionScores,
        out: Matrix,
    ) -> None: ...
    def activation(self, kind: str, x: Matrix, out: Matrix) -> None: ...
    def gated_activation(self, kind: str, gate: Matrix, up: Matrix, out: Matrix) -> None: ...
    def mixture_of_experts(
        self,
        kind: str,
        x: Matrix,
        logits: Matrix,
        gates: list[Weight],
        ups: list[Weight],
        downs: list[Weight],
        *,
        top_k: int,
        normalized: bool,
        gathered: Matrix,
        inner: Matrix,
        results: Matrix,
        out: Matrix,
    ) -> None: ...
    def soft_cap(self, x: Matrix, cap: float, out: Matrix) -> None: ...
    def scale(self, x: Matrix, factor: float, out: Matrix) -> None: ...
    def gather_rows(self, x: Matrix, out: Matrix) -> None: ...
    def pool(self, kind: PoolKind, x: Matrix, out: Matrix) -> None: ...
    def l2_normalize(self, x: Matrix, eps: float, out: Matrix) -> None: ...
    def start_chain(self, strip_rows: int, strip_bytes: int) -> None: ...
    def end_chain(self) -> None: ...
    def start_sequence_chain(self, strip_rows: int, strip_bytes: int) -> None: ...
    def end_sequence_chain(self) -> None: ...
    def run(self, batch: Batch, logits: Matrix | None) -> SampledRows | None: ...
    def view(self, matrix: Matrix, rows: int) -> NDArray[np.float32]: ...
    def start_profile(self) -> None: ...
    def stop_profile(self) -> None: ...
    def profile(self) -> list[tuple[str, str, int, float, int, int]]: ...

def sample(logits: NDArray[np.float32], sampling: SamplingBatch) -> SampledRows: ...
def measure_read(runtime: Runtime, working_set_bytes: int, seconds: float) -> list[float]: ...
def measure_dot_products(runtime: Runtime, seconds: float) -> float: ...
def measure_multiply_adds(runtime: Runtime, seconds: float) -> float: ...
def evict(data: NDArray[np.uint8]) -> None: ...
def runnable_isas() -> list[str]: ...

class Cores:
    """The cores that this process may use; `quota` 0 is none."""

    @property
    def num_cpus(self) -> int: ...
    @property
    def num_cores(self) -> int: ...
    @property
    def num_nodes(self) -> int: ...
    @property
    def quota(self) -> float: ...
    @property
    def num_threads(self) -> int: ...

def count_cores(root: str = "", cpus: list[int] = []) -> Cores: ...

READ_KINDS: tuple[str, ...]

PACKED_LAYOUT: str
BLOCK_SIZE: int = 32

MAX_HEAD_DIM: int = 256
BIAS_PADDING: int = 16
