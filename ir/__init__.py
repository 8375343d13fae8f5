"""The graph: capture, annotations, encodings, verifier, printer, files."""

from shohin.ir.annotations import (
    ActivationFormat,
    Origin,
    annotate,
    annotation,
    annotations,
    register_annotation,
    remove_annotation,
)
from shohin.ir.capture import capture
from shohin.ir.codebook import Codebook
from shohin.ir.drawing import draw
from shohin.ir.encodings import (
    Dense,
    Encoding,
    Json,
    Sparse,
    decode,
    encode,
    register_encoding,
    same_bits,
)
from shohin.ir.files import atomic_path
from shohin.ir.functional import is_in_place, make_functional
from shohin.ir.graphs import (
    dead_nodes,
    immediate_dominators,
    immediate_post_dominators,
    reachable_from_inputs,
    schedule_order,
    to_networkx,
    topological_generations,
)
from shohin.ir.printer import format_node, format_program
from shohin.ir.program import (
    BATCH,
    Fact,
    InputSpec,
    Program,
    Stage,
    encoding_of,
    readers,
    set_tensor,
    tensor_of,
    weight_names,
)
from shohin.ir.serialise import (
    Header,
    ProgramFile,
    content_hash,
    load_program,
    read_header,
    save_program,
)
from shohin.ir.shapes import NodeType, TensorType, infer_shapes, symbolic_shapes, tensor_types
from shohin.ir.sharing import codebook_of, shared
from shohin.ir.ternary import Ternary
from shohin.ir.training import trainable
from shohin.ir.verifier import RULES, Fault, Rule, verify

__all__ = [
    "BATCH",
    "RULES",
    "ActivationFormat",
    "Codebook",
    "Dense",
    "Encoding",
    "Fact",
    "Fault",
    "Header",
    "InputSpec",
    "Json",
    "NodeType",
    "Origin",
    "Program",
    "ProgramFile",
    "Rule",
    "Sparse",
    "Stage",
    "TensorType",
    "Ternary",
    "annotate",
    "annotation",
    "annotations",
    "atomic_path",
    "capture",
    "codebook_of",
    "content_hash",
    "dead_nodes",
    "decode",
    "draw",
    "encode",
    "encoding_of",
    "format_node",
    "format_program",
    "immediate_dominators",
    "immediate_post_dominators",
    "infer_shapes",
    "is_in_place",
    "load_program",
    "make_functional",
    "reachable_from_inputs",
    "read_header",
    "readers",
    "register_annotation",
    "register_encoding",
    "remove_annotation",
    "same_bits",
    "save_program",
    "schedule_order",
    "set_tensor",
    "shared",
    "symbolic_shapes",
    "tensor_of",
    "tensor_types",
    "to_networkx",
    "topological_generations",
    "trainable",
    "verify",
    "weight_names",
]
