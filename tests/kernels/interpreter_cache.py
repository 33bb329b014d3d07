"""What Triton's interpreter works out anew for every operation, although it depends on a type or a shape alone.

A third of the time of the interpreted tests. Nothing is left out: the first of each kind is made by Triton itself.
"""

from __future__ import annotations

from typing import Any


def install(interpreter: Any) -> None:
    """Keep the types of blocks, shapes of tensors and NumPy's names for types.

    interpreter: `triton.runtime.interpreter`.
    """
    core, named = interpreter.tl.core, interpreter._get_np_dtype
    kinds: dict[Any, Any] = {}
    blocks: dict[Any, dict[str, Any]] = {}
    shapes: dict[Any, Any] = {}
    make_block, make_tensor = core.block_type.__init__, core.tensor.__init__

    def numpy_dtype(kind: Any) -> Any:
        scalar = kind.scalar
        if isinstance(scalar, core.pointer_type):
            return named(kind)
        if scalar.name not in kinds:
            kinds[scalar.name] = named(kind)
        return kinds[scalar.name]

    def block(self: Any, element_ty: Any, shape: Any) -> None:
        sizes = (s.value if isinstance(s, core.constexpr) else s for s in shape)
        key = (element_ty.name, getattr(element_ty, "address_space", None), *sizes)
        if key not in blocks:
            make_block(self, element_ty, shape)
            blocks[key] = dict(self.__dict__)
        self.__dict__.update(blocks[key])

    def tensor(self: Any, handle: Any, type: Any) -> None:
        key = tuple(type.shape) if type.is_block() else ()
        if key not in shapes:
            make_tensor(self, handle, type)
            shapes[key] = self.shape, self.numel
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.shape, self.numel = shapes[key]

    interpreter._get_np_dtype, core.block_type.__init__, core.tensor.__init__ = numpy_dtype, block, tensor
