"""Tensors of several libraries as numpy arrays over the same memory, and back."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy
import numpy.typing

from .errors import BadInputError

Array = numpy.typing.NDArray[Any]
Kind = Literal["f32", "f16", "bf16"]

_ADVICE = "Thalweg aggregates in float32 and takes float32, float16 and bfloat16"


def _is_torch(value: Any) -> bool:
    return type(value).__module__.partition(".")[0] == "torch" or any(
        base.__module__ == "torch" and base.__name__ == "Tensor" for base in type(value).__mro__
    )


@dataclass(frozen=True)
class Leaf:
    """A tensor: its values without their type, and what is needed to make another one like it."""

    #: float32, or uint16 for the bits of the halves; C-contiguous.
    values: Array
    kind: Kind
    shape: tuple[int, ...]
    #: The tensor itself, as the caller gave it.
    origin: Any
    #: Whether `values` is the caller's own memory, and no copy of it.
    shares: bool

    def like(self) -> tuple[Array, Any]:
        """Memory for a result of the same kind and shape, and the tensor over it that the caller gets."""
        if _is_torch(self.origin):
            import torch

            result = torch.empty(self.shape, dtype=self.origin.dtype)
            return _of_torch("result", result)[0], result
        result = numpy.empty(self.shape, self.dtype)
        return result.view(numpy.uint16) if self.kind != "f32" else result, result

    @property
    def dtype(self) -> Any:
        """numpy's type of the caller's array."""
        if self.kind == "f32":
            return numpy.float32
        if self.kind == "f16":
            return numpy.float16
        return self.origin.dtype

    @property
    def elements(self) -> int:
        """How many numbers it has."""
        return math.prod(self.shape)


def _of_torch(name: str, tensor: Any) -> tuple[Array, Kind]:
    import torch

    if tensor.layout is not torch.strided:
        raise BadInputError(f"tensor {name!r} is sparse: pass x.to_dense()")
    # Values are read, or written as a result: no gradient flows through here, so leaves that require one are fine.
    tensor = tensor.detach()
    if tensor.device.type == "cuda":
        # PyTorch keeps pinned memory for the next one of this size.
        tensor = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor)
    elif tensor.device.type != "cpu":
        tensor = tensor.cpu()
    tensor = tensor.contiguous()
    if tensor.dtype == torch.float32:
        return tensor.numpy(), "f32"
    if tensor.dtype in (torch.float16, torch.bfloat16):
        kind: Kind = "f16" if tensor.dtype == torch.float16 else "bf16"
        return tensor.view(torch.int16).numpy().view(numpy.uint16), kind
    raise BadInputError(f"tensor {name!r} is {tensor.dtype}: {_ADVICE}; pass x.float()")


def leaf(name: str, value: Any) -> Leaf:
    """Reads a tensor: of numpy, of PyTorch, with DLPack or the buffer protocol, or what numpy can read.

    Nothing is copied, unless its elements are not in order in memory or not on the CPU.

    Raises:
        BadInputError: it is none, or of a type that is not aggregated.
    """
    if value is None:
        raise BadInputError(f"tensor {name!r} is None: pass zeros if this worker has nothing to add")
    if _is_torch(value):
        values, kind = _of_torch(name, value)
        shares = value.device.type == "cpu" and value.is_contiguous()
        return Leaf(values, kind, tuple(value.shape), value, shares)
    if isinstance(value, (bool, int, float, complex, str)):
        raise BadInputError(f"{name!r} is a {type(value).__name__}, not a tensor: pass numpy.float32(x)")
    try:
        array = _read(value)
    except (TypeError, ValueError, BufferError, RuntimeError) as error:
        raise BadInputError(
            f"{name!r} is a {type(value).__name__}, which is no tensor ({error}): pass an array of numpy, or what "
            "has DLPack or the buffer protocol"
        ) from error
    shape, shares = array.shape, array.flags.c_contiguous
    array = numpy.ascontiguousarray(array).reshape(shape)
    origin = value if isinstance(value, numpy.ndarray) else array
    if array.dtype == numpy.float32 and array.dtype.isnative:
        return Leaf(array, "f32", shape, origin, shares)
    if array.dtype == numpy.float16 and array.dtype.isnative:
        return Leaf(array.view(numpy.uint16), "f16", shape, origin, shares)
    if array.dtype.name == "bfloat16":
        return Leaf(array.view(numpy.uint16), "bf16", shape, origin, shares)
    raise BadInputError(f"tensor {name!r} is {array.dtype}: {_ADVICE}; pass x.astype(numpy.float32)")


def _read(value: Any) -> Array:
    if isinstance(value, (numpy.ndarray, numpy.generic)):
        return numpy.asarray(value)
    # JAX's arrays have both; this one also knows bfloat16.
    if hasattr(value, "__array__"):
        return numpy.asarray(value)
    if hasattr(value, "__dlpack__"):
        return numpy.from_dlpack(value)
    return numpy.asarray(memoryview(value))
